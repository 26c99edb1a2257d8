"""The experiment at its smallest size, and its presets."""

import dataclasses
import json

import pytest
import torch
import yaml

from promag import AutoencoderKLProMAG
from promag.scripts.experiments import growth_ablation
from promag.tokenizer.checkpoint import load_tokenizer
from promag.tokenizer.config import StageConfig
from promag.tokenizer.growth import Growth
from promag.tokenizer.levels import parameter_count
from promag.training.command_line import parse_config
from promag.training.config import UserError
from tests.scripts.conftest import TINY_MODEL, load_yaml, overrides

LOOP = {
    "steps": 2, "batch_size": 1, "accumulate": 1, "learning_rate": 1e-3, "warmup": 1, "schedule": "cosine",
    "weight_decay": 0, "clip_norm": 1, "ema_decay": 0.9, "max_skipped": 0, "muon_learning_rate": None,
}  # fmt: skip
MODEL = {**TINY_MODEL, "linear_shortcuts": True}


def stage(ratio, mixing="attention", **change):
    growth = None if mixing is None else {"mixing": mixing, "birth": mixing != "none", "decoder": "frozen", "heads": 2}
    common = {
        "trainable": "new",
        "inherited_lr_scale": 1.0,
        "latent_pretrain_steps": 0,
        "mse_weight": 1,
        "kl_weight": 1e-6,
        "optimization": LOOP,
    }
    common |= {"perceptual": None, "adversarial": None}
    return {"ratio": ratio, "frames": 1 + ratio, "buckets": None, "growth": growth, **common, **change}


def variant(name, stages, base=None, model=None, baseline=None, seeds=(0,)):
    return {"name": name, "seeds": list(seeds), "base": base, "model": model, "baseline": baseline, "stages": stages}


WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
VARIANTS = [
    variant("base", [stage(4, None)], model=MODEL, seeds=(0, 1)),
    variant("progressive", [stage(8, latent_pretrain_steps=1), stage(16)], base="base"),
    variant("warm", [stage(16, "none", trainable="all", optimization={**LOOP, "steps": 4})], base="base"),
    variant("baseline", [stage(4, None)], baseline={"name": "AutoencoderKLWan", "config": WAN}),
    variant("joint", [stage(8), stage(8, None, trainable="all", by_turns=[8, 4, 8])], base="base"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("growth_ablation")
    values = {
        "output_dir": str(folder / "runs"),
        "record": str(folder / "growth_ablation.jsonl"),
        "only_variants": None,
        "precision": "fp32",
        "perceptual": [],
        "gradient_checkpointing": False,
        "compile": False,
        "frames": 17,
        "data": {
            "train": "synthetic", "extra_sources": None, "validation": "synthetic", "synthetic_clips": 4, "size": 32,
            "temporal_strides": [1], "in_memory": False, "validation_clips": 3,
            "sharding": {"concurrent_shards": 1, "shuffle": 1, "bad": "stop"},
        },
        "run": {
            "log_every": 1, "validate_every": 2, "save_every": 50, "keep_last": 1, "keep_every": None, "workers": 0,
            "distributed": "ddp", "stop_after": None, "trackers": [], "peak_tflops": None,
        },
        "variants": VARIANTS,
    }  # fmt: skip
    path = folder / "growth_ablation.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def lines(config):
    assert growth_ablation.main(["--config", str(config)]) == 0
    return [json.loads(line) for line in (config.parent / "growth_ablation.jsonl").read_text().splitlines()]


def test_a_line_for_each_variant_seed_and_ratio(lines):
    named = [(r["variant"], r["seed"], r["ratio"]) for r in lines if not {"subsampled", "interpolated"} & r.keys()]
    assert named == [
        ("base", 0, 4), ("base", 1, 4), ("progressive", 0, 8), ("progressive", 0, 16), ("warm", 0, 16), ("baseline", 0, 4),
        ("joint", 0, 4), ("joint", 0, 8),
    ]  # fmt: skip
    seen = [(r["variant"], r["subsampled"], len(r["psnr_per_frame"])) for r in lines if "subsampled" in r and r["seed"] == 0]
    assert ("base, every 2nd frame", 2, 9) in seen
    assert ("base, every 4th frame", 4, 5) in seen
    seen = [(r["variant"], r["ratio"]) for r in lines if "interpolated" in r and r["seed"] == 1]
    assert seen == [(f"base, {kind} interpolation", ratio) for ratio in (8, 16) for kind in ("linear", "motion")]
    needed = {"psnr", "psnr_top_motion", "ssim", "flicker", "params", "steps", "clips_seen", "seconds", "commit", "machine"}
    assert all(needed <= line.keys() for line in lines)


def test_spent_compute_includes_the_base(lines):
    by_variant = {(r["variant"], r["ratio"]): r for r in lines if r["seed"] == 0}
    assert [by_variant[key]["steps"] for key in (("base", 4), ("progressive", 8), ("progressive", 16), ("warm", 16))] == [
        2,
        4,
        6,
        6,
    ]
    assert by_variant["progressive", 16]["frames_seen"] == 2 * (5 + 9 + 17)
    assert by_variant["progressive", 16]["flops"] > by_variant["progressive", 8]["flops"] > by_variant["base", 4]["flops"] > 0
    assert [point[0] for point in by_variant["progressive", 16]["curve"]] == [6]


def test_a_variant_that_ends_by_turns_is_scored_after_that_stage(lines, config):
    base, four, eight = (
        next(r for r in lines if (r["variant"], r["seed"], r["ratio"]) == key)
        for key in (("base", 0, 4), ("joint", 0, 4), ("joint", 0, 8))
    )
    grown = next(r for r in lines if (r["variant"], r["ratio"]) == ("progressive", 8))
    for row in (four, eight):
        assert row["steps"] == 6
        assert row["frames_seen"] == 2 * (5 + 9 + 9)
        assert row["stage"]["steps"] == 2
        assert row["inherited"] == base["inherited"] | {key: base[key] for key in growth_ablation.COSTS}
        assert [point[0] for point in row["curve"]] == [6]
    assert {key: four[key] for key in growth_ablation.COSTS} == {key: eight[key] for key in growth_ablation.COSTS}
    assert four["flops"] > base["flops"] + grown["stage"]["flops"]
    assert four["psnr"] != base["psnr"]
    logged = (config.parent / "runs" / "joint-0" / "4x-8x" / "metrics.jsonl").read_text().splitlines()
    (last,) = [values for values in map(json.loads, logged) if "psnr" in values]
    assert [row["curve"][0][2] for row in (four, eight)] == pytest.approx([last["psnr_4x"], last["psnr"]], rel=1e-5)


def test_a_level_counts_after_the_last_stage_that_changed_it():
    def last_trained(*stages):
        return growth_ablation.last_trained([StageConfig(ratio=ratio, frames=65, **change) for ratio, change in stages])

    growth = {"growth": Growth()}
    four, eight, sixteen = (4, {}), (8, growth), (16, growth)
    together = (16, {"by_turns": (4, 16), "trainable": "all"})
    assert last_trained(eight, sixteen) == {8: 0, 16: 1}
    assert last_trained(four, eight, sixteen, together) == {4: 3, 8: 3, 16: 3}
    assert last_trained(together) == {4: 0, 16: 0}
    assert last_trained(four, eight, (16, {**growth, "trainable": "all"})) == {4: 2, 8: 2, 16: 2}


def test_only_used_parameters_are_counted(lines, config):
    by_variant = {(r["variant"], r["ratio"]): r["params"] for r in lines if r["seed"] == 0}
    model = load_tokenizer(config.parent / "runs" / "progressive-0" / "tokenizer")
    assert by_variant["progressive", 16] == sum(p.numel() for p in model.parameters())
    base = sum(p.numel() for part in (model.encoder, model.decoder) for p in part.parameters())
    assert by_variant["base", 4] == base
    warm = load_tokenizer(config.parent / "runs" / "warm-0" / "tokenizer")
    idle = sum(p.numel() for part in (warm.encoder.head, warm.encoder_growth[0].head) for p in part.parameters())
    assert by_variant["warm", 16] == sum(p.numel() for p in warm.parameters()) - idle


def test_growth_keeps_the_base_unchanged_and_a_warm_start_does_not(lines, config):
    runs = config.parent / "runs"
    base = load_tokenizer(runs / "base-0" / "tokenizer").state_dict()
    for name, kept in (("progressive", True), ("warm", False)):
        grown = load_tokenizer(runs / f"{name}-0" / "tokenizer").state_dict()
        assert all((value == grown[key]).all() for key, value in base.items()) == kept


def test_a_second_call_trains_and_records_nothing_and_prints_the_table(lines, config, capsys):
    before = (config.parent / "growth_ablation.jsonl").read_text()
    assert growth_ablation.main(["--config", str(config), "--only-variants", "[warm]"]) == 0
    assert (config.parent / "growth_ablation.jsonl").read_text() == before
    output = capsys.readouterr().out
    assert "4x: already trained" in output
    assert "== progressive" not in output
    row = next(line for line in output.splitlines() if line.startswith("| warm | 16x | 17x32x32 | 0 |"))
    warm = next(line for line in lines if line["variant"] == "warm")
    assert f"{warm['psnr']:.2f}" in row
    assert "| base | 4x | 17x32x32 | 0, 1 |" in output


def test_costs_are_recorded_by_stage_and_inherited_part(lines):
    by_variant = {(r["variant"], r["ratio"]): r for r in lines if r["seed"] == 0}
    base, eight, sixteen = (by_variant[key] for key in (("base", 4), ("progressive", 8), ("progressive", 16)))
    assert base["inherited"]["steps"] == base["inherited"]["flops"] == 0
    assert sixteen["inherited"] == {key: base[key] for key in sixteen["inherited"]}
    assert sixteen["flops"] == pytest.approx(base["flops"] + eight["stage"]["flops"] + sixteen["stage"]["flops"], rel=1e-5)
    assert eight["lift"].keys() == {"4"}
    assert sixteen["lift"].keys() == {"4", "8"}
    # The frozen decoder computes the same estimates, so decoding them equals decoding the latent.
    assert sixteen["lift"]["4"]["psnr"] == pytest.approx(sixteen["psnr"], abs=1e-3)
    assert base["lift"] == by_variant["baseline", 4]["lift"] == {}


def test_the_report_draws_the_recorded_lines(lines, config, tmp_path, capsys):
    growth_ablation.main(["report", str(config.parent / "growth_ablation.jsonl"), "--out", str(tmp_path)])
    output = capsys.readouterr().out
    progressive, warm = (
        next(r for r in lines if r["variant"] == variant and r["ratio"] == 16) for variant in ("progressive", "warm")
    )
    assert f"| warm | 17x32x32 | 0 | {progressive['psnr'] - warm['psnr']:+.3f} ± " in output
    assert "| base, every 4th frame | 4x | 17x32x32 | 0, 1 |" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"growth-ablation-17x32x32-{x}.svg" for x in ("compute-grown", "compute", "steps")
    ]
    assert "progressive: " in (tmp_path / "growth-ablation-17x32x32-steps.svg").read_text()


def test_the_report_shows_chosen_variants_minus_each_other(lines, config, capsys):
    record = str(config.parent / "growth_ablation.jsonl")
    growth_ablation.main(["report", record, "--variants", "progressive", "warm", "--ours", "warm"])
    output = capsys.readouterr().out
    progressive, warm = (
        next(r for r in lines if r["variant"] == variant and r["ratio"] == 16) for variant in ("progressive", "warm")
    )
    assert f"| progressive | 17x32x32 | 0 | {warm['psnr'] - progressive['psnr']:+.3f} ± " in output
    assert "| base |" not in output
    with pytest.raises(UserError, match=r"variants other: .* has base, base, every 2nd frame"):
        growth_ablation.main(["report", record, "--ours", "other"])


def test_mistakes_are_named(config):
    with pytest.raises(UserError, match="only_variants nothing: the variants are base, progressive"):
        growth_ablation.main(["--config", str(config), "--only-variants", "[nothing]"])
    with pytest.raises(UserError, match="base progressive must be an earlier variant with seeds"):
        growth_ablation.main(["--config", str(config), *overrides({"variants": {"2": {"base": "progressive", "seeds": [3]}}})])
    with pytest.raises(UserError, match="exactly one of base, model and baseline"):
        growth_ablation.main(["--config", str(config), *overrides({"variants": {"3": {"base": "base"}}})])


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_all_variants_at_16x_take_the_same_steps(name):
    path = f"configs/growth_ablation/{name}.yaml"
    config = parse_config(growth_ablation.AblationConfig, ["--config", path], "")
    variants = {variant.name: variant for variant in config.variants}
    assert load_yaml(path)["variants"][0]["name"] == "base"
    totals = {}
    on_cpus = parse_config(growth_ablation.AblationConfig, ["--config", "configs/growth_ablation/cpu.yaml"], "")
    assert set(variants) == {variant.name for variant in on_cpus.variants}
    for name in variants:
        chain = [stage for part in growth_ablation._lineage(variants, name) for stage in variants[part].stages]
        if chain[-1].ratio == 16:
            totals[name] = sum(stage.optimization.steps for stage in chain)
    assert {"progressive", "direct", "direct_plain", "warm"} <= totals.keys()
    assert len(set(totals.values())) == 1


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_parameters_of_the_variants_at_16x_agree(name):
    config = parse_config(growth_ablation.AblationConfig, ["--config", f"configs/growth_ablation/{name}.yaml"], "")
    variants = {variant.name: variant for variant in config.variants}
    counts = {}
    with torch.device("meta"):
        for way in ("progressive", "direct", "direct_plain", "warm"):
            chain = [variants[part] for part in growth_ablation._lineage(variants, way)]
            model = AutoencoderKLProMAG(**dataclasses.asdict(chain[0].model))
            for stage in (stage for variant in chain for stage in variant.stages if stage.growth):
                while model.temporal_ratios[-1] < stage.ratio:
                    model.grow(stage.growth)
            counts[way] = growth_ablation._used_parameters(model, 16)
        counts |= {"base": parameter_count([AutoencoderKLProMAG(**dataclasses.asdict(variants["base"].model))])}
        baseline = variants["peer_wan"].baseline
        counts["baseline"] = parameter_count([baseline.build()])
    for way in ("direct", "direct_plain", "warm"):
        assert counts[way] == pytest.approx(counts["progressive"], rel=0.05)
    assert counts["baseline"] == pytest.approx(counts["base"], rel=0.05)


def test_growth_on_an_existing_architecture_is_compared_with_training_it_directly(tmp_path):
    values = load_yaml("configs/growth_ablation/existing.yaml")
    small = {**values["variants"][0]["baseline"]["config"], "base_dim": 8, "z_dim": 4, "latents_mean": [0] * 4}
    small["latents_std"] = [1] * 4
    for variant in values["variants"]:
        if "baseline" in variant:
            variant["baseline"] = {**variant["baseline"], "config": small}
        for stage in variant["stages"]:
            stage["frames"] = 1 + stage["ratio"]
            stage["optimization"] = {"steps": 2, "batch_size": 1, "warmup": 1}
            if "growth" in stage:
                stage["growth"] = {**stage["growth"], "width": 16}
            if "latent_pretrain_steps" in stage:
                stage |= {"latent_pretrain_steps": 1, "latent_batch_size": 3}
    data = {"train": "synthetic", "validation": "synthetic", "synthetic_clips": 4, "size": 32, "temporal_strides": [1]}
    values["data"] = {**data, "validation_clips": 1, "latent_cache": str(tmp_path / "latents"), "latent_clips": 3}
    values |= {"output_dir": str(tmp_path / "runs"), "record": str(tmp_path / "lines.jsonl"), "precision": "fp32", "frames": 17}
    values |= {"perceptual": []}
    values["run"] = {"validate_every": 2, "log_every": 1, "workers": 0, "trackers": []}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert growth_ablation.main(["--config", str(tmp_path / "config.yaml")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["ratio"]) for row in rows] == [
        ("wan", 4), ("wan_grown", 8), ("wan_grown", 16), ("wan_direct", 16),
    ]  # fmt: skip
    assert [row["stage"]["frames_seen"] for row in rows] == [2 * 5, 4 * 9, 4 * 17, 2 * 17]
    grown, direct = rows[2], rows[3]
    assert grown["flops"] > grown["stage"]["flops"] > 0
    assert grown["inherited"]["flops"] == rows[0]["flops"]
    assert direct["stage"] == {key: direct[key] for key in growth_ablation.COSTS}
    weights = load_tokenizer(tmp_path / "runs" / "wan_direct-0" / "tokenizer").state_dict()
    assert any(name.startswith("encoder_growth.1.") for name in weights)
