"""Measure how fast this machine trains, encodes, samples and loads, beside its limits.

promag benchmark speed tokenizer train --peers --precision fp32 bf16 --record docs/results/speed.jsonl

Suites: `train` whole training steps, `tokenizer` encoding and decoding, `transformer` gradients and denoising, `sampling` a
pipeline's call, `data` reading, loading and caching. Each case is a JSON line with median, quartiles, share of the machine's
limit in the same run and ratio to a baseline. The most telling cases come first. A record is continued: cases that it has
from this commit and machine are not measured again. A case that fails is recorded with its error, and the others go on; the
same command measures its group again.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from promag.evaluation.speed import data, sampling, tokenizer, training, transformer
from promag.evaluation.speed.cases import Group, Options, is_recorded, measure
from promag.evaluation.speed.ceilings import Ceilings, measure_ceilings
from promag.evaluation.speed.subjects import PEERS
from promag.scripts._options import check_at_least_one, check_writable, share
from promag.scripts._parts import TINY_DECODER
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.device import best_device
from promag.training.files import append_json, read_json_lines
from promag.training.graphs import check_graphs
from promag.training.precision import Chosen, choose_precision
from promag.training.run import provenance

SUITES = {
    "train": training.groups,
    "tokenizer": tokenizer.groups,
    "transformer": transformer.groups,
    "sampling": sampling.groups,
    "data": data.groups,
}
QUICK: dict[str, Any] = {"presets": ["tiny"], "clip_sizes": ["17x32x32"], "frames": 17, "steps": [2], "rounds": 2, "count": 8}
QUICK |= {"train_batch_size": 1}


def main(argv: Sequence[str]) -> int:
    """Print a line for each case; with --record append each as a JSON line. 1: some had errors or were left out."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.quick:
        for name, value in QUICK.items():
            if getattr(arguments, name) == parser.get_default(name):
                setattr(arguments, name, value)
    options = _options(arguments)
    groups = [group for name in arguments.suites or SUITES for group in SUITES[name](options)]
    groups.sort(key=lambda group: group.rank)  # a stable sort: suites keep the order in which they were given
    where: dict[str, Any] = {**provenance(), "threads": torch.get_num_threads()}
    if arguments.commit:
        where["commit"] = arguments.commit
    device = options.device.type
    recorded = read_json_lines(arguments.record) if arguments.record and arguments.record.exists() else []
    todo = [group for group in groups if arguments.again or not is_recorded(group, device, recorded, where)]
    if len(todo) < len(groups):
        print(f"{arguments.record}: has {len(groups) - len(todo)} of {len(groups)} groups at this commit; --again repeats them")
    return _run(todo, options, arguments, where)


def _parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("suites", nargs="*", default=[], metavar="SUITE", help=f"{', '.join(SUITES)}; left out: all of them")
    parser.add_argument(
        "--presets",
        nargs="+",
        default=["tiny", "small", "base"],
        help="presets of tokenizers and transformers, by name or path",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="CLASS",
        help=f"measure published autoencoders too: {', '.join(PEERS)}; without a class the first two",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="left out: the GPU if there is one")
    share(parser, "--precision", nargs="+", default=["auto"], choices=("auto", "bf16", "fp32"))
    parser.add_argument("--compile", action="store_true", help="measure ours again with repeated blocks compiled")
    parser.add_argument("--graphs", action="store_true", help="measure the transformer again as CUDA graphs")
    share(parser, "--ratios", default=[4, 8, 16])
    share(parser, "--frames", help="frames of the transformer's clips")
    parser.add_argument("--clip-sizes", nargs="+", help="FRAMESxHEIGHTxWIDTH of the tokenizer's; left out: by device")
    share(parser, "--train-batch-size", default=None, help="clips in a training step; left out: by preset and device")
    share(parser, "--batch-size", default=None, help="videos denoised or sampled at once; left out: by preset and device")
    parser.add_argument("--pipeline", default="checkpoints/tiny-video", help="folder of the pipeline that samples")
    help = "sample with a tiny decoder too: that of a folder, or without one the pipeline's own"
    parser.add_argument("--tiny-decoder", **{**TINY_DECODER, "help": help})
    parser.add_argument(
        "--overlap", action="store_true", help="sample batches in a row too, each decoded while the next is denoised"
    )
    share(parser, "--guidance")
    parser.add_argument("--tokenizer", default="checkpoints/tiny", help="folder of the tokenizer whose latents are cached")
    share(parser, "--steps", nargs="+", default=[24, 8, 4], help="numbers of denoising steps")
    share(parser, "--videos", required=False, help="clips.jsonl that is loaded and cached; left out: generated files")
    share(parser, "--count", help="clips that are loaded and cached; more than there are come again")
    share(parser, "--rounds")
    parser.add_argument("--minutes", type=float, help="begin no case after so long, and end rounds early")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, to see that everything works")
    parser.add_argument("--again", action="store_true", help="measure what the record has too")
    parser.add_argument("--commit", help="recorded as the commit, where the files are not in git")
    share(parser, "--record", "--note")
    return parser


def _options(arguments: argparse.Namespace) -> Options:
    """Return what is measured; raises UserError for arguments that cannot be meant."""
    if unknown := [name for name in arguments.suites if name not in SUITES]:
        raise UserError(f"suites {', '.join(unknown)}: use one of {', '.join(SUITES)}")
    check_at_least_one(arguments, "rounds", "train_batch_size", "batch_size", "count")
    check_writable("--record", arguments.record, appended=True)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU was found; use cpu")
    device = torch.device(arguments.device) if arguments.device else best_device()
    if arguments.graphs:
        check_graphs(device)
    peers = [] if arguments.peers is None else arguments.peers or list(PEERS)[:2]
    return Options(
        device=device,
        precisions=cast(tuple[Chosen, ...], tuple(dict.fromkeys(choose_precision(p, device) for p in arguments.precision))),
        presets=tuple(arguments.presets),
        compiled=(False, True) if arguments.compile else (False,),
        graphs=(False, True) if arguments.graphs else (False,),
        ratios=tuple(dict.fromkeys(arguments.ratios)),
        frames=arguments.frames,
        clip_sizes=tuple(arguments.clip_sizes) if arguments.clip_sizes else None,
        train_batch_size=arguments.train_batch_size,
        batch_size=arguments.batch_size,
        peers=tuple(peers),
        pipeline=arguments.pipeline,
        tiny_decoder=arguments.tiny_decoder,
        overlap=arguments.overlap,
        guidance=arguments.guidance,
        tokenizer=arguments.tokenizer,
        videos=arguments.videos,
        steps=tuple(arguments.steps),
        count=arguments.count,
        quick=arguments.quick,
    )


def _run(groups: Sequence[Group], options: Options, arguments: argparse.Namespace, where: dict[str, Any]) -> int:
    until = None if arguments.minutes is None else time.perf_counter() + 60 * arguments.minutes
    if not groups:
        return 0
    ceilings = _ceilings(options)
    print(ceilings_text(ceilings), flush=True)
    bad = left = 0
    for group in groups:
        if until is not None and time.perf_counter() > until:
            left += len(group.settings)
            continue
        lines = measure(group, options.device, arguments.rounds, ceilings, until)
        left += len(group.settings) - len(lines)
        for line in lines:
            bad += "error" in line
            print(line_text(line), flush=True)
            if arguments.record:
                note = {"note": arguments.note} if arguments.note else {}
                append_json(arguments.record, {**line, **note, **where})
    if left:
        more = "the same command continues" if arguments.record else "with --record the same command would continue"
        print(f"{left} cases were left out after {arguments.minutes:g} minutes; {more}")
    return int(bad + left > 0)


def _ceilings(options: Options) -> Ceilings:
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder, "video.mp4")
        data.write_file(video, "256p", 50 if options.quick else 500, data.KEY_EVERY[0])
        every = dict.fromkeys((*options.precisions, *(() if options.quick else ("fp32", "bf16"))))
        return measure_ceilings(options.device, cast(Any, tuple(every)), video)


def ceilings_text(ceilings: Ceilings) -> str:
    """Return the machine's limits in one line."""
    values = asdict(ceilings)
    products, convolutions = (
        ", ".join(f"{name} {value:.4g}" for name, value in values[f"{kind}_tflops"].items())
        for kind in ("product", "convolution")
    )
    return (
        f"limits: products {products} TFLOP/s; convolutions {convolutions} TFLOP/s; "
        f"copies {ceilings.copy_gb_per_second:.4g} GB/s; decoding {ceilings.decoder_frames_per_second or 0:.0f} frames/s"
    )


def line_text(line: dict[str, Any]) -> str:
    """Return a case's figures in one line of text."""
    return f"{line['suite']}: {_words(line['settings'])}: {'; '.join(_parts(line))}"


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {'x'.join(map(str, value)) if isinstance(value, list) else value}" for key, value in settings.items()
    )


def _parts(line: dict[str, Any]) -> Iterator[str]:
    if "error" in line:
        yield line["error"]
        return
    low, high = line["quartiles"]
    yield f"{line['seconds']:.4g} s ({low:.4g} to {high:.4g}), {line['count'] / line['seconds']:.4g}/s"
    if "share_of_limit" in line:
        yield f"{line['tflops']:.4g} TFLOP/s, {line['share_of_limit']:.0%} of {line['limit']}s"
    if "peak_mib" in line:
        yield f"{line['peak_mib']:.0f} MiB"
    if "speedup" in line:
        yield f"{line['speedup']:.2f} times {_words(line['baseline'])}"


if __name__ == "__main__":
    raise SystemExit(run_main(main))
