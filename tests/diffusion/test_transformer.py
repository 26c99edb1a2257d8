import math

import pytest
import torch

from promag import ProMAGTransformer3DModel
from promag.diffusion import transformer
from promag.diffusion.transformer import plain_attention, rotary_positions

SMALL = {
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 8,
    "pooled_dim": 6,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    statistics = {"latents_mean": {"4": [1.0] * 4, "16": [0.0] * 4}, "latents_std": {"4": [2.0] * 4, "16": [1.0] * 4}}
    model = ProMAGTransformer3DModel(**SMALL, **statistics)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(b=2, t=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(b, 4, t, 4, 4, generator=g),
        "timestep": torch.linspace(100, 900, b),
        "encoder_hidden_states": torch.randn(b, 5, 8, generator=g),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * b),
        "pooled_projections": torch.randn(b, 6, generator=g),
        "temporal_ratio": 16,
        "fps": torch.linspace(8, 24, b),
    }


@torch.no_grad()
def test_a_batch_equals_its_members(model):
    whole = model(**inputs()).sample
    assert whole.shape == (2, 4, 3, 4, 4)
    for i in range(2):
        one = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs().items()}
        assert torch.allclose(model(**one).sample[0], whole[i], atol=1e-5)


@torch.no_grad()
def test_masked_text_tokens_do_not_matter_and_real_ones_do(model):
    given = inputs()
    before = model(**given).sample
    for place, same in ((slice(3, 5), True), (slice(2, 3), False)):
        changed = {**given, "encoder_hidden_states": given["encoder_hidden_states"].clone()}
        changed["encoder_hidden_states"][:, place] += 3
        assert torch.allclose(model(**changed).sample, before, atol=1e-5) is same


@pytest.mark.parametrize("change", [{"temporal_ratio": 4}, {"fps": 30.0}, {"timestep": torch.tensor([5.0, 6.0])}])
@torch.no_grad()
def test_ratio_frame_rate_and_time_change_the_prediction(model, change):
    assert not torch.allclose(model(**{**inputs(), **change}).sample, model(**inputs()).sample, atol=1e-3)


@torch.no_grad()
def test_pooled_text_matters(model):
    given = inputs()
    changed = {**given, "pooled_projections": given["pooled_projections"] + 1}
    assert not torch.allclose(model(**changed).sample, model(**given).sample, atol=1e-3)


@torch.no_grad()
def test_each_text_encoder_has_its_own_projection(model):
    """A model with two encoders and the same projection twice equals a model with one encoder on both texts concatenated."""
    given = inputs()
    two = ProMAGTransformer3DModel.from_config({**model.config, "text_dim": [8, 8]}).eval()
    weights = model.state_dict()
    weights |= {k.replace("embeds.0", "embeds.1"): v for k, v in weights.items() if k.startswith("text_embeds.0.")}
    two.load_state_dict(weights)
    parts, masks = (torch.tensor_split(given[k], [2], 1) for k in ("encoder_hidden_states", "encoder_attention_mask"))
    apart = {**given, "encoder_hidden_states": parts, "encoder_attention_mask": masks}
    assert torch.allclose(two(**apart).sample, model(**given).sample, atol=1e-5)
    two.text_embeds[1].linear_1.weight.add_(1)
    assert not torch.allclose(two(**apart).sample, model(**given).sample, atol=1e-3)
    with pytest.raises(ValueError, match="text of 1 encoders, 1 masks: this model needs 2"):
        two(**given)
    with pytest.raises(ValueError, match="text of 2 encoders, 1 masks: this model needs 2"):
        two(**{**apart, "encoder_attention_mask": masks[:1]})


def test_an_untrained_model_predicts_zero_and_every_weight_gets_a_gradient():
    torch.manual_seed(0)
    model = ProMAGTransformer3DModel(**SMALL)
    assert model(**inputs()).sample.abs().max() == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model(**inputs()).sample.square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = ProMAGTransformer3DModel(**SMALL)
        torch.nn.init.normal_(model.proj_out.weight)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs()).sample.square().mean().backward()
        grads.append(model.patch_embed.weight.grad)
    assert torch.equal(*grads)


def test_rotary_scores_depend_on_distance_alone():
    """Adjacent 16x latent frames are four 4x positions apart, so equal time spans give equal angles."""
    four = rotary_positions(12, (9, 1, 1), 1.0, torch.device("cpu"))
    sixteen = rotary_positions(12, (3, 1, 1), 4.0, torch.device("cpu"))
    for a, b in zip(four, sixteen, strict=True):
        assert a.shape == (9, 12)
        assert torch.allclose(a[::4], b)


def test_normalising_is_invertible_and_refuses_unknown_ratios(model):
    x = torch.randn(1, 4, 2, 2, 2)
    assert torch.allclose(model.normalise(x, 4), (x - 1) / 2)
    assert torch.allclose(model.denormalise(model.normalise(x, 4), 4), x, atol=1e-6)
    with pytest.raises(ValueError, match="temporal ratio 8: this model has latent statistics for 4x, 16x"):
        model.normalise(x, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 4, 3, 5, 4)}, "latent of 3x5x4"),
        ({"hidden_states": torch.zeros(2, 3, 3, 4, 4)}, r"hidden_states of shape \(2, 3, 3, 4, 4\): b 4 t h w is needed"),
        ({"hidden_states": torch.zeros(2, 4, 3, 4, 4).int()}, r"hidden_states of type torch\.int32: a floating-point tensor"),
        ({"timestep": 500.0}, r"timestep of type float: a tensor \(2,\) is needed"),
        ({"timestep": torch.ones(3)}, r"timestep of shape \(3,\): \(2,\) is needed"),
        ({"temporal_ratio": 0}, "temporal_ratio 0: a number above 0"),
        ({"temporal_ratio": 4.0}, r"temporal_ratio 4\.0: a number"),
        ({"fps": float("nan")}, "fps nan: a number above 0"),
        ({"fps": torch.ones(3)}, r"fps of shape \(3,\): one number is needed, or \(2,\)"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 7)}, r"encoder_hidden_states of shape \(2, 5, 7\): \(2, L, 8\) is needed"),
        ({"encoder_attention_mask": torch.zeros(2, 5)}, "encoder_attention_mask: masks every token of a text"),
        ({"encoder_attention_mask": torch.ones(2, 4)}, r"encoder_attention_mask of shape \(2, 4\): \(2, 5\) is needed"),
        ({"attention_kwargs": {"sclae": 1}}, r"attention_kwargs \{'sclae': 1\}: a dictionary that may hold scale"),
        ({"attention_kwargs": {"scale": float("nan")}}, "attention_kwargs scale nan: a finite number"),
        ({"pooled_projections": None}, r"pooled_projections of type NoneType: this model needs \(2, 6\)"),
    ],
)
def test_illegal_input_is_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**inputs(), **change})


@torch.no_grad()
def test_saved_and_loaded_gives_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert torch.equal(ProMAGTransformer3DModel.from_pretrained(tmp_path)(**inputs()).sample, model(**inputs()).sample)


def test_peft_adds_lora_layers(model):
    from peft import LoraConfig

    torch.manual_seed(0)
    adapted = ProMAGTransformer3DModel(**SMALL)
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 2 * 2  # blocks, attentions, projections, matrices


def test_plain_attention_is_scaled_dot_product_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 7, 3, 8), torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    for given in (None, mask):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=given).transpose(1, 2)
        assert torch.allclose(plain_attention(q, k, v, given), expected, atol=1e-6)


def test_a_chosen_backend_is_used_and_changes_nothing(model, monkeypatch):
    plain = model(**inputs()).sample
    calls = []
    dispatch = transformer.dispatch_attention_fn
    monkeypatch.setattr(transformer, "dispatch_attention_fn", lambda *a, **k: calls.append(1) or dispatch(*a, **k))
    assert torch.equal(model(**inputs()).sample, plain)
    assert not calls
    try:
        model.set_attention_backend("native")
        assert torch.allclose(model(**inputs()).sample, plain, atol=1e-5)
        assert calls
    finally:
        model.reset_attention_backend()
    assert torch.equal(model(**inputs()).sample, plain)


def test_a_local_convolution_is_a_part_of_each_block():
    torch.manual_seed(0)
    plain, local = (ProMAGTransformer3DModel(**SMALL, local_convolution=on) for on in (False, True))
    counts = [sum(p.numel() for p in m.parameters()) for m in (plain, local)]
    assert counts[1] - counts[0] == 2 * 24 * (27 + 1)
    block = local.transformer_blocks[0]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.local.weight[:, 0, 1, 1, 2] = 1  # look one token to the right
    x = torch.randn(1, 2 * 3 * 4, 24)
    rotary = rotary_positions(12, (2, 3, 4), 1.0, x.device)
    y = block(x, torch.zeros(1, 2, 24), torch.zeros(1, 1, 6, 24), rotary, None, (2, 3, 4))
    seen = (y - x).view(1, 2, 3, 4, 24)
    assert torch.allclose(seen[:, :, :, :-1], x.view(1, 2, 3, 4, 24)[:, :, :, 1:], atol=1e-6)
    assert seen[:, :, :, -1].abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents_std": {"4": [0.0] * 4, "16": [1.0] * 4}}, r"latents_std at 4x \[0\.0, .*: 4 finite numbers above 0"),
        ({"latents_mean": {"4": [float("nan")] * 4, "16": [1.0] * 4}}, "latents_mean at 4x"),
        ({"latents_std": None}, "latents_std None: a mapping of temporal ratios"),
        ({"latents_mean": {"x": [1.0] * 4}, "latents_std": {"x": [1.0] * 4}}, "a mapping of temporal ratios is needed"),
        ({"patch_size": [1, 2]}, r"patch_size \[1, 2\]: three numbers"),
        ({"patch_size": [1, 2, 0]}, r"patch_size \[1, 2, 0\] 0: a whole number of at least 1"),
        ({"sample_defaults": [8]}, r"sample_defaults \[8\]: a mapping of names to finite numbers"),
        ({"sample_defaults": {"fps": math.nan}}, r"sample_defaults \{'fps': nan\}"),
        ({"condition_frames": -1}, "condition_frames -1: a whole number of at least 0"),
    ],
)
def test_illegal_settings_are_named(change, message):
    statistics = {"latents_mean": {"4": [1.0] * 4, "16": [0.0] * 4}, "latents_std": {"4": [2.0] * 4, "16": [1.0] * 4}}
    with pytest.raises(ValueError, match=message):
        ProMAGTransformer3DModel(**{**SMALL, **statistics, **change})
