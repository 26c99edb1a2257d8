import numpy as np
import pytest

from promag import AutoencoderKLProMAG
from promag.data.datasets import SyntheticDataset
from promag.evaluation.budgets import (
    ORIGINAL,
    Budget,
    check_budgets,
    compare_reconstructions,
    own_budgets,
)
from promag.tokenizer.metrics import evaluate_fully, to_uint8
from tests.existing_models import small_existing


def test_levels_of_one_checkpoint_become_budgets(tokenizer):
    budgets = own_budgets(tokenizer)
    assert [(b.name, b.ratio, b.own) for b in budgets] == [("4x", 4, True), ("8x", 8, True), ("16x", 16, True)]
    facts = budgets[2].facts(65, 64, 64)
    assert (facts["latent_frames"], facts["tokens"]) == (5, {"1x1x1": 320, "1x2x2": 80})
    assert facts["latent_values"] == 4 * 320
    assert facts["stored_bits_per_pixel"] == pytest.approx(16 * 4 * 320 / (65 * 64 * 64))


def test_a_length_that_a_budget_does_not_take_is_padded():
    budget = Budget("six", None, 6, 8, 12, False)
    assert [budget.coded_frames(n) for n in (1, 2, 7, 65)] == [1, 7, 7, 67]
    assert budget.facts(65, 64, 64)["latent_frames"] == 12
    assert budget.tokens(65, 8, 8, (1, 2, 2)) is None


def test_figures_are_those_of_the_evaluation_to_the_last_digit(tokenizer, tmp_path):
    clips = SyntheticDataset("eval", 3, 17, 32)
    results, facts = compare_reconstructions(own_budgets(tokenizer), clips, tmp_path)
    for ratio in (4, 16):
        videos = (clips.fixed(i)["video"][None] for i in range(3))
        alone = evaluate_fully(tokenizer, videos, ratio)
        assert {key: results[f"{ratio}x"][key] for key in alone} == alone
    assert results["4x"]["kl_bits_per_pixel"] > 0
    assert [clip.caption for clip in facts] == [clips.fixed(i)["caption"] for i in range(3)]


def test_saved_videos_and_frames_are_the_measured_ones(tokenizer, tmp_path):
    clips = SyntheticDataset("eval", 2, 17, 32)
    results, facts = compare_reconstructions(own_budgets(tokenizer), clips, tmp_path)
    video = clips.fixed(1)["video"][None]
    assert np.array_equal(np.load(facts[1].videos[ORIGINAL]), to_uint8(video)[0].numpy())
    error = np.load(facts[1].videos["8x"]).astype(float) - np.load(facts[1].videos[ORIGINAL])
    psnr = -10 * np.log10(np.square(error / 255).mean())
    assert results["8x"]["per_clip"][1]["psnr"] == pytest.approx(psnr, abs=1e-3)
    per_frame = -10 * np.log10(np.square(error / 255).mean((1, 2, 3)))
    assert facts[1].psnr_per_frame["8x"] == pytest.approx(per_frame.tolist(), abs=1e-3)


def test_a_baseline_that_pads_is_compared_on_the_same_frames(tmp_path):
    baseline = Budget("wan", AutoencoderKLProMAG.from_base(small_existing("Wan 2.1")), 4, 8, 4, False)
    clips = SyntheticDataset("eval", 2, 15, 32)  # coded as 17
    results, facts = compare_reconstructions([baseline], clips, tmp_path)
    assert len(results["wan"]["psnr_per_frame"]) == 15
    assert np.load(facts[0].videos["wan"]).shape == (15, 32, 32, 3)


def test_names_and_sizes_are_checked(tokenizer):
    budgets = own_budgets(tokenizer)
    with pytest.raises(ValueError, match="two budgets are called 4x"):
        check_budgets([*budgets, budgets[0]], 64, 64)
    with pytest.raises(ValueError, match="ltx: height 48: needs a multiple of 32; use 32 or 64"):
        check_budgets([Budget("ltx", None, 8, 32, 128, False)], 48, 64)
