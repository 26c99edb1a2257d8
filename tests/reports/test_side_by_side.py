import numpy as np
import pytest
import torch

from promag.data.video import read_frames, stream_frames, write_video
from promag.reports.side_by_side import GAP, GREY, LARGEST, USUAL, Comparison, chunk_of, fit_size, grid, largest_side, make_film
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
    progress = []
    pictures = stream_frames(video)
    comparison = Comparison(tokenizer, (4, 8, 16), pictures, 20, chunk=16, precision="bf16", on_progress=progress.append)
    original, *columns = shown(comparison)
    assert np.array_equal(original, read_frames(video, range(20)))
    assert progress == [17, 20]
    x = from_uint8(torch.from_numpy(original)[None])
    for ratio, column in zip((4, 8, 16), columns, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            expected = reconstruct(tokenizer, x, ratio).sample.float()
        assert torch.allclose(
            torch.tensor(comparison.frame_psnr[ratio]), psnr_per_frame(expected, x)[0], atol=0.05
        )  # bf16 in other chunks
        seen = from_uint8(torch.from_numpy(column)[None])
        assert comparison.psnr(ratio) == pytest.approx(float(psnr(seen, x)), abs=1e-3)


class SlowAtFirst:
    """Passes clips on in a second of its clock, and in 100 the first time at each ratio."""

    can_stream, latent_step, spatial_ratio, device = True, 1, 8, torch.device("cpu")

    def __init__(self):
        self.now, self.known = 0.0, set()

    def encode_chunk(self, chunk, state, ratio):
        self.now += 1 if ratio in self.known else 100
        self.known.add(ratio)
        return type("Posterior", (), {"mode": staticmethod(lambda: chunk)}), state

    def decode_chunk(self, z, state, ratio):
        return z, state


def test_the_first_call_at_a_ratio_is_not_timed(video, monkeypatch):
    model = SlowAtFirst()
    monkeypatch.setattr("promag.reports.side_by_side.time.perf_counter", lambda: model.now)
    for count, chunks in ((20, 2), (1, 1)):
        comparison = Comparison(model, (4, 16), stream_frames(video, range(count)), count, chunk=16, precision="fp32")
        assert len(np.concatenate(list(comparison))) == count
        assert comparison.seconds == {4: chunks, 16: chunks}
        assert comparison.psnr(16) == pytest.approx(120)
        model.known.clear()


def test_scaled_and_enlarged(tokenizer, video):
    comparison = Comparison(tokenizer, (4, 16), stream_frames(video, range(9), (16, 24)), 9, enlarge=2)
    whole = np.concatenate(list(comparison))
    assert whole.shape == (9, 32, 3 * 48 + 2 * GAP, 3)
    original = whole[:, ::2, :48:2].astype(int)
    assert np.array_equal(whole[:, 1::2, 1:48:2], original)
    coarse = read_frames(video, range(9)).reshape(9, 8, 5, 8, 8, 3).mean((2, 4))  # means of blocks of 5x8
    means = original.reshape(9, 8, 2, 8, 3, 3).mean((2, 4))
    assert np.abs(means - coarse).mean() < 3


def test_sizes_keep_their_shape_in_multiples_of_eight():
    assert fit_size(256, 542, 64) == (64, 136)
    assert fit_size(288, 256, 64) == (72, 64)
    assert fit_size(40, 50, 64) == (40, 48)
    assert fit_size(4, 4, 64) == (8, 8)
    assert fit_size(256, 2048, 64, longest=192) == (24, 192)


def test_large_pictures_are_processed_in_fewer_frames():
    assert [chunk_of(side, side, (4, 16)) for side in (64, 512, 1024, 1080, 4096)] == [64, 64, 16, 16, 16]
    assert chunk_of(1024, 1280, (4,)) == 12


def test_a_comparison_is_no_larger_than_players_take():
    assert [largest_side(*size, 4) for size in ((64, 96), (540, 960), (1080, 1920), (1920, 1080))] == [64, 540, 573, 1019]
    assert [largest_side(*size, 4, LARGEST) for size in ((1080, 1920), (1920, 1080))] == [1080, 1080]
    for limit, size in ((USUAL, (512, 1016)), (LARGEST, (1024, 2040))):
        assert fit_size(4096, 8192, largest_side(4096, 8192, 4, limit)) == size
        height, width = fit_size(8192, 4096, largest_side(8192, 4096, 2, limit))
        assert max(height, 2 * width + GAP) <= limit[0]
        assert 0.8 * limit[1] < height * (2 * width + GAP) <= limit[1]


def solid(value, width=6):
    return np.full((2, 4, width, 3), value, np.uint8)


def test_videos_stand_row_by_row_with_grey_between():
    whole = grid([solid(1), solid(2), solid(3)], columns=2)
    assert whole.shape == (2, 2 * 4 + GAP, 2 * 6 + GAP, 3)
    expected = np.full((8 + GAP, 12 + GAP), GREY)
    expected[:4, :6], expected[:4, 6 + GAP :], expected[4 + GAP :, :6] = 1, 2, 3
    assert np.array_equal(whole, np.broadcast_to(expected[None, :, :, None], whole.shape))
    assert np.array_equal(grid([solid(1)], columns=3), solid(1))


def test_mistakes_are_named():
    for videos, columns in (([], 1), ([solid(1), solid(1, width=8)], 2), ([solid(1)], 0)):
        with pytest.raises(ValueError, match="one shape, and a column, are needed"):
            grid(videos, columns)


def test_a_film_records_the_positions_of_its_tiles(tmp_path):
    videos = {name: np.full((2, 24, 32, 3), value, np.uint8) for name, value in (("a", 20), ("b", 120), ("c", 220))}
    film = make_film("three", videos, 8.0, columns=2)
    (tmp_path / "film.mp4").write_bytes(film.mp4)
    pixels = read_frames(tmp_path / "film.mp4", range(2))
    assert pixels.shape == (2, film.height, film.width, 3) == (2, 2 * 96 + GAP, 2 * 128 + GAP, 3)
    where = film.layout
    assert where == {"height": 24, "width": 32, "scale": 4, "columns": 2, "gap": GAP}
    for i, value in enumerate((20, 120, 220)):
        top, left = i // 2 * (24 * 4 + GAP), i % 2 * (32 * 4 + GAP)
        tile = pixels[:, top : top + 96, left : left + 128].astype(int)
        assert np.abs(tile[:, 8:-8, 8:-8] - value).max() <= 3
