"""Give every file of the corpus to prepare-clips, reconstruct, sample --video and the page: all read it, or all refuse it.

python -m promag.scripts.reliability.agreement runs/corpus --checkpoint checkpoints/tiny --record docs/results/reliability.jsonl
"""

import math
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from promag.reports.uploads import UploadLimits, check_upload
from promag.scripts import prepare_clips, reconstruct
from promag.scripts._options import check_writable, share
from promag.scripts.sample import last_pictures
from promag.tokenizer.checkpoint import load_tokenizer
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.progress import ProgressBar
from promag.training.run import append_result

from .corpus import load_corpus
from .videos import NoAnswerError, import_decoders, in_child

ADDRESS_SPACE = 4 * 2**30  # bytes, for a tokenizer beside a reader
TOGETHER = 12  # files that one process answers for, if none ends it
PATIENCE = 60  # seconds for each; `videos` measures what hangs, and a busy machine must not make answers differ
# Length and size are no reason to refuse here.
LIMITS = UploadLimits(megabytes=1e3, seconds=1e9, frames=10**9, side=10_000)


def by_prepare_clips(path: Path, checkpoint: Path) -> None:
    """Run `promag prepare-clips`."""
    with tempfile.TemporaryDirectory() as folder:
        prepare_clips.main([str(path), "--out", f"{folder}/clips.jsonl", "--workers", "1"])


def by_reconstruct(path: Path, checkpoint: Path) -> None:
    """Run `promag reconstruct`; it passes over the whole file before it reconstructs one frame."""
    with tempfile.TemporaryDirectory() as folder:
        reconstruct.main([str(checkpoint), str(path), "--out", f"{folder}/out.mp4", "--frames", "1", "--ratios", "4"])


def by_sample(path: Path, checkpoint: Path) -> None:
    """Read as `promag sample --video` does."""
    last_pictures(path, (64, 64), 8, 17)


def by_page(path: Path, checkpoint: Path) -> None:
    """Read as the page does."""
    check_upload(path, LIMITS)


COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    "prepare-clips": by_prepare_clips,
    "reconstruct": by_reconstruct,
    "sample --video": by_sample,
    "page": by_page,
}


def answers_of(names: Sequence[str], path: Path, checkpoint: Path) -> dict[str, str]:
    """Return what commands answer to a file, one after the other in this process: read, refused: why, or crash: why."""
    answers = {}
    for name in names:
        try:
            COMMANDS[name](path, checkpoint)
        except UserError as error:
            answers[name] = f"refused: {error}"
        except Exception as error:
            answers[name] = f"crash: {type(error).__name__}: {error}"
        else:
            answers[name] = "read"
    return answers


def ask(paths: Sequence[Path], checkpoint: Path, names: Sequence[str] = tuple(COMMANDS)) -> list[dict[str, str]]:
    """Return the answers to files, asked for in one process; where it dies, each file and command has one of its own."""

    def one_after_the_other() -> list[dict[str, str]]:
        return [answers_of(names, path, checkpoint) for path in paths]

    try:
        answers, _ = in_child(one_after_the_other, PATIENCE * len(paths) * len(names), ADDRESS_SPACE)
    except NoAnswerError as error:
        answers = error
    if isinstance(answers, list):
        return answers
    if len(paths) > 1:
        return [answer for path in paths for answer in ask([path], checkpoint, names)]
    if len(names) > 1:
        return [{name: answer for given in names for name, answer in ask(paths, checkpoint, [given])[0].items()}]
    return [{names[0]: str(answers)}]


def ask_until(paths: Sequence[Path], checkpoint: Path, ended: float) -> list[dict[str, str]]:
    """Return the answers to files, or none at all once `time.monotonic()` has passed `ended`."""
    return ask(paths, checkpoint) if time.monotonic() < ended else []


def agree(answers: dict[str, str]) -> bool:
    """Return whether all read or all refuse."""
    words = {answer.split(":")[0] for answer in answers.values()}
    return len(words) == 1 and words <= {"read", "refused"}


def main(argv: Sequence[str]) -> int:
    """Print the files on which the commands differ; the exit status is 1 if there are any."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of the corpus, such as runs/corpus")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument("--only", default="", metavar="TEXT", help="only files whose path holds this")
    parser.add_argument("--minutes", type=float, default=math.inf, help="ask for no more files after this time")
    share(parser, "--record", "--note")
    arguments = parser.parse_args(argv)
    check_writable("--record", arguments.record, appended=True)
    folder = arguments.folder.resolve()
    cases = [case for case in load_corpus(folder) if arguments.only in case.file]
    random.Random(0).shuffle(cases)  # what --minutes leaves is a sample of all kinds
    paths = [folder / case.file for case in cases]
    torch.set_num_threads(1)
    import_decoders()
    load_tokenizer(arguments.checkpoint)  # imports all that loading one needs
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        parts = [paths[first : first + TOGETHER] for first in range(0, len(paths), TOGETHER)]
        ended = time.monotonic() + 60 * arguments.minutes
        asked = pool.map(partial(ask_until, checkpoint=arguments.checkpoint.resolve(), ended=ended), parts)
        bar = ProgressBar(zip(parts, asked, strict=True), total=len(parts), desc="asking for parts of the corpus", unit="part")
        answers = {path: given for part, answered in bar if answered for path, given in zip(part, answered, strict=True)}
    differing = {
        str(path.relative_to(folder)): {name: answer.replace(f"{folder}/", "") for name, answer in given.items()}
        for path, given in answers.items()
        if not agree(given)
    }
    for file, given in differing.items():
        print(f"{file!r}:", *(f"  {name}: {answer[:200]}" for name, answer in given.items()), sep="\n")
    counts = {name: dict(Counter(given[name].split(":")[0] for given in answers.values())) for name in COMMANDS}
    agreed, left = len(answers) - len(differing), len(cases) - len(answers)
    print(f"{agreed} of {len(answers)} files: all commands read, or all refuse; {left} were not asked for; {counts}")
    if arguments.record:
        what = "agreement of commands on odd and damaged videos"
        figures = {"files": len(answers), "not_asked": left, "only": arguments.only, "agreed": agreed}
        figures |= {"commands": counts, "differing": differing}
        append_result(arguments.record, {"what": what, **figures, "note": arguments.note})
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
