"""The run directory: resolved configuration, atomic checkpoints, metrics, and the signals that end a run early.

run/config.yaml                 the resolved configuration of the first start
run/data.json                   fingerprints and hashes of the training data
run/machines.txt                the machines that trained it
run/NAME/step-00001000/         a checkpoint of stage NAME: safetensors and state.json
run/NAME/metrics.jsonl          one line per logged or validated step
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import UserError, complete, load_yaml, plain, save_yaml
from .files import append_json, finish_replacing, read_json_lines, replaced_folder, write_atomically

MACHINES = "machines.txt"
DATA = "data.json"
INSTRUCTIONS = {  # by flag in /proc/cpuinfo, the widest first
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 with bf16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def open_run(
    path: str | os.PathLike,
    config: Any,
    may_change: Sequence[str] = (),
    write: bool = True,
    made_from_data: Sequence[str] = (),
) -> Path:
    """Create the run directory, or reopen it if it was started with the same configuration.

    A run that has saved nothing it trained, such as one that ended at a mistake, takes other settings and other data.

    Args:
        path: the run directory.
        config: the resolved configuration.
        may_change: dotted keys (or their prefixes) that do not affect what the model learns.
        write: False only checks the directory.
        made_from_data: files that such a run makes anew, beside the record of the data.

    Raises UserError naming the keys that differ.
    """
    path = Path(path)
    config_file = path / "config.yaml"
    if config_file.exists():
        old, new = _flat(read_config(path, type(config))), _flat(plain(config))
        differs = [
            f"{key} is {old.get(key)!r} there, {new.get(key)!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not any(key == k or key.startswith(k + ".") for k in may_change)
        ]
        trained = _has_trained(path)
        if differs and trained:
            raise UserError(f"run {path} was started with other settings ({'; '.join(differs[:4])}): use another --output-dir")
        if write and not trained:
            for name in (DATA, *made_from_data):
                (path / name).unlink(missing_ok=True)
        if write and differs:
            save_yaml(config_file, config)
    elif write:
        path.mkdir(parents=True, exist_ok=True)
        save_yaml(config_file, config)
    if write and (machine := _machine()) not in (before := machines_of(path)):
        write_atomically(path / MACHINES, "".join(f"{name}\n" for name in (*before, machine)))
    return path


def read_config(run: Path, kind: type) -> dict[str, Any]:
    """Return the plain configuration of a run; settings that are newer than the run have their defaults there."""
    return complete(kind, load_yaml(run / "config.yaml"))


def _has_trained(run: Path) -> bool:
    """Tell whether a run directory holds a checkpoint of some stage, or a model."""
    return any(any(run.glob(f"*/{name}")) for name in ("step-*", "done.json", "config.json", "model_index.json"))


def record_data(run: Path, data: Mapping[str, Any]) -> None:
    """Record the data that a run is trained on, or check it against the record of an earlier call.

    `data` maps names to hashes, or to mappings of them: fingerprints of caches, digests of clips, the vocabulary. New names
    are added to the record. Call this on one process only. Raises UserError naming what differs from the record.
    """
    before, now = recorded_data(run), _flat(data)
    differs = [key.replace(".", " ") for key in before if key in now and now[key] != before[key]]
    if differs:
        more = f" and {len(differs) - 4} more" if len(differs) > 4 else ""
        verb = "differs" if len(differs) == 1 else "differ"
        raise UserError(
            f"run {run} was trained on other data: {', '.join(differs[:4])}{more} {verb}; give it the data that it was started "
            "with, or use another --output-dir"
        )
    if now.keys() - before.keys():
        write_atomically(run / DATA, json.dumps({**before, **now}, indent=1, sort_keys=True) + "\n")


def recorded_data(run: Path) -> dict[str, Any]:
    """Return what `record_data` has recorded, by dotted names."""
    file = run / DATA
    return _flat(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def machines_of(run: Path) -> list[str]:
    """Return the machines that a run was trained on, in order of first use; empty if none were recorded."""
    return (run / MACHINES).read_text(encoding="utf-8").splitlines() if (run / MACHINES).exists() else []


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


# -- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, step: int, groups: Iterable[tuple[str, Mapping[str, Tensor]]], meta: Mapping[str, Any]
) -> Path:
    """Write `folder/step-N` atomically, with one safetensors file per named group and the JSON `meta`.

    An existing checkpoint of that step stays until the new one is complete. A folder of that name that is no checkpoint of
    this run is renamed and named on stderr. Raises OSError naming a path where the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    final = folder / _name(step)
    if final.exists() and final not in checkpoints(folder):
        other = next(name for k in itertools.count(1) if not (name := final.with_name(f"{final.name}.other{k}")).exists())
        print(f"{final}: is no checkpoint of this run; renamed to {other.name}", file=sys.stderr)
        final.rename(other)
    with replaced_folder(final) as aside:
        names = []
        for name, tensors in groups:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, aside / f"{name}.safetensors")
            names.append(name)
            del tensors  # the next group is gathered before the loop would let go of this one
        (aside / "state.json").write_text(json.dumps({"step": step, "groups": names, **meta}), encoding="utf-8")
    return final


def sweep(folder: Path) -> None:
    """Remove what saves and deletions of killed processes left beside the checkpoints in `folder`."""
    ours = r"\.step-(new-|old-)?\d{8,}(\.new|\.old|\.\d+)?"  # those of earlier versions among them
    leftovers = [path for path in folder.glob(".step-*") if re.fullmatch(ours, path.name)]
    for leftover in leftovers:
        if leftover.suffix == ".old":
            finish_replacing(folder / leftover.name.removeprefix(".").removesuffix(".old"))
    for leftover in leftovers:
        if leftover.exists():
            _remove(leftover)


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read on access."""

    def __init__(self, path: Path):
        self._file = safe_open(path, "pt")
        self._names = tuple(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor onto the CPU."""
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_checkpoint(path: Path) -> tuple[dict[str, TensorFile], dict[str, Any]]:
    """Return the tensor groups of a checkpoint folder, opened, and its metadata; raises OSError if it is damaged."""
    try:
        groups = {file.stem: TensorFile(file) for file in sorted(path.glob("*.safetensors"))}
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or "step" not in meta:
            raise ValueError("state.json states no step")
    except (SafetensorError, ValueError) as error:
        raise OSError(f"checkpoint {path}: damaged: {error}") from None
    if missing := [name for name in meta.pop("groups", ()) if name not in groups]:
        raise OSError(f"checkpoint {path}: damaged: {missing[0]}.safetensors is missing")
    return groups, meta


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is not damaged; None if the folder has no checkpoints.

    Each damaged checkpoint is named on stderr. Raises UserError if all are damaged.
    """
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            load_checkpoint(path)
            return path
        except OSError as error:
            print(f"{error}; falling back to the checkpoint before it", file=sys.stderr)
    if paths:
        raise UserError(f"{folder}: all checkpoints are damaged; remove them to restart this stage")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first.

    Folders of other names are ignored, and so are copies under another step's name and copies without state.json.
    """
    return sorted((path for path in folder.glob("step-*") if _is_own(path)), key=step_of)


def thin_out(folder: Path, step: int, keep_last: int, keep_every: int | None = None) -> None:
    """Delete the checkpoints up to `step`, except for the newest `keep_last` and those at multiples of `keep_every` steps.

    Later ones, which a run that fell back from a damaged one has still to replace, do not count.
    """
    for old in [path for path in checkpoints(folder) if step_of(path) <= step][:-keep_last]:
        if keep_every is None or step_of(old) % keep_every:
            _remove(old.rename(old.with_name(f".{old.name}")))  # a kill leaves no partial checkpoint


def _name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def _is_own(path: Path) -> bool:
    """Tell whether a folder was saved under this name; what `load_checkpoint` calls damaged counts too."""
    if not re.fullmatch(r"step-\d{8,}", path.name) or path.name != _name(step_of(path)):
        return False
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:
        return True
    return not isinstance(state, dict) or state.get("step", step_of(path)) == step_of(path)


def _remove(path: Path) -> None:
    path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)


# -- metrics and signals ---------------------------------------------------------------------------------------------


def cut_metrics(path: Path, step: int) -> None:
    """Drop damaged lines and the lines after `step`, which a resumed run writes again."""
    if path.exists():
        records = [record for record in read_json_lines(path) if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def read_curve(folder: Path, key: str) -> list[tuple[float, float]]:
    """Return (step, value) of each line of a stage's metrics that has the key; raises UserError if none has it."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{folder}: has no metrics.jsonl; give the folder of a stage")
    records = read_json_lines(file)
    points = [(record["step"], record[key]) for record in records if key in record]
    if not points:
        metrics = sorted({name for record in records for name in record} - {"step"})
        raise UserError(f"{file}: no metric {key!r}; use one of {', '.join(metrics)}")
    return points


class StopSignal:
    """Context in which SIGTERM and SIGINT set `received` instead of ending the process; a second SIGINT ends it.

    While `saving` is set no signal ends it. Whoever acts on the signal sets `handled`. A signal that was not handled is raised
    again when the context ends.
    """

    def __enter__(self) -> "StopSignal":
        """Install the handlers."""
        self.received: str | None = None
        self.handled = self.saving = False
        self._old = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _receive(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT and not self.saving:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self.received and not self.handled and exception is None:
            signal.raise_signal(signal.Signals[self.received])


# -- provenance ------------------------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """Return the provenance of a published result: commit, machine and package versions."""
    packages = ("torch", "diffusers", "transformers", "accelerate")
    return {
        "commit": commit(Path(__file__).resolve().parent),
        "machine": _machine(),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
    }


def commit(folder: Path) -> str:
    """Return the commit checked out around a folder, with +changes where files differ from it, records of results left out."""
    if not (name := _git(folder, "rev-parse", "--short=12", "HEAD")):
        return "unknown"
    changed = _git(folder, "status", "--porcelain", "-uno", "--", ":(top)", ":(top,exclude)docs/results")
    return f"{name}+changes" if changed else name


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    return f"{os.cpu_count()} cores, {name_cpu(cpuinfo)}"


def name_cpu(cpuinfo: str) -> str:
    """Return a CPU's name, and the widest of the instructions that decide its speed, from the text of /proc/cpuinfo."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    values = {key.strip(): value.strip() for key, _, value in lines}
    flags = values.get("flags", "").split()
    widest = [label for flag, label in INSTRUCTIONS.items() if flag in flags][:1]
    return ", ".join([values.get("model name", "unknown CPU"), *widest])


def append_result(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Append a result and its provenance as one JSON line."""
    append_json(path, {**record, **provenance()})
