"""Measure the peak memory of streaming by video length, of tiles, and of a large picture.

promag benchmark long-video checkpoints/tiny --video video.mp4 --large 4096 8192 --record docs/results/soak.jsonl
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promag.data.video import frame_times, read_frames, write_video
from promag.evaluation.speed.timing import resident
from promag.scripts._memory import in_new_process, run_command
from promag.scripts._options import check_different, check_writable, share
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.geometry import check_ratio
from promag.tokenizer.metrics import from_uint8, psnr
from promag.tokenizer.streaming import chunk_plan, pad_clip, reconstruct_stream
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.precision import autocast
from promag.training.run import append_result


def main(argv: Sequence[str]) -> int:
    """Print, and with --record append to a results file, peak memory by length and the PSNR of tiled against whole."""
    parser = Parser(__doc__)
    share(parser, "checkpoint", "--ratios", "--record")
    parser.add_argument("--video", type=Path, help="a video larger than a tile; left out: tiles are not compared")
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 2000], help="frames that are streamed")
    share(parser, "--size", help="height and width of the streamed frames")
    parser.add_argument("--chunk", type=int, default=32, help="frames processed at a time, a multiple of every ratio")
    share(parser, "--frames", default=17, help="frames of the video that are tiled")
    parser.add_argument(
        "--large",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="let promag reconstruct read --frames frames of this size",
    )
    parser.add_argument("--tile", type=int, default=128, help="side of a tile in pixels; tiles overlap by half of it")
    arguments = parser.parse_args(argv)
    check_writable("--record", arguments.record, appended=True)
    check_different("--ratios", arguments.ratios)

    model: Any = load_tokenizer(arguments.checkpoint)
    ratios = tuple(arguments.ratios or model.temporal_ratios)
    try:
        for ratio in ratios:
            check_ratio(ratio, model.temporal_ratios)
            chunk_plan(1 + ratio, ratio, arguments.chunk)
        model.enable_tiling(*[arguments.tile] * 2, *[arguments.tile // 16 * 8] * 2)
    except ValueError as error:
        raise UserError(str(error)) from None
    clips = {ratio: first_frames(arguments.video, arguments.frames, ratio) for ratio in ratios} if arguments.video else {}
    for clip in clips.values():  # before anything is measured
        if max(clip.shape[3:]) <= arguments.tile:
            raise UserError(f"video of {clip.shape[3]}x{clip.shape[4]}: is no larger than a tile of {arguments.tile}")
    rows = []
    for ratio in ratios:
        row: dict[str, Any] = {"ratio": ratio, "peak_bytes": {}}
        for length in arguments.lengths:
            row["peak_bytes"][str(length)] = peak = peak_memory(
                arguments.checkpoint, ratio, length, arguments.size, arguments.chunk
            )
            print(f"{ratio:>3}x  {length} frames of {arguments.size}x{arguments.size}: peak memory {peak / 2**20:.0f} MiB")
        if ratio in clips:
            row["tiled_psnr"] = tiled = tiled_against_whole(model, clips[ratio], ratio)
            print(f"{ratio:>3}x  tiles of {arguments.tile} against the whole picture: {tiled:.1f} dB")
        rows.append(row)
    more: dict[str, Any] = {}
    if arguments.large:
        more["large"] = large = reconstruct_large(arguments.checkpoint, arguments.frames, *arguments.large)
        print(f"promag reconstruct of {large['frames']} frames of {large['width']}x{large['height']}: {large['peak_mib']} MiB")
    if arguments.record:
        settings = {key: getattr(arguments, key) for key in ("size", "chunk", "frames", "tile")}
        video = arguments.video.name if arguments.video else None
        checkpoint = "/".join(Path(arguments.checkpoint).parts[-2:])
        line = {"what": "long video", "checkpoint": checkpoint, **settings, "video": video, "rows": rows, **more}
        append_result(arguments.record, line)
    else:
        print(json.dumps({"rows": rows, **more}))
    return 0


def peak_memory(checkpoint: str, ratio: int, length: int, size: int, chunk: int) -> int:
    """Return the peak resident bytes of a process that loads the tokenizer and streams `length` frames through it."""
    return in_new_process(_stream, checkpoint, ratio, length, size, chunk)


def _stream(checkpoint: str, ratio: int, length: int, size: int, chunk: int) -> int:
    model = load_tokenizer(checkpoint)
    frames = length + -(length - 1) % ratio

    def chunks() -> Iterator[Tensor]:
        for i, count in enumerate(chunk_plan(frames, ratio, chunk)):
            yield torch.rand(1, 3, count, size, size, generator=torch.Generator().manual_seed(i)) * 2 - 1

    seen = 0
    with autocast("cpu"):
        for sample in reconstruct_stream(model, chunks(), ratio):
            seen += sample.shape[2]
    if seen != frames:
        raise RuntimeError(f"{seen} frames came back of {frames}")
    return resident("VmHWM")


def reconstruct_large(checkpoint: str, frames: int, height: int, width: int) -> dict[str, float]:
    """Return the seconds and memory of `promag reconstruct` of a video that it scales down; memory is that of all processes."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = (127 + 60 * np.sin(x / 190) + 60 * np.cos(y / 130)).astype(np.uint8)
    picture = np.stack([waves, waves[::-1], 255 - waves], axis=-1)
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder, "large.mp4"), (np.roll(picture, 8 * frame, 1)[None] for frame in range(frames)), 24)
        used = run_command("reconstruct", checkpoint, Path(folder, "large.mp4"), "--out", Path(folder, "compared.mp4"))
    return {"frames": frames, "height": height, "width": width, **used}


def first_frames(video: Path, frames: int, ratio: int) -> Tensor:
    """Return the first frames of a video, padded to what the ratio takes and cropped to multiples of 8: 1 C T H W."""
    pixels = read_frames(video, range(min(frames, len(frame_times(video)))))
    height, width = (side // 8 * 8 for side in pixels.shape[1:3])
    return pad_clip(from_uint8(torch.from_numpy(pixels[None]))[..., :height, :width], ratio)[0]


@torch.no_grad()
def tiled_against_whole(model: Any, clip: Tensor, ratio: int) -> float:
    """Return the PSNR of a tiled reconstruction against the untiled one, in dB."""
    outputs = []
    with autocast("cpu"):
        for model.use_tiling in (True, False):
            outputs.append(model(clip, ratio).sample)
    return float(psnr(*outputs))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
