"""Make a corpus of odd and damaged videos and pictures, some 500 small files, with ffmpeg.

python -m promag.scripts.reliability.corpus runs/corpus --ffmpeg PATH

The same ffmpeg makes the same files. `corpus.jsonl` beside them says what each is and how a player shows it. The folder
`reference` holds the pixels of pictures, known from how they were made.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from promag.training.command_line import Parser, run_main
from promag.training.config import UserError

HEIGHT, WIDTH, FRAMES, RATE = 64, 96, 24, 25
INDEX = "corpus.jsonl"


@dataclass(frozen=True)
class Case:
    """A file of the corpus.

    Args:
        file: path below the corpus's folder; bytes that are no UTF-8 are surrogates, as in os.fsdecode.
        kind: its format in words; figures are given for each kind.
        whole: nothing in it is damaged: a player shows all of it.
        decoder: decoder that ffmpeg needs to show it as a browser does.
        deinterlace: its frames are interlaced.
        alpha: it has transparent pixels.
        matrix: what a player assumes where the file names no matrix: bt709 or smpte170m.
        transfer: hlg or pq where its light is not SDR.
        stream: the video stream that a player shows; None: the one that ffmpeg chooses.
        tolerance: largest difference from ffmpeg's own pixels in grey levels that counts as equal.
        note: why it may be refused although it is whole.
    """

    file: str
    kind: str
    whole: bool = True
    decoder: str | None = None
    deinterlace: bool = False
    alpha: bool = False
    matrix: str | None = None
    transfer: str | None = None
    stream: int | None = None
    tolerance: int = 8
    note: str = ""


def picture(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, alpha: bool = False) -> np.ndarray:
    """Return smooth colours that move and are unlike their mirror images, uint8 (T, H, W, 3), or 4 channels with alpha."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij", sparse=True)
    u, v = x / max(width, 2), y / max(height, 2)
    red = 40 + 150 * u + 30 * np.sin(t * 0.9)
    green = 40 + 150 * v + 30 * np.cos(t * 0.7) + 0 * u
    blue = 127 + 90 * np.sin(3 * u + 2 * v - 0.6 * t)
    channels = [red + 0 * blue, green + 0 * blue, blue]
    if alpha:
        channels.append(127 + 160 * np.sin(4 * u + 0.3 * t) + 0 * blue)
    return np.stack(channels, axis=-1).clip(0, 255).round().astype(np.uint8)


class Maker:
    """Writes files into one folder and lists their cases.

    Files that depend on each other are written in order; `later` collects independent calls of ffmpeg, which `run` starts
    side by side.
    """

    def __init__(self, folder: Path, ffmpeg: str, workers: int = 2):
        self.folder, self.ffmpeg, self.workers = folder, ffmpeg, workers
        self.cases: list[Case] = []
        self.later: list[Callable[[], None]] = []
        self.left_out: dict[str, str] = {}  # files that this ffmpeg could not encode, and what it says

    def path(self, file: str) -> Path:
        """Return where a file lies, its folder made."""
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def call(self, arguments: Sequence[str], given: bytes | None = None) -> None:
        """Run ffmpeg; raises RuntimeError with its message where it fails."""
        command = [self.ffmpeg, "-nostdin", "-hide_banner", "-v", "error", "-y", *arguments]
        command = [*command[:1], *command[2:]] if given is not None else command
        done = subprocess.run(command, input=given, capture_output=True, cwd=self.folder)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stderr.decode(errors='replace').strip()[-500:]}")

    def encode(self, file: str, kind: str, options: str = "", *, pixels: np.ndarray | None = None, **case) -> None:
        """Encode `pixels`, or the usual picture, at RATE frames a second with options of ffmpeg."""
        rate = case.pop("rate", RATE)
        inputs = case.pop("inputs", "")

        def work() -> None:
            array = picture() if pixels is None else pixels
            raw = f"-f rawvideo -pix_fmt {'rgba' if array.shape[3] == 4 else 'rgb24'} -r {rate}"
            size = f"-s {array.shape[2]}x{array.shape[1]} -i -"
            fixed = "-fflags +bitexact -flags:v +bitexact -threads 1"
            words = shlex.split(f"{raw} {size} {inputs} {fixed} {options}")
            try:
                self.call([*words, f"file:{self.path(file)}"], array.tobytes())
            except RuntimeError as error:
                self.left_out[file] = str(error)

        self.later.append(work)
        self.add(file, kind, **case)

    def copy(self, source: str, file: str, kind: str, options: str = "-c copy", before: str = "", **case) -> None:
        """Run ffmpeg on an earlier file, without encoding unless `options` say so; what is `optional` may fail."""
        optional = case.pop("optional", False)
        words = [*shlex.split(before), "-i", f"file:{self.folder / source}", *shlex.split(f"-fflags +bitexact {options}")]
        try:
            self.call([*words, f"file:{self.path(file)}"])
        except RuntimeError:
            if not optional:
                raise
            self.path(file).unlink(missing_ok=True)
            return
        self.add(file, kind, **case)

    def write(self, file: str, kind: str, data: bytes, **case) -> None:
        """Write bytes."""
        self.path(file).write_bytes(data)
        self.add(file, kind, **case)

    def add(self, file: str, kind: str, **case) -> None:
        """List a file that lies there."""
        self.cases.append(Case(file, kind, **case))

    def data(self, file: str) -> bytes:
        """Return the bytes of an earlier file."""
        return (self.folder / file).read_bytes()

    def run(self) -> None:
        """Run the collected calls side by side; raises the first one's error."""
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(lambda work: work(), self.later))
        self.later.clear()


def find_ffmpeg(given: str | None) -> str:
    """Return the ffmpeg to use; raises UserError where there is none."""
    found = given if given is None else shutil.which(given)
    found = found or (None if given else shutil.which("ffmpeg"))
    if found is None:
        raise UserError(
            f"--ffmpeg {given}: cannot be run"
            if given
            else "no ffmpeg on the PATH: give --ffmpeg PATH, such as the program that the package imageio-ffmpeg holds"
        )
    return os.path.abspath(found)


def make_corpus(folder: Path, ffmpeg: str) -> list[Case]:
    """Make all files anew in a new or emptied folder and return their cases."""
    from . import damage, encodings, pictures, whole

    if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).exists():
        raise UserError(f"{folder}: holds files that are no corpus; name a new folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / INDEX).touch()  # an unfinished corpus may be made anew
    maker = Maker(folder.resolve(), ffmpeg)
    for module in (encodings, whole, damage, pictures):
        module.make(maker)
        maker.run()
    for file, message in maker.left_out.items():
        print(f"left out {file}, which this ffmpeg cannot encode: {message.splitlines()[0]}")
    maker.cases = sorted((c for c in maker.cases if c.file not in maker.left_out), key=lambda case: case.file)
    (folder / INDEX).write_text("".join(json.dumps(asdict(case)) + "\n" for case in maker.cases), encoding="utf-8")
    return maker.cases


def load_corpus(folder: Path) -> Iterator[Case]:
    """Yield the cases of a folder; raises UserError where it is no corpus."""
    try:
        lines = (folder / INDEX).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{folder}: no corpus; make one with python -m promag.scripts.reliability.corpus {folder}") from None
    yield from (Case(**json.loads(line)) for line in lines)


def add_ffmpeg(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command on the corpus has."""
    parser.add_argument("folder", type=Path, help="folder of the corpus, such as runs/corpus")
    parser.add_argument("--ffmpeg", metavar="PATH", help="the ffmpeg program; left out: the one on the PATH")


def main(argv: Sequence[str]) -> int:
    """Make the corpus and count its files."""
    parser = Parser(__doc__)
    add_ffmpeg(parser)
    arguments = parser.parse_args(argv)
    cases = make_corpus(arguments.folder, find_ffmpeg(arguments.ffmpeg))
    whole = sum(case.whole for case in cases)
    print(f"{arguments.folder}: {len(cases)} files of {len({case.kind for case in cases})} kinds, {whole} of them whole")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
