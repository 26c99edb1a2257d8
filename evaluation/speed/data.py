"""Suite `data`: reading clips, loading batches and caching latents against the decoder alone, and memory over many clips.

Files are H.264, 25 frames/s, of a textured picture that moves; readers and the decoder alone run on one thread. Clips of an
index may be loaded and cached in their place.
"""

import functools
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from promag.data.clip_index import Clip, save_clips
from promag.data.clips import prepare
from promag.data.datasets import ClipDataset, load_index
from promag.data.stream import TrainingStream
from promag.data.video import write_video
from promag.data.video.decord_reader import read_with_decord
from promag.data.video.reader import has_decord, read_with_pyav
from promag.diffusion.latent_cache import Encode, LatentFingerprint, write_latents
from promag.pipelines.build import clip_encoder
from promag.tokenizer.checkpoint import load_tokenizer
from promag.training.precision import Chosen

from .cases import Group, Job, Options
from .ceilings import decode_alone
from .timing import MIB, resident

CLIP = 17  # frames that are read at once
BATCH = 8  # clips that are loaded, and encoded, at once
FILES = {"64p": (64, 64), "256p": (256, 456), "720p": (720, 1280)}
READ = ("256p", "720p")
KEY_EVERY = (12, 250)
WORKERS = (0, 1, 2)
ALONE = "the decoder alone"


def groups(options: Options) -> list[Group]:
    """Return groups for readers by file, for loading, for caching by number of workers, and for memory."""
    names, every = (("256p",), KEY_EVERY[:1]) if options.quick else (READ, KEY_EVERY)
    reading = [_reading(name, key_every, options) for name in names for key_every in every]
    caching = [_caching(workers, options.precisions[0], options) for workers in WORKERS]
    return [_loading(options), *caching, *reading, *_memory(options)]


def moving(frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Yield a textured picture that moves, in chunks: uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (height // 8 + 64, width // 8 + 64, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    for frame in range(frames):
        top, left = frame % 256, 2 * frame % 256
        yield texture[None, top : top + height, left : left + width]


def write_file(path: Path, name: str, frames: int, key_every: int) -> None:
    """Write such a video in one of FILES' sizes."""
    write_video(path, moving(frames, *FILES[name]), 25, crf=23, key_every=key_every)


# -- reading ---------------------------------------------------------------------------------------------------------


def _reading(name: str, key_every: int, options: Options) -> Group:
    readers: dict[str, Callable[[Path, list[int]], np.ndarray]] = {"pyav": read_with_pyav}
    if has_decord():
        readers["decord"] = read_with_decord
    frames = 100 if options.quick else 500
    file = f"{name}, a key frame every {key_every}"
    common = {"part": "reading", "file": file, "frames": CLIP}
    rng = np.random.default_rng(0)
    count = 2 if options.quick else 20
    starts = rng.integers(frames - CLIP, size=count).tolist()
    orders = {
        "in order": [list(range(k * CLIP, (k + 1) * CLIP)) for k in range(min(count, frames // CLIP))],
        "random clips": [list(range(start, start + CLIP)) for start in starts],
        "scattered frames": [sorted(rng.choice(frames, CLIP, replace=False).tolist()) for _ in range(max(2, count // 4))],
    }
    cases = [(reader, order) for reader in readers for order in orders]

    def build() -> Sequence[Job]:
        folder = tempfile.TemporaryDirectory()
        path = Path(folder.name, "video.mp4")
        write_file(path, name, frames, key_every)

        def read(reader: str, order: str) -> Callable[[], None]:
            def call(folder: Any = folder) -> None:  # the folder lives as long as the call
                for indices in orders[order]:
                    readers[reader](path, indices)

            return call

        return [
            Job(lambda: decode_alone(path), frames),
            *(Job(read(reader, order), CLIP * len(orders[order])) for reader, order in cases),
        ]

    settings = [{**common, "reader": ALONE, "order": "whole file"}]
    settings += [{**common, "reader": reader, "order": order} for reader, order in cases]
    return Group("data", settings, build, memory=False)


# -- loading and caching ---------------------------------------------------------------------------------------------


class _Videos(torch.utils.data.Dataset):
    """The pixels of clips, as caching reads them."""

    def __init__(self, clips: Any):
        self.clips = clips

    def __getitem__(self, index: int) -> Tensor:
        return self.clips.fixed(index)["video"]


class _Source:
    """`count` clips of an index: that of `videos`, or one of generated files in a folder that lives as long as this."""

    def __init__(self, count: int, frames: int, size: int, file: str = "256p", videos: str | None = None):
        self.folder = tempfile.TemporaryDirectory()
        clips: Sequence[Clip] = load_index(videos) if videos else self._generated(min(count, BATCH), frames, file)
        clips = ClipDataset(clips, frames, size).clips  # those that are long enough
        index = Path(self.folder.name, "all.jsonl")
        save_clips(index, [clips[number % len(clips)] for number in range(count)])
        self.paths = list(dict.fromkeys(clips[number].path for number in range(min(count, len(clips)))))
        self.count, self.frames, self.size = count, frames, size
        self.clips: Any = ClipDataset(load_index(index), frames, size)

    def _generated(self, count: int, frames: int, file: str) -> Sequence[Clip]:
        paths = [Path(self.folder.name, f"{number}.mp4") for number in range(count)]
        for path in paths:
            write_file(path, file, frames, KEY_EVERY[0])
        return prepare([(str(path), "a texture") for path in paths], progress=False).clips

    def load(self, workers: int) -> None:
        """Load all clips in batches."""
        for _ in DataLoader(Subset(_Videos(self.clips), range(self.count)), BATCH, num_workers=workers):
            pass

    def cache(self, ratios: Sequence[int], encode: Encode, workers: int) -> None:
        """Cache the latents of all clips in a folder that is removed then."""
        with tempfile.TemporaryDirectory() as folder:
            shape = (self.frames, self.size, self.size)
            caches = {Path(folder, f"{r}x"): LatentFingerprint("any", "any", r, *shape, "bfloat16", 64) for r in ratios}
            write_latents(caches, self.count, self.clips, encode, BATCH, workers)


def _file(options: Options) -> str:
    return Path(options.videos).stem if options.videos else "256p"


def _loading(options: Options) -> Group:
    shape = [3, CLIP, 128, 128]

    def build() -> Sequence[Job]:
        source = _Source(options.count, CLIP, shape[-1], videos=options.videos)
        alone = Job(lambda: decode_alone(*source.paths), decode_alone(*source.paths))
        return [alone, *(Job(lambda w=workers: source.load(w), CLIP * source.count) for workers in WORKERS)]

    common = {"part": "loading", "file": _file(options), "shape": shape, "clips": options.count}
    settings = [{**common, "reader": ALONE}, *({**common, "reader": "loader", "workers": workers} for workers in WORKERS)]
    return Group("data", settings, build, rank=0, memory=False)


class WatchedEncoder:
    """An encoder of which it is noted when the device begins and ends each batch."""

    def __init__(self, encode: Encode, device: torch.device):
        self.encode, self.device = encode, device
        self.batches: list[tuple[Any, Any]] = []  # begin and end: events of a GPU, seconds of a CPU

    def __call__(self, x: Tensor, ratios: Sequence[int]) -> Sequence[Tensor]:
        """Encode a batch."""
        begin = self._now()
        latents = self.encode(x, ratios)
        self.batches.append((begin, self._now()))
        return latents

    def idle(self) -> float:
        """Return the share of the time from the first batch's begin to the last one's end without a batch; forget them."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        gaps = [self._between(end, begin) for (_, end), (begin, _) in itertools.pairwise(self.batches)]
        share = sum(gaps) / self._between(self.batches[0][0], self.batches[-1][1])
        self.batches.clear()
        return share

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) if self.device.type == "cuda" else second - first


def _caching(workers: int, precision: Chosen, options: Options) -> Group:
    frames, size, count = options.frames, 64, max(BATCH, options.count // BATCH * BATCH)

    def build() -> Sequence[Job]:
        source, device, idle = _Source(count, frames, size, videos=options.videos), options.device, []
        encode = WatchedEncoder(clip_encoder(load_tokenizer(options.tokenizer), device, precision), device)
        ready = torch.stack([source.clips.fixed(i)["video"] for i in range(BATCH)])

        def encode_alone() -> None:
            for _ in range(count // BATCH):
                encode.encode(ready, options.ratios)

        def cache() -> None:
            source.cache(options.ratios, encode, workers)
            idle.append(round(encode.idle(), 4))

        steps = (lambda: source.load(workers), encode_alone, cache)
        facts = ({}, {}, {"encoder_idle_in_each_round": idle})
        return [Job(call, frames * count, None, own) for call, own in zip(steps, facts, strict=True)]

    name = "/".join(options.tokenizer.rstrip("/").split("/")[-2:])
    common = {"part": "caching", "model": name, "file": _file(options), "shape": [3, frames, size, size], "clips": count}
    common |= {"workers": workers, "ratios": list(options.ratios), "precision": precision}
    settings = [{**common, "step": step} for step in ("decode", "encode", "cache")]
    return Group("data", settings, build, rank=1, memory=False)


# -- memory ----------------------------------------------------------------------------------------------------------


def _held() -> int:
    """Return the MiB that this process and those that it started for loading hold."""
    workers = [child.pid for child in multiprocessing.active_children()]
    return (resident() + sum(resident(process=pid) for pid in workers if pid)) // MIB


def _memory(options: Options) -> list[Group]:
    """Return cases that read clips in this process, train on them and cache them, with the memory after each round of them.

    Two workers load for training and for caching. Those of the training stream live through all rounds.
    """
    per_round = 32 if options.quick else 2000
    build = {"reader": _read_on, "training stream": _stream_on, "caching": _cache_on}
    shape = [3, CLIP, 64, 64]
    common = {"part": "memory", "file": "64p", "shape": shape, "clips": per_round}
    return [
        Group("data", [{**common, "step": step}], functools.partial(make, per_round), rank=3, memory=False)
        for step, make in build.items()
    ]


def _noted(count: int, use: Callable[[], Any], hold: Callable[[], int] = _held) -> Sequence[Job]:
    """Return the job of a round, which notes the memory that is held at its end."""
    after: list[int] = []

    def call() -> None:
        use()
        after.append(hold())

    return [Job(call, CLIP * count, None, {"resident_mib_after_each_round": after})]


def _read_on(count: int) -> Sequence[Job]:
    source = _Source(count, CLIP, 64, "64p")

    def read() -> None:
        for number in range(count):
            source.clips.fixed(number)

    return _noted(count, read)


def _stream_on(count: int) -> Sequence[Job]:
    source = _Source(count, CLIP, 64, "64p")
    batches = iter(DataLoader(TrainingStream(source.clips, 0, BATCH, 0, 1), batch_size=None, num_workers=WORKERS[-1]))

    def train() -> None:
        for _ in range(source.count // BATCH):
            next(batches)

    return _noted(count, train)


def _cache_on(count: int) -> Sequence[Job]:
    source = _Source(count, CLIP, 64, "64p")
    held: list[int] = []

    def encode(x: Tensor, ratios: Sequence[int]) -> Sequence[Tensor]:
        held.append(_held())
        return [x[:, :, ::ratio, ::8, ::8] for ratio in ratios]

    return _noted(count, lambda: source.cache((16,), encode, WORKERS[-1]), lambda: held[-1])
