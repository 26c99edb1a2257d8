from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from promag.diffusion.config import DiffusionConfig
from promag.evaluation.budgets import Budget, CodedSize, own_budgets
from promag.evaluation.cost import (
    LENGTHS,
    MEASURES,
    BudgetCosts,
    Effort,
    denoising,
    fit_curve,
    fit_errors,
)
from promag.training.config import build, load_yaml


@pytest.fixture(scope="module")
def config():
    preset = build(DiffusionConfig, load_yaml("configs/diffusion/tiny.yaml"), "tiny")
    return replace(preset, model=replace(preset.model, num_layers=1, num_attention_heads=2, attention_head_dim=8))


@pytest.fixture
def costs(config, tokenizer):
    return BudgetCosts(own_budgets(tokenizer), config, 32, 32)


def test_a_curve_is_recovered():
    tokens = (32, 48, 80, 144, 272, 528)
    curve = fit_curve([(n, 3 + 0.2 * n + 0.004 * n**2) for n in tokens])
    assert curve.coefficients == pytest.approx((3, 0.2, 0.004), rel=1e-6)
    assert curve.value(4112) == pytest.approx(3 + 0.2 * 4112 + 0.004 * 4112**2)


def test_no_term_is_negative_and_few_points_make_a_simple_curve():
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = [(n, float(rng.uniform(1, 2))) for n in (32, 48, 80, 144, 272, 528)]
        assert min(fit_curve(points).coefficients) >= 0
    assert np.count_nonzero(fit_curve([(10, 1.0), (20, 2.1), (30, 2.9)]).coefficients) == 1
    with pytest.raises(ValueError, match="at least one is needed"):
        fit_curve([])


@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_flops_equal_those_counted_by_torch(costs, ratio):
    budget = costs.budgets[ratio]
    denoise = costs.denoising(budget, 33, 1)
    denoise()  # the precision is chosen by measurement at the first call
    with FlopCounterMode(display=False) as counter:
        denoise()
    # One step of a video predicts with and without text; the positions' features are computed once for both.
    model = costs._models[budget.channels]
    places = 2 * costs.tokens(budget, 33) * model.place_embed.weight.numel()
    assert counter.get_total_flops() == 2 * 1e9 * costs.gflops(budget, 33, training=False) - places


def test_costs_at_one_length(costs):
    results = costs.measure_length(33, Effort(batch=1, steps=1, rounds=1))
    assert [results[name]["tokens"] for name in ("4x", "8x", "16x")] == [36, 20, 12]
    assert results["4x"]["training_gflops"] > results["8x"]["training_gflops"] > results["16x"]["training_gflops"]
    for row in results.values():
        assert row["sampling_seconds"] == row["denoising_seconds"] + row["decoding_seconds"] > 0
        assert row["train_peak_mib"] > 0


def test_videos_are_denoised_in_one_batch(costs):
    counts = []
    for videos in (1, 3):
        denoise = costs.denoising(costs.budgets[2], 17, 1, videos)
        denoise()
        with FlopCounterMode(display=False) as counter:
            denoise()
        counts.append(counter.get_total_flops())
    # The features of the positions are computed once for the batch.
    places = 2 * costs.tokens(costs.budgets[2], 17) * costs._models[costs.budgets[2].channels].place_embed.weight.numel()
    assert counts[1] + 2 * places == 3 * counts[0]


def test_figures_that_need_denoising_or_a_decoder_are_omitted_without_them(costs):
    costs.budgets = [replace(costs.budgets[-1], model=None)]
    for steps, measured in ((0, set()), (1, {"denoising_seconds"})):
        row = costs.measure_length(17, Effort(batch=1, steps=steps, rounds=1))["16x"]
        assert {key for key in row if key.endswith("_seconds")} == {"gradient_seconds", "train_step_seconds", *measured}


def test_lengths_beyond_the_limit_are_extrapolated_and_marked(costs):
    results = costs.measure_lengths(Effort(batch=1, steps=1, rounds=1))
    for name, points in results.items():
        assert [point["frames"] for point in points] == list(LENGTHS)
        assert [point["measured"] for point in points] == [True, *[False] * 6]
        assert all(point[measure] > 0 for point in points for measure in MEASURES)
        assert points[-1]["tokens"] == costs.tokens(next(b for b in costs.budgets if b.name == name), 1025)
    assert fit_errors(results) == dict.fromkeys(MEASURES)


def test_the_error_of_a_curve_is_measured_on_the_longest_clip():
    points = [{"tokens": n, "measured": True, **dict.fromkeys(MEASURES, float(n))} for n in (10, 20, 40, 80)]
    points[-1]["train_step_seconds"] = 100.0
    results = fit_errors({"4x": points})
    assert results["train_step_seconds"] == pytest.approx(0.2)
    assert results["denoising_step_seconds"] == pytest.approx(0, abs=1e-9)


def test_a_baseline_with_another_grid_costs_what_its_tokens_cost(config, tokenizer):
    torch.manual_seed(0)
    baseline = Budget("ltx", tokenizer, 8, 16, 6, False)
    costs = BudgetCosts([*own_budgets(tokenizer), baseline], config, 32, 32)
    assert costs.tokens(baseline, 33) == 5
    model = costs._models[6]
    with FlopCounterMode(display=False) as counter:
        denoising(model, CodedSize(33, 32, 32, 8, spatial=16), 1)()
    places = 2 * 5 * model.place_embed.weight.numel()
    assert counter.get_total_flops() == 2 * 1e9 * costs.gflops(baseline, 33, training=False) - places
