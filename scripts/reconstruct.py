"""Write a video beside its reconstruction at each temporal ratio, and print PSNR.

Any length works: the video is read, encoded, decoded and written in chunks, or whole where an existing autoencoder cannot
stream. Sides are cropped to multiples of the spatial ratio. A comparison that would be wider than players take is made of
smaller pictures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from promag.data.video import READER, VideoFacts, at_constant_rate, decode_strictly, stream_frames, write_video
from promag.reports.side_by_side import LARGEST, USUAL, Comparison, chunk_of, fit_size, largest_side
from promag.scripts._options import check_at_least_one, check_different, check_writable, share
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.geometry import check_ratio
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.device import best_device
from promag.training.precision import choose_precision


def main(argv: Sequence[str]) -> int:
    """Write the comparison and print PSNR and frames per second of each ratio."""
    parser = Parser(__doc__)
    share(parser, "checkpoint")
    parser.add_argument("video", type=Path, help="video file")
    parser.add_argument("--out", type=Path, required=True, help="mp4 file")
    share(parser, "--ratios", "--precision")
    share(parser, "--frames", default=None, help="frames from the start; left out: all")
    parser.add_argument(
        "--side", type=int, help="scale to so many pixels of the shorter side; left out: only what is too large"
    )
    parser.add_argument(
        "--chunk", type=int, help="frames in work at a time, a multiple of every ratio; left out: 64, fewer of large pictures"
    )
    parser.add_argument("--tile", type=int, help="work on tiles of so many pixels a side; left out: the picture at once")
    parser.add_argument("--crf", type=int, default=14, help="quality of the mp4, 1 (best) to 51")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix.lower() != ".mp4":
        raise UserError(f"--out {arguments.out}: an .mp4 file is needed")
    check_writable("--out", arguments.out, [arguments.video])
    check_different("--ratios", arguments.ratios)
    if not 1 <= arguments.crf <= 51:
        raise UserError(f"--crf {arguments.crf}: 1 (best) to 51 are legal")

    model: Any = load_tokenizer(arguments.checkpoint)
    model.to(best_device())
    precision = choose_precision(arguments.precision, best_device())
    ratios = tuple(arguments.ratios or model.temporal_ratios)
    try:
        for ratio in ratios:
            check_ratio(ratio, model.temporal_ratios)
    except ValueError as error:
        raise UserError(f"--ratios: {error}") from None
    check_at_least_one(arguments, "frames")
    facts = READER.call(decode_strictly, arguments.video)
    fps, frames = at_constant_rate(facts.timestamps, facts.fps)
    frames = frames[: arguments.frames]
    count, size = len(frames), _size(arguments.video, facts, 1 + len(ratios), arguments.side)
    shown = size or (facts.height, facts.width)
    chunk = chunk_of(*shown, ratios, model.latent_step) if arguments.chunk is None else arguments.chunk
    pictures = READER.stream(stream_frames, arguments.video, frames.tolist(), size)
    try:
        comparison = Comparison(model, ratios, pictures, count, chunk, precision=precision)
        if arguments.tile is not None:
            multiple = model.spatial_ratio
            stride = max(multiple, arguments.tile * 3 // 4 // multiple * multiple)
            model.enable_tiling(arguments.tile, arguments.tile, stride, stride)
    except ValueError as error:
        raise UserError(str(error)) from None

    write_video(arguments.out, iter(comparison), fps, arguments.crf)
    for note in facts.notes:
        print(f"{arguments.video}: {note}")
    print(f"{arguments.out}: original | {' | '.join(f'{r}x' for r in ratios)}, {count} frames at {fps:.3g} fps")
    for ratio in ratios:
        print(f"{ratio:>3}x  psnr {comparison.psnr(ratio):.2f} dB  {count / comparison.seconds[ratio]:.1f} frames/s")
    return 0


def _size(video: Path, facts: VideoFacts, columns: int, side: int | None) -> tuple[int, int] | None:
    """Return the (height, width) to scale pictures to, and print it; None where they stay as they are."""
    shortest = min(facts.height, facts.width)
    largest = largest_side(facts.height, facts.width, columns, LARGEST)
    if side is not None and not 8 <= side <= largest:
        raise UserError(
            f"--side {side}: 8 to {largest} are legal for {columns} pictures of {facts.width}x{facts.height} in a row"
        )
    chosen = side or largest_side(facts.height, facts.width, columns)
    if chosen == shortest:
        return None
    size = fit_size(facts.height, facts.width, chosen)
    reason = "" if side else f": {columns} in a row are at most {USUAL[0]} pixels wide (--side chooses, up to {largest})"
    print(f"{video}: scaled from {facts.width}x{facts.height} to {size[1]}x{size[0]}{reason}")
    return size


if __name__ == "__main__":
    raise SystemExit(run_main(main))
