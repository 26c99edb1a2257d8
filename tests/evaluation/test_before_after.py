"""An autoencoder beside the one before: whose latents, which figures."""

import copy

import pytest
import torch

from promag.evaluation.before_after import AFTER, BEFORE, CROSSED, compare, have_other_latents, table
from promag.tokenizer.metrics import evaluate_fully, psnr
from tests.conftest import make_tokenizer


@pytest.fixture
def pair():
    """Return a tokenizer and one with another decoder and, at 8x, another encoder."""
    before = make_tokenizer(levels=2, settle=0.05)
    after = copy.deepcopy(before)
    with torch.no_grad():
        for module in (after.decoder, after.encoder_growth):
            for parameter in module.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return before, after


def test_a_trained_decoder_is_compared_on_the_same_latents(pair, clip):
    before, after = pair
    results = evaluate_fully(after, [clip], 4, precision="fp32")
    rows = compare(before, after, lambda: [clip], 4, results, "fp32", rounds=1)
    assert rows.keys() == {BEFORE, AFTER}
    for name, model in ((BEFORE, before), (AFTER, after)):
        assert rows[name]["psnr"] == pytest.approx(float(psnr(model(clip, 4).sample.detach(), clip)))
        assert rows[name]["encoder_parameters"] == sum(p.numel() for p in model.encoder.parameters())
        assert rows[name]["decoder_parameters"] == sum(p.numel() for p in model.decoder.parameters())
        assert all(rows[name][f"{part}_{kind}"] > 0 for part in ("encode", "decode") for kind in ("seconds", "peak_mib"))
    assert rows[BEFORE]["psnr"] != rows[AFTER]["psnr"]


def test_other_latents_add_the_one_after_on_the_latents_of_the_one_before(pair, clip):
    before, after = pair
    assert [have_other_latents(before, after, ratio) for ratio in (4, 8)] == [False, True]
    assert not have_other_latents(before, make_tokenizer(levels=2, latent="dual"), 8)
    results = evaluate_fully(after, [clip], 8, precision="fp32")
    rows = compare(before, after, lambda: [clip], 8, results, "fp32", rounds=1)
    with torch.no_grad():
        output = after.decode(before.encode(clip, 8).latent_dist.mode(), 8).sample
    assert rows[CROSSED]["psnr"] == pytest.approx(float(psnr(output, clip)))
    assert rows[CROSSED]["psnr"] != rows[AFTER]["psnr"]
    assert "decode_seconds" not in rows[CROSSED]
    lines = table(rows).splitlines()
    assert lines[0].split() == [*BEFORE.split(), *AFTER.split(), *CROSSED.split()]
    assert lines[1].split() == ["psnr", *(f"{row['psnr']:.4g}" for row in rows.values())]
    assert lines[-1].split() == ["decoder_parameters", *(f"{rows[name]['decoder_parameters']:.4g}" for name in (BEFORE, AFTER))]
