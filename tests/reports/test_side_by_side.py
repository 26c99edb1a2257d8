import numpy as np
import pytest
import torch

from promag.data.video import read_frames, write_video
from promag.reports.grid import GAP
from promag.reports.side_by_side import Comparison, fit_size
from promag.tokenizer.metrics import from_uint8, psnr, psnr_per_frame
from promag.tokenizer.streaming import reconstruct
from tests.data.test_video import drifting


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("comparison") / "v.mp4"
    write_video(path, drifting(20, 40, 64), 10, crf=5)
    return path


def shown(comparison, width=64):
    whole = np.concatenate(list(comparison))
    return [whole[:, :, i * (width + GAP) : i * (width + GAP) + width] for i in range(4)]


def test_columns_and_psnr_are_those_of_the_whole_clip(tokenizer, video):
    told = []
    comparison = Comparison(tokenizer, (4, 8, 16), video, 20, chunk=16, precision="bf16", told=told.append)
    original, *columns = shown(comparison)
    assert np.array_equal(original, read_frames(video, range(20)))
    assert told == [17, 20]
    x = from_uint8(torch.from_numpy(original)[None])
    for ratio, column in zip((4, 8, 16), columns, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            expected = reconstruct(tokenizer, x, ratio).sample.float()
        assert torch.allclose(
            torch.tensor(comparison.frame_psnr[ratio]), psnr_per_frame(expected, x)[0], atol=0.05
        )  # bf16 in other chunks
        seen = from_uint8(torch.from_numpy(column)[None])
        assert comparison.psnr(ratio) == pytest.approx(float(psnr(seen, x)), abs=1e-3)


def test_scaled_and_enlarged(tokenizer, video):
    comparison = Comparison(tokenizer, (4, 16), video, 9, size=(16, 24), enlarge=2)
    whole = np.concatenate(list(comparison))
    assert whole.shape == (9, 32, 3 * 48 + 2 * GAP, 3)
    original = whole[:, ::2, :48:2].astype(int)
    assert np.array_equal(whole[:, 1::2, 1:48:2], original)
    coarse = read_frames(video, range(9)).reshape(9, 8, 5, 8, 8, 3).mean((2, 4))  # means of blocks of 5x8
    found = original.reshape(9, 8, 2, 8, 3, 3).mean((2, 4))
    assert np.abs(found - coarse).mean() < 3


def test_sizes_keep_their_shape_in_multiples_of_eight():
    assert fit_size(256, 542, 64) == (64, 136)
    assert fit_size(288, 256, 64) == (72, 64)
    assert fit_size(40, 50, 64) == (40, 48)
    assert fit_size(4, 4, 64) == (8, 8)
