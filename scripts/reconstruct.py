"""Reconstruct a video with a tokenizer: the original beside what each temporal ratio makes of it, in one mp4, with PSNR.

Any length works: the video is read, encoded, decoded and written in chunks. Sides are cropped to even multiples of 8.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promag.tokenizer.geometry import check_ratio
from promag.tokenizer.metrics import from_uint8, psnr, to_uint8
from promag.tokenizer.streaming import Padding, chunk_plan, crop_clip, pad_clip, reconstruct_stream
from promag.tokenizer.train import load_tokenizer
from promag.training.config import UserError, run_main
from promag.training.video import frame_times, read_frames, write_video

GAP = 4  # grey pixels between columns


def main(argv: Sequence[str]) -> int:
    """Write the comparison and print PSNR and frames per second of each ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a tokenizer, or of a pipeline")
    parser.add_argument("video", type=Path, help="video file")
    parser.add_argument("--out", type=Path, required=True, help="mp4 file")
    parser.add_argument("--ratios", type=int, nargs="+", help="temporal ratios; left out: all that the tokenizer has")
    parser.add_argument("--frames", type=int, help="frames from the start; left out: all")
    parser.add_argument("--chunk", type=int, default=64, help="frames in work at a time, a multiple of every ratio")
    parser.add_argument("--tile", type=int, help="work on tiles of so many pixels a side; left out: the picture at once")
    parser.add_argument("--crf", type=int, default=14, help="quality of the mp4, 1 (best) to 51")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".mp4":
        raise UserError(f"--out {arguments.out}: an .mp4 file is needed")

    model: Any = load_tokenizer(arguments.checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ratios = tuple(arguments.ratios or model.temporal_ratios)
    times = frame_times(arguments.video)
    count = min(arguments.frames or len(times), len(times))
    fps = (len(times) - 1) / float(times[-1] - times[0]) if len(times) > 1 else 1.0
    try:
        for ratio in ratios:
            check_ratio(ratio, model.temporal_ratios)
        padded = count + -(count - 1) % max(ratios)
        plan = chunk_plan(padded, max(ratios), arguments.chunk)
        if arguments.tile:
            stride = max(8, arguments.tile * 3 // 4 // 8 * 8)
            model.enable_tiling(arguments.tile, arguments.tile, stride, stride)
    except ValueError as error:
        raise UserError(str(error)) from None

    comparison = Comparison(model, ratios, arguments.video, count, plan)
    write_video(arguments.out, iter(comparison), fps, arguments.crf)
    print(f"{arguments.out}: original | {' | '.join(f'{r}x' for r in ratios)}, {count} frames at {fps:.3g} fps")
    for ratio in ratios:
        print(f"{ratio:>3}x  psnr {comparison.psnr(ratio):.2f} dB  {count / comparison.seconds[ratio]:.1f} frames/s")
    return 0


class Comparison:
    """Chunks of a video beside its reconstructions, uint8 (T, H, W, 3), read and computed while iterated over."""

    def __init__(self, model: Any, ratios: Sequence[int], video: Path, count: int, plan: Sequence[int]):
        self.model, self.ratios, self.video, self.count, self.plan = model, ratios, video, count, plan
        self.seconds = dict.fromkeys(ratios, 0.0)
        self.errors = dict.fromkeys(ratios, 0.0)  # sums over frames of the squared error, in units of its peak

    def psnr(self, ratio: int) -> float:
        """Return the PSNR over all pixels of the video, in dB."""
        return -10 * float(np.log10(max(self.errors[ratio] / self.count, 1e-12)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the video, chunk by chunk."""
        queue: list[Tensor] = []
        streams = {r: reconstruct_stream(self.model, self._chunks(queue, i), r) for i, r in enumerate(self.ratios)}
        left = self.count
        for _ in self.plan:
            columns = []
            for ratio, stream in streams.items():
                started = time.perf_counter()
                with torch.autocast(self.model.device.type, torch.bfloat16):
                    columns.append(next(stream).float().cpu())
                self.seconds[ratio] += time.perf_counter() - started
            original = queue.pop()
            kept = min(left, original.shape[2])
            left -= kept
            for ratio, output in zip(self.ratios, columns, strict=True):
                for t in range(kept):
                    value = psnr(output[:, :, t : t + 1], original[:, :, t : t + 1])
                    self.errors[ratio] += 10 ** (-float(value) / 10)
            yield _side_by_side([crop_clip(x, Padding(original.shape[2] - kept, 0, 0)) for x in (original, *columns)])

    def _chunks(self, queue: list[Tensor], reader: int) -> Iterator[Tensor]:
        """Yield the chunks; the first of the streams reads a chunk, the others take what it read."""
        first = 0
        for length in self.plan:
            if reader == 0:
                queue.append(self._read(first, length))
            yield queue[-1].to(self.model.device)
            first += length

    def _read(self, first: int, length: int) -> Tensor:
        indices = [min(first + i, self.count - 1) for i in range(length)]  # behind the end, the last frame again
        pixels = read_frames(self.video, indices)
        height, width = (max(8, side // 8 * 8) for side in pixels.shape[1:3])
        x = from_uint8(torch.from_numpy(pixels[None]))[..., :height, :width]
        return pad_clip(x, 1)[0]


def _side_by_side(clips: Sequence[Tensor]) -> np.ndarray:
    videos = [to_uint8(clip)[0].numpy() for clip in clips]
    bar = np.full((*videos[0].shape[:2], GAP, 3), 128, np.uint8)
    return np.concatenate([part for video in videos for part in (bar, video)][1:], axis=2)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
