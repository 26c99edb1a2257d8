"""`promag reconstruct` in tiles."""

import numpy as np
import pytest
import torch

from promag import AutoencoderKLProMAG
from promag.data.video import decode_strictly, read_frames, write_video
from promag.scripts import reconstruct
from promag.tokenizer.growth import Growth
from promag.tokenizer.layers import ResBlock
from promag.training.config import UserError
from tests.conftest import make_tokenizer
from tests.data.test_video import drifting
from tests.existing_models import small_existing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_tiles_limit_the_size_that_the_tokenizer_sees(checkpoint, video_folder, tmp_path):
    video = str(video_folder / "v0.mp4")
    widths = []

    def look(module, arguments):
        if isinstance(module, ResBlock):
            widths.append(arguments[0].shape[-1])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        for name, options in (("whole", []), ("tiled", ["--tile", "32"])):
            widths.clear()
            out = tmp_path / f"{name}.MP4"
            reconstruct.main([checkpoint, video, "--out", str(out), "--ratios", "16", "--chunk", "16", *options])
            assert max(widths) == (32 if options else 64) // 4  # the first features have a position every 4 pixels
            assert decode_strictly(out).frames == 20
    finally:
        handle.remove()
    whole, tiled = (read_frames(tmp_path / f"{name}.MP4", range(20)).astype(int) for name in ("whole", "tiled"))
    assert np.abs(whole - tiled).mean() < 3


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        (
            [],
            (16, 4 * 960 + 3 * 4),
            "scaled from 2048x32 to 960x16: 4 in a row are at most 4096 pixels wide (--side chooses, up to",
        ),
        (["--side", "8"], (8, 4 * 512 + 3 * 4), "scaled from 2048x32 to 512x8\n"),
    ],
)
def test_what_players_would_not_take_is_scaled_and_printed(checkpoint, tmp_path, capsys, options, size, words):
    write_video(tmp_path / "wide.mp4", drifting(3, 32, 2048), 10)
    reconstruct.main([checkpoint, str(tmp_path / "wide.mp4"), "--out", str(tmp_path / "out.mp4"), *options])
    facts = decode_strictly(tmp_path / "out.mp4")
    assert (facts.frames, facts.height, facts.width) == (3, *size)
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--side", "4"], "--side 4: 8 to 64 are legal for 4 pictures of 64x64 in a row"),
        (["--tile", "0"], "height 0: needs a multiple of 8; use 8"),
        (["--tile", "20"], "height 20: needs a multiple of 8; use 16 or 24"),
        (["--frames", "0"], "--frames 0: at least 1 is needed"),
        (["--crf", "0"], r"--crf 0: 1 \(best\) to 51 are legal"),
        (["--crf", "60"], r"--crf 60: 1 \(best\) to 51 are legal"),
        (["--ratios", "8", "8"], "--ratios 8 8: 8 is given twice; give every value once"),
        (["--ratios", "0"], "--ratios: temporal ratio 0: this tokenizer has 4x, 8x, 16x"),
        (["--chunk", "0"], "chunk of 0 frames: 16x needs a positive multiple of 16"),
    ],
)
def test_invalid_sizes_are_refused(checkpoint, video_folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        reconstruct.main([checkpoint, str(video_folder / "v0.mp4"), "--out", str(tmp_path / "out.mp4"), *options])
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("name", ["Wan 2.2", "HunyuanVideo", "CogVideoX", "LTX"])
def test_videos_are_reconstructed_by_any_grown_autoencoder(name, tmp_path):
    model = AutoencoderKLProMAG.from_base(small_existing(name))
    model.grow(Growth(width=16))
    model.save_pretrained(tmp_path / "model")
    frames = np.random.default_rng(0).integers(0, 256, (18, 70, 66, 3), dtype=np.uint8)
    write_video(tmp_path / "in.mp4", frames, 10)
    assert reconstruct.main([str(tmp_path / "model"), str(tmp_path / "in.mp4"), "--out", str(tmp_path / "out.mp4")]) == 0
    written = decode_strictly(tmp_path / "out.mp4")
    assert (written.frames, written.height) == (18, 64)
