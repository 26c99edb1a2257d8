"""Damaged parts of saved pipelines and caches, and the loaders that must name the damaged file or its folder."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from promag import ProMAGPipeline, load_pipeline, load_tokenizer
from promag.diffusion.families import load_transformer
from promag.diffusion.latent_cache import LatentDataset, LatentFingerprint, write_latents
from promag.diffusion.text import load_frozen
from promag.diffusion.text_cache import EmbeddingCache, TextFingerprint, write_embeddings

from .odd_arguments import PROMPT
from .outcomes import Case

# What a JSON file is replaced by; None removes it.
TEXTS = (b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe{}", b"{}", b'{"a": NaN}', None)
# What the value of a JSON file's key is replaced by.
NAN = float("nan")
VALUES = (None, 5, -1, 0, 1.5, "x", "", [], {}, True, [None, None], ["promag", "x"], 10**9, NAN, ["../x", "y"], [[]])
HEADERS = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"x": 5}',
    b"\xff" * 8,
    b'{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
)
PARTS = {"text_encoder": "model", "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # stems of files
# Some damaged values are refused only by a call, whose message names them and not the file.
NAMED_BY_CALLS = ("text tokens", "scheduler Flow", "temporal ratio", "this transformer needs", "height, width, num_frames")

Damage = Callable[[Path], Any]  # changes the copy of a folder


class Trial(NamedTuple):
    """One kind of damage to a copy of a folder, and what loads it and returns tensors."""

    what: str
    damage: Damage
    load: Callable[[Path], Any]


class Pickled:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def damaged_parts(pipe: Any, scratch: Path) -> Iterator[Case]:
    """Yield every case; each works on a copy in `scratch` of what the pipeline saves, or of caches."""
    saved, caches = scratch / "saved", scratch / "caches"
    pipe.save_pretrained(saved)
    write_caches(caches, pipe)
    number = 0
    for source, trials in ((saved, pipeline_trials(saved)), (caches, cache_trials(caches, pipe))):
        for trial in trials:
            copy, number = scratch / f"copy-{number}", number + 1
            yield Case(trial.what, lambda s=source, c=copy, t=trial: _try(s, c, t), (str(scratch), *NAMED_BY_CALLS))


def _try(source: Path, copy: Path, trial: Trial) -> Any:
    shutil.copytree(source, copy)
    try:
        trial.damage(copy)
        return trial.load(copy)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
        if _mark(copy).exists():
            raise AssertionError("a pickle was loaded")


def _mark(folder: Path) -> Path:
    return folder.with_suffix(".unpickled")


# -- pipelines -------------------------------------------------------------------------------------------------------


def sample(folder: Path) -> Any:
    """Load a pipeline and sample a video."""
    return _one_step(ProMAGPipeline.from_pretrained(folder))


def sample_by_command(folder: Path) -> Any:
    """Load a pipeline as the commands do, and sample a video."""
    return _one_step(load_pipeline(folder))


def _one_step(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, num_inference_steps=1, generator=torch.Generator().manual_seed(0)).frames


def _weights(model: Any) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


LOADERS: dict[str, tuple[str, Callable[[Path], Any]]] = {  # by name: the part, and what loads it
    "load_tokenizer": ("vae", lambda folder: _weights(load_tokenizer(folder))),
    "load_transformer": ("transformer", lambda folder: _weights(load_transformer(str(folder)))),
    "load_frozen": ("text_encoder", lambda folder: _weights(load_frozen(str(folder), None, 8)[1])),
}


def pipeline_trials(saved: Path) -> Iterator[Trial]:
    """Yield ways to damage a saved pipeline: its JSON files and their keys, its tensors, pickles in their place."""
    files = sorted(path.relative_to(saved) for path in saved.rglob("*.json"))
    for file in files:
        yield from _texts(file, sample_by_command)
    for file in files:
        if file.name != "tokenizer.json":
            yield from _keys(saved, file, 3, sample)
    for file in sorted(path.relative_to(saved) for path in saved.rglob("*.safetensors")):
        yield from _tensors(file, sample)
    for part, load in LOADERS.values():
        yield from _texts(Path(part, "config.json"), load)
        yield from _tensors(Path(part, f"{PARTS[part]}.safetensors"), load)
    yield from _pickles()


def _texts(file: Path, load: Callable[[Path], Any]) -> Iterator[Trial]:
    for text in TEXTS:
        yield Trial(f"{file} is {text!r}", lambda folder, text=text: replace_text(folder / file, text), load)


def _keys(source: Path, file: Path, step: int, load: Callable[[Path], Any]) -> Iterator[Trial]:
    for place, key in enumerate(sorted(json.loads((source / file).read_text(encoding="utf-8")))):
        for value in [VALUES[(place + shift) % len(VALUES)] for shift in range(0, len(VALUES), step)]:
            yield Trial(
                f"{file}: {key} is {value!r}", lambda folder, key=key, value=value: replace_key(folder / file, key, value), load
            )
        yield Trial(f"{file}: no {key}", lambda folder, key=key: replace_key(folder / file, key), load)


def replace_text(path: Path, text: bytes | None) -> None:
    """Replace what a file contains; None removes it."""
    path.unlink()
    if text is not None:
        path.write_bytes(text)


def replace_key(path: Path, key: str, *value: Any) -> None:
    """Replace the value of a key of a JSON file; without a value the key is removed."""
    values = json.loads(path.read_text(encoding="utf-8"))
    del values[key]
    if value:
        values[key] = value[0]
    path.write_text(json.dumps(values), encoding="utf-8")


def _tensors(file: Path, load: Callable[[Path], Any]) -> Iterator[Trial]:
    damages: dict[str, Damage] = {f"cut to {size} bytes": lambda f, size=size: cut(f, size) for size in (0, 4, 8, 100, -1)}
    damages |= {f"the header {header!r}": lambda f, header=header: write_header(f, header) for header in HEADERS}
    damages |= {
        "half of it": lambda f: cut(f, f.stat().st_size // 2),
        "a header of 2^60 bytes": lambda f: f.write_bytes(struct.pack("<Q", 2**60) + f.read_bytes()[8:]),
        "a folder": lambda f: (f.unlink(), f.mkdir()),
        "nothing": lambda f: f.unlink(),
        "more bytes at its end": lambda f: f.write_bytes(f.read_bytes() + b"\0" * 40),
        "all but its first tensor": _edit(lambda t: t.pop(min(t))),
        "all but its last tensor": _edit(lambda t: t.pop(max(t))),
        "no tensors": _edit(lambda t: t.clear()),
        "NaN": _edit(lambda t: [x.fill_(NAN) for x in t.values() if x.is_floating_point()]),
        "infinities": _edit(lambda t: [x.fill_(-1 / 1e-300 / 1e-300) for x in t.values() if x.is_floating_point()]),
        "a tensor of another shape": _edit(lambda t: t.update({max(t): torch.zeros(3)})),
        "a tensor of whole numbers": _edit(lambda t: t.update({max(t): t[max(t)].to(torch.int32)})),
        "a renamed tensor": _edit(lambda t: t.update({"x": t.pop(min(t))})),
        "another tensor alone": _edit(lambda t: (t.clear(), t.update({"x": torch.zeros(2)}))),
    }
    for what, damage in damages.items():
        yield Trial(f"{file}: {what}", lambda folder, damage=damage: damage(folder / file), load)


def cut(file: Path, size: int) -> None:
    """Keep the first bytes of a file; a negative size removes so many from its end."""
    file.write_bytes(file.read_bytes()[:size])


def write_header(file: Path, header: bytes) -> None:
    """Replace a safetensors file by a header and a few zero bytes."""
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 36)


def _edit(edit: Callable[[dict[str, Tensor]], Any]) -> Damage:
    def damage(file: Path) -> None:
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def _pickles() -> Iterator[Trial]:
    for part in (*PARTS, "tokenizer", "scheduler"):
        yield Trial(f"{part} links to a folder with a pickle", lambda folder, part=part: _link(folder, part), sample)
    for part, stem in PARTS.items():
        for index in (f"{stem}.safetensors.index.json", f"{stem}.bin.index.json", "pytorch_model.bin.index.json"):
            for shard in ("../../evil.bin", "evil.bin", "../evil.bin", "../vae/x.safetensors", "x.safetensors"):
                yield Trial(
                    f"{part}/{index} names {shard}", lambda folder, place=(part, index, shard): _index(folder, *place), sample
                )
    place = ("text_encoder", "pytorch_model.bin.index.json", "../../evil.bin")
    load = LOADERS["load_frozen"][1]
    yield Trial("load_frozen of an index of pickles", lambda folder: _index(folder, *place), load)
    yield Trial("load_frozen beside a pickle", lambda folder: _write_pickle(folder, "text_encoder/pytorch_model.bin"), load)
    yield Trial(
        "load_frozen of a pickle",
        lambda folder: (
            _write_pickle(folder, "text_encoder/pytorch_model.bin"),
            (folder / "text_encoder/model.safetensors").unlink(),
        ),
        load,
    )


def _write_pickle(folder: Path, place: str) -> None:
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).write_bytes(pickle.dumps(Pickled(_mark(folder))))


def _link(folder: Path, part: str) -> None:
    aside = folder.with_name(f"{folder.name}-{part}")
    (folder / part).rename(aside)
    (folder / part).symlink_to(aside)
    _write_pickle(folder, f"{part}/pytorch_model.bin")


def _index(folder: Path, part: str, index: str, shard: str) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    names = list(load_file(file))
    file.unlink()
    _write_pickle(folder, f"{part}/{shard}")
    (folder / part / index).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}), encoding="utf-8"
    )


# -- caches ----------------------------------------------------------------------------------------------------------


class _Clips:
    def fixed(self, index: int) -> dict[str, Any]:
        return {"video": torch.full((3, 17, 8, 8), float(index)), "caption": f"disc {index}", "fps": 8.0}


def write_caches(folder: Path, pipe: Any) -> None:
    """Write a cache of latents and one of text embeddings, of five clips, or check that they lie there whole."""
    latents = LatentFingerprint("tokenizer", "clips", 16, 17, 8, 8, "float32", 2)
    write_latents({folder / "z": latents}, 5, _Clips(), lambda x, _: [x[:, :, :2, ::8, ::8] + torch.arange(3).view(3, 1, 1, 1)])
    text = TextFingerprint("encoder", "clips", 10, "float32", 2)
    write_embeddings(folder / "t", text, folder / "z", lambda: (pipe.tokenizer, pipe.text_encoder))


def read_caches(folder: Path, pipe: Any) -> list[Any]:
    """Open both caches as a training does and read them whole."""
    write_caches(folder, pipe)
    text = EmbeddingCache(folder / "t", 1)
    data, null = LatentDataset(folder / "z", 16, texts=[text]), text.null()
    return [*(data.fixed(i) for i in range(len(data))), *data.captions(), null.tokens, null.pooled, data.fps]


def cache_trials(caches: Path, pipe: Any) -> Iterator[Trial]:
    """Yield ways to damage caches: their JSON files and keys, their shards, and shards that are exchanged."""

    def load(folder: Path) -> Any:
        return read_caches(folder, pipe)

    for file in sorted(path.relative_to(caches) for path in caches.rglob("*.*")):
        if file.suffix == ".json":
            yield from _texts(file, load)
            yield from _keys(caches, file, 2, load)
        else:
            yield from _tensors(file, load)
    yield Trial("swapped shards", lambda folder: _swap(*sorted((folder / "z").glob("*.safetensors"))[:2]), load)


def _swap(one: Path, two: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
