"""Suite `data`: reading clips, loading batches and caching latents against the decoder alone, and memory over many clips.

Files are H.264, 25 frames/s, of a textured picture that moves; readers and the decoder alone run on one thread.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from promag.data.clips import prepare
from promag.data.datasets import ClipDataset
from promag.data.video import write_video
from promag.data.video.container import open_container
from promag.data.video.decord_reader import read_with_decord
from promag.data.video.reader import has_decord, read_with_pyav
from promag.diffusion.latent_cache import LatentFingerprint, write_latents
from promag.pipelines.build import encoder
from promag.tokenizer.checkpoint import load_tokenizer
from promag.training.precision import Chosen

from .cases import Group, Job, Options
from .timing import MIB, resident

CLIP = 17  # frames that are read at once
BATCH = 8  # clips that are loaded, and encoded, at once
FILES = {"256p": (256, 456), "720p": (720, 1280)}
KEY_EVERY = (12, 250)
WORKERS = (0, 1, 2)
ALONE = "the decoder alone"


def groups(options: Options) -> list[Group]:
    """Return groups for readers by file, for loading, for caching by number of workers, and for memory."""
    names, every = (("256p",), KEY_EVERY[:1]) if options.quick else (tuple(FILES), KEY_EVERY)
    reading = [_reading(name, key_every, options) for name in names for key_every in every]
    caching = [_caching(workers, options.precisions[0], options) for workers in WORKERS]
    return [_loading(options), *caching, *reading, _memory(options)]


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


def decode_alone(*paths: Path) -> None:
    """Decode whole files on one thread, without making pictures of the frames."""
    for path in paths:
        with open_container(path) as video:
            for _ in video.frames():
                pass


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

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.clips.fixed(index)["video"]


class _Source:
    """Video files of CLIP frames and more in a folder that lives as long as this, and the clips of them."""

    def __init__(self, count: int, frames: int, size: int):
        self.folder = tempfile.TemporaryDirectory()
        self.paths = [Path(self.folder.name, f"{number}.mp4") for number in range(min(count, BATCH))]
        for path in self.paths:
            write_file(path, "256p", frames, KEY_EVERY[0])
        clips = prepare([(str(path), "a texture") for path in self.paths], progress=False).clips
        self.count, self.frames = count, frames
        self.clips = ClipDataset([clips[number % len(clips)] for number in range(count)], frames, size)

    def load(self, workers: int) -> None:
        """Load all clips in batches."""
        for _ in DataLoader(Subset(_Videos(self.clips), range(self.count)), BATCH, num_workers=workers):
            pass


def _loading(options: Options) -> Group:
    shape = [3, CLIP, 128, 128]

    def build() -> Sequence[Job]:
        source = _Source(options.count, CLIP, shape[-1])
        alone = Job(lambda: decode_alone(*source.paths), CLIP * len(source.paths))
        return [alone, *(Job(lambda w=workers: source.load(w), CLIP * source.count) for workers in WORKERS)]

    common = {"part": "loading", "file": "256p", "shape": shape, "clips": options.count}
    settings = [{**common, "reader": ALONE}, *({**common, "reader": "loader", "workers": workers} for workers in WORKERS)]
    return Group("data", settings, build, rank=0, memory=False)


def _caching(workers: int, precision: Chosen, options: Options) -> Group:
    frames, size, count = options.frames, 64, options.count // BATCH * BATCH

    def build() -> Sequence[Job]:
        source, device = _Source(count, frames, size), options.device
        encode = encoder(load_tokenizer(options.tokenizer), device, precision)
        ready = torch.stack([source.clips.fixed(i)["video"] for i in range(BATCH)])

        def encode_alone() -> None:
            for _ in range(count // BATCH):
                encode(ready, options.ratios)

        def cache() -> None:
            with tempfile.TemporaryDirectory() as folder:
                fingerprints = {
                    Path(folder, f"{ratio}x"): LatentFingerprint("any", "any", ratio, frames, size, size, "bfloat16", 64)
                    for ratio in options.ratios
                }
                write_latents(fingerprints, count, source.clips, encode, BATCH, workers)

        calls = (lambda: source.load(workers), encode_alone, cache)
        return [Job(call, frames * count) for call in calls]

    name = "/".join(options.tokenizer.rstrip("/").split("/")[-2:])
    common = {"part": "caching", "model": name, "shape": [3, frames, size, size], "clips": count, "workers": workers}
    common |= {"ratios": list(options.ratios), "precision": precision}
    settings = [{**common, "step": step} for step in ("decode", "encode", "cache")]
    return Group("data", settings, build, rank=1, memory=False)


def _memory(options: Options) -> Group:
    """Return one case: clips read one after another in this process, and the memory it holds after each round of them."""
    per_round = 20 if options.quick else 2000

    def build() -> Sequence[Job]:
        source = _Source(BATCH, CLIP, 64)
        after: list[int] = []

        def read() -> None:
            for number in range(per_round):
                source.clips.fixed(number % BATCH)
            after.append(resident() // MIB)

        return [Job(read, CLIP * per_round, None, {"resident_mib_after_each_round": after})]

    settings = [{"part": "memory", "file": "256p", "shape": [3, CLIP, 64, 64], "clips": per_round}]
    return Group("data", settings, build, rank=3, memory=False)
