"""Measure the speed of caching latents against decoding and encoding alone.

The weights do not matter: any tokenizer of the intended size will do. The parts are measured in turns, in one process and its
decoding workers (run.workers), by the clock and in CPU seconds, which are the better measure while other programs run.
"""

import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from promag.data.datasets import open_dataset
from promag.diffusion.config import DiffusionConfig
from promag.diffusion.latent_cache import LatentDataset, LatentFingerprint, write_latents
from promag.evaluation.speed.timing import measure_in_turns
from promag.pipelines.build import encoder
from promag.scripts._options import share
from promag.tokenizer.checkpoint import load_tokenizer
from promag.training.command_line import Parser, run_main
from promag.training.precision import choose_precision
from promag.training.processes import processes
from promag.training.run import append_result

BATCH = 8


def main(argv: Sequence[str]) -> int:
    """Print frames per second of each part; with --record append them as a JSON line."""
    parser = Parser(__doc__)
    share(parser, "--count", help="clips that are cached in each round")
    share(parser, "--rounds", default=3)
    share(parser, "--record")
    arguments, config = parser.parse_with_config(DiffusionConfig, argv)

    load, data = os.getloadavg()[0], config.data
    source = open_dataset(data.train, "train", data.frames, data.size, arguments.count)
    clips, count = _Videos(source), min(arguments.count, len(source))
    device: Any = processes().device
    precision = choose_precision(config.precision, device)
    encode = encoder(load_tokenizer(config.tokenizer), device, precision)
    ready = torch.stack([source.fixed(i % count)["video"] for i in range(BATCH)])

    def decode_alone() -> None:
        for _ in DataLoader(Subset(clips, range(count)), BATCH, num_workers=config.run.workers):
            pass

    def encode_alone() -> None:
        for _ in range(count // BATCH):
            encode(ready, config.ratios)

    def cache() -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_latents(_caches(config, Path(folder)), count, source, encode, BATCH, config.run.workers)

    calls = {"decode": decode_alone, "encode": encode_alone, "cache": cache}
    frames = {"decode": count, "encode": count // BATCH * BATCH, "cache": count}
    record: dict[str, Any] = {}
    measured = measure_in_turns(calls, arguments.rounds, _clocks)
    for i, clock in enumerate(("second", "cpu_second")):
        rates = {name: float(frames[name] * data.frames / seconds[i]) for name, seconds in measured.items()}
        in_turn = 1 / (1 / rates["decode"] + 1 / rates["encode"])
        record |= {f"{name}_frames_per_{clock}": rate for name, rate in rates.items()}
        record[f"cache_against_both_in_turn_{clock}"] = rates["cache"] / in_turn
    record["read_milliseconds"] = _read_milliseconds(config, source, encode, count)
    print("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
    if arguments.record:
        protocol = (
            f"{count} clips of {data.frames} frames at {data.size}x{data.size}, ratios {list(config.ratios)}, {precision}, "
            f"batches of {BATCH}, {config.run.workers} decoding workers; decoding alone, encoding ready clips alone, and "
            f"caching (decoding, encoding, writing {data.dtype} shards): medians of {arguments.rounds} rounds in turns; "
            "reading cached latents in random order: median"
        )
        kind = "generated clips" if data.train == "synthetic" else "video files"
        note = {"load_average_before": round(load, 2)}  # above 0: other programs were running
        append_result(arguments.record, {"what": "caching latents", "clips": kind, "protocol": protocol, **note, **record})
    return 0


class _Videos(torch.utils.data.Dataset):
    """The pixels of clips, as caching reads them."""

    def __init__(self, clips: Any):
        self.clips = clips

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.clips.fixed(index)["video"]


def _caches(config: DiffusionConfig, folder: Path) -> dict[Path, LatentFingerprint]:
    size, data = config.data.size, config.data
    return {
        folder / f"{ratio}x": LatentFingerprint("any", "any", ratio, data.frames, size, size, data.dtype, data.shard_size)
        for ratio in config.ratios
    }


def _clocks() -> np.ndarray:
    """Return the seconds of the clock, and of the CPU: this process's and its ended children's."""
    return np.array([time.perf_counter(), _cpu_seconds()])


def _cpu_seconds() -> float:
    """Return CPU seconds to the microsecond; os.times counts in hundredths."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _read_milliseconds(config: DiffusionConfig, source: Any, encode: Any, count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        place = write_latents(_caches(config, Path(folder)), count, source, encode, BATCH)[0]
        cached, order = LatentDataset(place), torch.randperm(count).tolist()
        times = []
        for clip in order:
            started = time.perf_counter()
            cached.fixed(clip)
            times.append(1000 * (time.perf_counter() - started))
        return median(times)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
