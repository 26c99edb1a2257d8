"""Damage small videos at random and read them in processes with limits: no crash, no hang, no huge memory, no other frames.

python -m promag.scripts.reliability.fuzz_videos runs/corpus --ffmpeg PATH --minutes 5 --record docs/results/reliability.jsonl

The files come from the corpus. What is read in spite of damage must be the same in every way of reading, and what ffmpeg
shows of it. The seed decides all damage, so a count of files can be repeated.
"""

import itertools
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from promag.scripts._options import check_writable, share
from promag.training.command_line import Parser, run_main
from promag.training.run import append_result

from .corpus import Case, add_ffmpeg, find_ffmpeg, load_corpus
from .damage import SOURCES
from .videos import RIGHT, Outcome, examine, import_decoders

NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)  # where decoders have had their faults
Damage = Callable[[bytearray, np.random.Generator, bytes], None]


def flip(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Flip one to eight bits."""
    for place in rng.integers(len(data), size=rng.integers(1, 9)):
        data[place] ^= 1 << int(rng.integers(8))


def flip_in_header(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Flip bits near the start or the end, where containers keep their tables."""
    span = min(len(data), 1500)
    for place in rng.integers(span, size=rng.integers(1, 4)):
        data[place if rng.random() < 0.5 else len(data) - 1 - place] ^= 1 << int(rng.integers(8))


def put_number(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Write a number at the edge of its range over four or two bytes, in either byte order."""
    size, number = int(rng.choice([2, 4])), int(rng.choice(NUMBERS))
    place = int(rng.integers(max(1, len(data) - size)))
    order = ">" if rng.random() < 0.5 else "<"
    data[place : place + size] = struct.pack(order + ("I" if size == 4 else "H"), number & (2 ** (8 * size) - 1))


def splice(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Put a part of another file in place of a part."""
    place, length, source = (int(rng.integers(n)) for n in (len(data), min(len(data), 2000), len(other)))
    data[place : place + length] = other[source : source + length]


def cut_out(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Leave out a part."""
    place = int(rng.integers(len(data)))
    del data[place : place + int(rng.integers(1, 400))]


def double(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Repeat a part."""
    place = int(rng.integers(len(data)))
    data[place:place] = data[place : place + int(rng.integers(1, 2000))]


def truncate(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Cut the end away."""
    del data[int(rng.integers(len(data) // 8, len(data))) :]


DAMAGES: tuple[Damage, ...] = (flip, flip_in_header, put_number, splice, cut_out, double, truncate)


def damaged(files: Mapping[str, bytes], seed: int) -> Iterator[tuple[str, str, bytes]]:
    """Yield (name of the source, name of the damage, bytes) without end."""
    names = sorted(files)
    for number in itertools.count():
        rng = np.random.default_rng([seed, number])
        name, other = (names[int(rng.integers(len(names)))] for _ in range(2))
        damage, data = DAMAGES[int(rng.integers(len(DAMAGES)))], bytearray(files[name])
        damage(data, rng, files[other])
        yield name, damage.__name__, bytes(data)


def read_damaged(
    files: Mapping[str, bytes], cases: Mapping[str, Case], folder: Path, ffmpeg: str | None, seed: int
) -> Iterator[tuple[Outcome, bytes]]:
    """Yield what becomes of damaged files, which are written into `folder` one after the other."""
    for number, (name, damage, data) in enumerate(damaged(files, seed)):
        path = folder / f"{number}{Path(name).suffix}"
        path.write_bytes(data)
        case = cases[name]
        case = Case(path.name, f"{Path(name).name} {damage}", False, case.decoder, case.deinterlace, case.alpha)
        yield examine(folder, ffmpeg, case), data
        path.unlink()


def main(argv: Sequence[str]) -> int:
    """Print what is not right and the counts; the exit status is 1 where a process died, hung or read other frames."""
    parser = Parser(__doc__)
    add_ffmpeg(parser)
    parser.add_argument("--minutes", type=float, default=1.0, help="time to spend")
    parser.add_argument("--files", type=int, help="stop after so many files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where to keep the files that are not read rightly")
    share(parser, "--record", "--note")
    arguments = parser.parse_args(argv)
    check_writable("--record", arguments.record, appended=True)
    ffmpeg = find_ffmpeg(arguments.ffmpeg)
    cases = {case.file: case for case in load_corpus(arguments.folder) if case.file in [f"codecs/{name}" for name in SOURCES]}
    files = {file: (arguments.folder / file).read_bytes() for file in cases}
    import_decoders()

    counts, bad, ended = Counter(), [], time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        for outcome, data in read_damaged(files, cases, Path(folder), ffmpeg, arguments.seed):
            counts[outcome.result] += 1
            if outcome.result not in RIGHT:
                bad.append(f"{outcome.case.file} ({outcome.case.kind}): {outcome.result}, {outcome.reason}")
                print(bad[-1], flush=True)
                if arguments.keep:
                    arguments.keep.mkdir(parents=True, exist_ok=True)
                    (arguments.keep / outcome.case.file).write_bytes(data)
            if time.monotonic() > ended or counts.total() == arguments.files:
                break
    print(f"{counts.total()} files, seed {arguments.seed}: " + ", ".join(f"{n} {name}" for name, n in counts.most_common()))
    if arguments.record:
        figures = {"files": counts.total(), "seed": arguments.seed, "outcomes": dict(counts), "not_right": bad}
        append_result(arguments.record, {"what": "damaged videos at random", **figures, "note": arguments.note})
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
