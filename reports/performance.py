"""The tables of docs/performance.md, from recorded lines; the prose around them is written by hand.

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`. Lines of the benchmark's suites ("speed") and the older ones
that they replace ("cost", "tokenizer speed") are read alike; of the same case on the same machine the newest line counts.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from promag.evaluation.markdown import markdown_table
from promag.evaluation.speed.cases import WHAT
from promag.evaluation.speed.scale import Cluster, Model, Speed, clips_per_second, ddp_step, fsdp2_step, models_of, sent_bytes
from promag.evaluation.speed.subjects import PEERS, diffusion_preset
from promag.evaluation.speed.training import PART as TRAIN_STEP
from promag.training.config import UserError

Line = Mapping[str, Any]
NOTHING = "No line has been recorded yet."
# Older lines of the transformer name no preset but have its number of weights.
PARAMETERS = {611720096: "base", 30664736: "small", 4219808: "tiny", 4187168: "tiny"}
KINDS = {"gradient": ("transformer", "gradients"), "train_step": ("train", TRAIN_STEP)}
GPU = "NVIDIA H100 80GB HBM3"  # whose limit and MFU the scale on paper is derived from
ON_PAPER = "paper/diffusion"
LOCATED = re.compile(r"(<!-- ([a-z ]+) -->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)


# -- reading ---------------------------------------------------------------------------------------------------------


def speed_lines(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Return the cases of all lines that measured speed, the newest of each machine and settings, in the order recorded."""
    newest: dict[str, dict[str, Any]] = {}
    for line in lines:
        for case in _cases(line):
            if "error" in case:  # what failed has no figure: an older one stands
                continue
            key = repr((case["suite"], case["machine"], sorted(case["settings"].items())))
            newest.pop(key, None)
            newest[key] = case
    return list(newest.values())


def _cases(line: Line) -> Iterator[dict[str, Any]]:
    if line.get("what") == WHAT:
        yield dict(line)
    elif line.get("what") == "cost" and line.get("parameters") in PARAMETERS:
        yield from _of_cost(line)
    elif line.get("what") == "tokenizer speed":
        yield from _of_tokenizer_speed(line)


def _of_cost(line: Line) -> Iterator[dict[str, Any]]:
    """Yield the cases of an older line about the transformer: gradients and whole steps."""
    batch = re.search(r"batch (?:of )?(\d+)", line["protocol"])
    assert batch is not None
    clips, precision = int(batch[1]), "bf16" if line["protocol"].startswith("bf16") else "fp32"
    shape = [clips, 3, line["frames"], line["height"], line["width"]]
    limits = {"product_tflops": {precision: line["matmul_tflops"]}} if "matmul_tflops" in line else {}
    for row in line["rows"]:
        for kind, (suite, part) in KINDS.items():
            if f"{kind}_seconds" not in row:
                continue
            settings = {"part": part, "model": PARAMETERS[line["parameters"]], "ratio": row["ratio"], "shape": shape}
            settings |= {"precision": precision, "compiled": line.get("compiled", False)}
            case = {"suite": suite, "settings": settings, "seconds": row[f"{kind}_seconds"], "count": clips}
            case |= {"tokens": clips * row["tokens"], "speedup": row.get(f"{kind}_speedup"), "ceilings": limits}
            if f"{kind}_mfu" in row:
                case |= {"limit": "product", "share_of_limit": row[f"{kind}_mfu"]}
            yield {**case, **_origin(line)}


def _of_tokenizer_speed(line: Line) -> Iterator[dict[str, Any]]:
    for row in line["rows"]:
        for part in ("encode", "decode"):
            if f"{part}_seconds" not in row:
                continue
            settings = {"part": part, "model": PEERS.get(row["model"], row["model"]), "ratio": row["ratio"]}
            settings |= {"shape": [1, 3, row["frames"], row["height"], row["width"]], "precision": line["dtype"]}
            settings |= {"compiled": row["compiled"]}
            seconds, gflop = row[f"{part}_seconds"], row[f"{part}_gflops"]
            case = {"suite": "tokenizer", "settings": settings, "seconds": seconds, "count": row["frames"], "gflop": gflop}
            case |= {"tflops": gflop / seconds / 1e3, "peak_mib": row[f"{part}_peak_mib"], "parameters": row["parameters"]}
            yield {**case, "latent_shape": row["latent_shape"], "ceilings": {}, **_origin(line)}


def _origin(line: Line) -> dict[str, Any]:
    return {key: line[key] for key in ("commit", "machine", "versions")}


# -- tables ----------------------------------------------------------------------------------------------------------


def fill(page: str, lines: Iterable[Line]) -> str:
    """Return a page with its tables made anew from recorded lines; raises UserError for a table that is not known."""
    cases = speed_lines(lines)

    def table(match: re.Match) -> str:
        name = match[2]
        if name not in TABLES:
            raise UserError(f"table {name!r}: use one of {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[name](cases)}\n{match[4]}"

    return LOCATED.sub(table, page)


def _by_machine(cases: Sequence[Line], table: Callable[[Sequence[Line]], str]) -> str:
    """Return a table for each machine, under its name, its software and the commits that were measured."""
    parts = []
    for machine in dict.fromkeys(case["machine"] for case in cases):
        own = [case for case in cases if case["machine"] == machine]
        torch = ", ".join(sorted({case["versions"]["torch"] for case in own}))
        threads = {case["threads"] for case in own if "threads" in case and "cores" in machine}
        software = [f"PyTorch {torch}", *(f"{count} threads" for count in sorted(threads))]
        commits = ", ".join(dict.fromkeys(case["commit"] for case in own))
        parts.append(f"{machine}, {', '.join(software)} (commit {commits}):\n\n{table(own)}")
    return "\n\n".join(parts) or NOTHING


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; columns in which no row has a value are left out."""
    rows = [[_text(cell) for cell in row] for row in rows]
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    return markdown_table([heads[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _share(case: Line | None) -> str | None:
    return None if case is None or "share_of_limit" not in case else f"{case['share_of_limit']:.0%}"


def _in_convolutions(case: Line) -> str | None:
    return f"{case['operator_shares']['convolutions']:.0%}" if case.get("operator_shares") else None


def _kernels(case: Line) -> float | None:
    """Return the seconds of a GPU's kernels in one call."""
    return None if case.get("device") != "cuda" else case.get("operator_seconds")


def _size(case: Line) -> str:
    return "x".join(map(str, case["settings"]["shape"][2:]))


def _way(settings: Line) -> str:
    """Return how the transformer ran, where it did not run plainly."""
    return "".join(f", {name}" for name in ("compiled", "graphs") if settings.get(name))


def _limits(cases: Sequence[Line]) -> str:
    rows = {}
    for case in cases:
        limits = case.get("ceilings") or {}
        for kind in ("product", "convolution"):
            for precision, value in limits.get(f"{kind}_tflops", {}).items():
                rows[case["machine"], f"{kind}s in {precision}, TFLOP/s"] = float(value)
        for key, label in (("copy_gb_per_second", "copies, GB/s"), ("decoder_frames_per_second", "decoding 256p, frames/s")):
            if limits.get(key):
                rows[case["machine"], label] = float(limits[key])
    table = _table(("machine", "limit", "newest"), ((machine, label, value) for (machine, label), value in rows.items()))
    return table if rows else NOTHING


def _tokenizer(cases: Sequence[Line]) -> str:
    """Return encoding and decoding side by side, each model beside the first published one of the same clip."""
    chosen = [case for case in cases if case["suite"] == "tokenizer"]
    pairs: dict[tuple, dict[str, Line]] = {}
    for case in chosen:
        own = case["settings"]
        pairs.setdefault((_size(case), own["precision"], own["model"], own["ratio"], own["compiled"]), {})[own["part"]] = case
    whole = {key: pair for key, pair in pairs.items() if len(pair) == 2}
    seconds = {key: pair["encode"]["seconds"] + pair["decode"]["seconds"] for key, pair in whole.items()}
    rows = []
    for (size, precision, model, ratio, compiled), pair in whole.items():
        encode, decode = pair["encode"], pair["decode"]
        peers = [seconds[key] for key in whole if key[:2] == (size, precision) and key[2] == PEERS["AutoencoderKLWan"]]
        key = size, precision, model, ratio, compiled
        rows.append(
            (
                f"{model}{', compiled' if compiled else ''}",
                f"{ratio}x",
                size,
                precision,
                f"{encode['parameters'] / 1e6:.0f} M",
                encode["latent_shape"][2],
                encode["count"] / encode["seconds"],
                _share(encode),
                _in_convolutions(encode),
                decode["count"] / decode["seconds"],
                _share(decode),
                _in_convolutions(decode),
                float(encode["gflop"] + decode["gflop"]),
                float(max(encode.get("peak_mib", 0), decode.get("peak_mib", 0))),
                f"{peers[0] / seconds[key]:.2f}" if peers else None,
            )
        )
    heads = ("model", "ratio", "clip", "precision", "weights", "latent frames")
    heads += ("encode, frames/s", "of the limit", "in convolutions", "decode, frames/s", "of the limit", "in convolutions")
    heads += ("GFLOP, both", "peak MiB", "times as fast as Wan 2.1")
    return _table(heads, sorted(rows, key=lambda row: (row[2], row[3])))


def _training(cases: Sequence[Line]) -> str:
    """Return gradients and whole steps of the transformer by ratio, and how many times as fast as the first ratio.

    Cells of what was not measured are blank.
    """
    by_part: dict[str, dict[str, Line]] = {TRAIN_STEP: {}, "gradients": {}}
    for case in cases:
        own = case["settings"]
        if own["part"] in by_part:
            by_part[own["part"]].setdefault(repr(sorted({**own, "part": ""}.items())), case)
    steps, gradients = by_part.values()
    rows = []
    for key in {**steps, **gradients}:
        step, before = steps.get(key), gradients.get(key)
        case: Any = step or before
        own = case["settings"]
        clips, speedup = own["shape"][0], step and step.get("speedup")
        rows.append(
            (
                f"{own['model']}, {own['shape'][-1]}x{own['shape'][-1]}{_way(own)}",
                own["precision"],
                f"{own['ratio']}x",
                clips,
                case.get("tokens"),
                before and before["seconds"],
                _share(before),
                step and step["seconds"],
                step and _kernels(step),
                _share(step),
                step and clips / step["seconds"],
                f"{speedup:.2f}" if speedup else None,
            )
        )
    heads = ("preset", "precision", "ratio", "clips", "tokens", "gradients, s", "MFU", "whole step, s")
    heads += ("of it kernels, s", "MFU", "clips/s")
    return _table((*heads, "times as fast as the first ratio"), rows)


def _levels(cases: Sequence[Line]) -> str:
    rows = [
        (
            case["settings"]["model"],
            f"{case['settings']['ratio']}x",
            _size(case),
            case["settings"]["precision"] + (", compiled" if case["settings"]["compiled"] else ""),
            case["settings"]["shape"][0],
            case["seconds"],
            case["count"] / case["seconds"],
            _share(case),
            case.get("peak_mib"),
        )
        for case in cases
    ]
    return _table(("preset", "level", "clip", "precision", "clips", "step, s", "clips/s", "of the limit", "peak MiB"), rows)


def _denoising(cases: Sequence[Line]) -> str:
    rows = [
        (
            f"{case['settings']['model']}, {_size(case)}{_way(case['settings'])}",
            case["settings"]["precision"],
            f"{case['settings']['ratio']}x",
            case["settings"]["shape"][0],
            1e3 * case["seconds"] / case["count"],
            _share(case),
            f"{case['speedup']:.2f}" if case.get("speedup") else None,
        )
        for case in cases
    ]
    heads = ("preset, video", "precision", "ratio", "videos at once", "ms a video and step", "of the limit")
    return _table((*heads, "times as fast as the first ratio"), rows)


def _sampling(cases: Sequence[Line]) -> str:
    rows = [
        (
            case["settings"]["model"] + _way(case["settings"]),
            case["settings"]["precision"],
            case["settings"]["steps"],
            _decoder(case["settings"]),
            f"{case['settings']['ratio']}x",
            case["seconds"] / case["count"],
            f"{case['speedup']:.2f}" if case.get("speedup") else None,
        )
        for case in cases
    ]
    heads = ("pipeline", "precision", "steps", "decoder", "ratio", "seconds a video", "times as fast as its baseline")
    return _table(heads, rows)


def _decoder(settings: Mapping[str, Any]) -> str | None:
    """Return what decodes, and how videos in a row follow each other."""
    if "overlap" not in settings:
        return settings.get("decoder")
    return f"{settings['decoder']}, in a row{', overlapped' if settings['overlap'] else ''}"


def _data(cases: Sequence[Line]) -> str:
    rows = []
    for case in cases:
        own = case["settings"]
        what = [str(own[key]) for key in ("part", "file", "reader", "order", "step") if key in own]
        workers = own.get("workers")
        resident, idle = case.get("resident_mib_after_each_round"), case.get("encoder_idle_in_each_round")
        rows.append(
            (
                ", ".join(what),
                workers,
                case["count"] / case["seconds"],
                f"{case['speedup']:.2f}" if case.get("speedup") else None,
                f"{median(idle):.0%}" if idle else None,
                f"{resident[0]} to {resident[-1]} after {len(resident) * own['clips']:,}" if resident else None,
            )
        )
    heads = ("case", "workers", "frames/s", "times the first of its part", "encoder idle", "resident MiB, by clips")
    return _table(heads, rows)


# -- on paper --------------------------------------------------------------------------------------------------------


def measured_mfu(cases: Iterable[Line], ratio: int) -> tuple[float, float]:
    """Return the limit in TFLOP/s and the MFU of the base preset's compiled gradients on GPU; raises UserError without."""
    wanted = {"part": "gradients", "model": "base", "ratio": ratio, "precision": "bf16", "compiled": True}
    for case in cases:
        own = case["settings"]
        if case["machine"] == GPU and not own.get("graphs") and all(own.get(key) == value for key, value in wanted.items()):
            return case["ceilings"]["product_tflops"]["bf16"], case["share_of_limit"]
    raise UserError(f"no line has the gradients of base at {ratio}x on {GPU}, compiled, in bf16")


def _scale(cases: Sequence[Line]) -> str:
    """Return what 8, 64 and 512 GPUs give for the paper's transformer, from the MFU measured at as many tokens a step."""
    config = diffusion_preset(ON_PAPER)
    peak, filled = measured_mfu(cases, 4)
    runs = ((4, 4, filled), (16, 4, measured_mfu(cases, 16)[1]), (16, 14, filled))  # ratio, clips of a GPU, MFU
    models = models_of(config, [(ratio, clips) for ratio, clips, _ in runs])
    rows = []
    for name, sharded, step in (("DDP", False, ddp_step), ("FSDP2", True, fsdp2_step)):
        for (ratio, _, mfu), model in zip(runs, models, strict=True):
            speed = Speed(peak * 1e12, mfu)
            rows += [_scale_row(name, ratio, model, speed, Cluster(gpus), sharded, step) for gpus in (8, 64, 512)]
    heads = ("", "ratio", "clips of a GPU", "MFU assumed", "GPUs", "GB sent by each", "computing, s", "communication, s")
    return _table((*heads, "Muon's, s", "update, s", "step, s", "clips/s", "of linear"), rows)


def _scale_row(
    name: str, ratio: int, model: Model, speed: Speed, cluster: Cluster, sharded: bool, step: Callable[..., Any]
) -> Sequence[Any]:
    parts = step(model, speed, cluster)
    alone = ddp_step(model, speed, Cluster(1)).fastest
    bounds = parts.slowest, parts.fastest
    rates = [clips_per_second(model, seconds, cluster) for seconds in bounds]
    linear = [alone / seconds for seconds in bounds]
    return (
        name,
        f"{ratio}x",
        model.clips,
        f"{speed.mfu:.0%}",
        cluster.gpus,
        sent_bytes(model, cluster, sharded) / 1e9,
        float(parts.compute),
        float(parts.hidden),
        float(parts.exposed),
        float(parts.update),
        f"{bounds[1]:.2f} to {bounds[0]:.2f}",
        f"{rates[0]:,.0f} to {rates[1]:,.0f}",
        f"{linear[0]:.0%} to {linear[1]:.0%}",
    )


def _select(suite: str, table: Callable[[Sequence[Line]], str], wanted: Callable[[Line], bool]) -> Callable[..., str]:
    def make(cases: Sequence[Line]) -> str:
        return _by_machine([case for case in cases if case["suite"] == suite and wanted(case["settings"])], table)

    return make


TABLES: dict[str, Callable[[Sequence[Line]], str]] = {
    "limits": _limits,
    "tokenizer": _select("tokenizer", _tokenizer, lambda own: True),
    "training": lambda cases: _by_machine(
        [c for c in cases if c["settings"]["part"] in (TRAIN_STEP, "gradients") and "stage" not in c["settings"]], _training
    ),
    "tokenizer training": _select("train", _levels, lambda own: "stage" in own),
    "denoising": _select("transformer", _denoising, lambda own: own["part"] == "denoising"),
    "sampling": _select("sampling", _sampling, lambda own: True),
    "data": _select("data", _data, lambda own: True),
    "scale": _scale,
}
