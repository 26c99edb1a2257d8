"""LoRA files in every naming: the same adapter gives the same video, and what does not fit is refused by name."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from promag import ProMAGPipeline
from promag.training.config import UserError
from tests.pipelines.conftest import call, like

RANK, ALPHA = 2, 3.0  # a scale of 1.5
LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_out.0", "transformer_blocks.1.ff.net.2")


@pytest.fixture(scope="module")
def adapted(pipe):
    """A pipeline with an adapter at three layers."""
    made = like(pipe)
    torch.manual_seed(0)
    made.transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS), init_lora_weights=False)  # pyright: ignore
    )
    return made


@pytest.fixture(scope="module")
def halves(adapted):
    """(A, B) of each layer."""
    state = get_peft_model_state_dict(adapted.transformer)
    return {layer: tuple(state[f"{layer}.lora_{end}.weight"].clone() for end in "AB") for layer in LAYERS}


def dotted(halves, prefix, ends=("lora_A", "lora_B")):
    return {f"{prefix}{layer}.{end}.weight": x for layer, pair in halves.items() for end, x in zip(ends, pair, strict=True)}


def alphas(halves, prefix=""):
    return {f"{prefix}{layer}.alpha": torch.tensor(ALPHA) for layer in halves}


def kohya(halves, prefix="lora_unet_"):
    flat = {layer.replace(".", "_"): pair for layer, pair in halves.items()}
    return {**dotted(flat, prefix, ("lora_down", "lora_up")), **alphas(flat, prefix)}


NAMINGS = {
    "diffusers": lambda h: {**dotted(h, "transformer."), **alphas(h, "transformer.")},
    "bare": lambda h: {**dotted(h, ""), **alphas(h)},
    "ComfyUI": lambda h: {**dotted(h, "diffusion_model."), **alphas(h, "diffusion_model.")},
    "ComfyUI, down and up": lambda h: {
        **dotted(h, "diffusion_model.", ("lora_down", "lora_up")),
        **alphas(h, "diffusion_model."),
    },
    "old diffusers": lambda h: {**dotted(h, "", ("lora.down", "lora.up")), **alphas(h)},
    "peft in memory": lambda h: {**dotted(h, "base_model.model.", ("lora_A.default", "lora_B.default")), **alphas(h)},
    "kohya": kohya,
    "kohya, lora_transformer": lambda h: kohya(h, "lora_transformer_"),
}


# The file of peft's names needs another one beside it, and has a test of its own.
PLACES = [("memory", naming) for naming in NAMINGS]
PLACES += [("file", naming) for naming in NAMINGS if naming != "peft in memory"]


@pytest.mark.parametrize(("place", "naming"), PLACES)
def test_every_naming_gives_the_video_of_the_adapter(pipe, adapted, halves, naming, place, tmp_path):
    weights = NAMINGS[naming](halves)
    own = like(pipe)
    if place == "file":
        save_file(weights, tmp_path / "any.safetensors")
        weights = tmp_path / "any.safetensors"
    own.load_lora_weights(weights)
    expected = call(adapted)
    assert np.array_equal(call(own), expected)
    assert np.abs(expected - call(pipe)).max() > 1e-3


def test_a_folder_of_peft_and_a_file_of_diffusers_state_their_alpha_beside_the_tensors(pipe, adapted, halves, tmp_path):
    save_file(dotted(halves, "base_model.model."), tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"peft's names need .*adapter_config\.json with their alpha"):
        like(pipe).load_lora_weights(tmp_path)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(LAYERS), "unknown": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ProMAGPipeline.save_lora_weights(
        tmp_path / "diffusers",
        dotted(halves, ""),
        transformer_lora_adapter_metadata=adapted.transformer.peft_config["default"].to_dict(),
    )
    for folder in (tmp_path, tmp_path / "adapter_model.safetensors", tmp_path / "diffusers"):
        own = like(pipe)
        own.load_lora_weights(folder, adapter_name="mine")
        assert np.array_equal(call(own), call(adapted))


def test_layers_may_have_ranks_and_alphas_of_their_own_and_without_an_alpha_it_is_the_rank(pipe, halves):
    first, *others = LAYERS
    wide = {first: (torch.cat([halves[first][0]] * 2), torch.cat([halves[first][1]] * 2, 1))}
    wide |= {layer: halves[layer] for layer in others}
    own, plain = like(pipe), like(pipe)
    own.load_lora_weights({**dotted(wide, ""), f"{first}.alpha": torch.tensor(2.0)})
    plain.load_lora_weights(dotted(halves, ""))
    # Twice the same halves at alpha / rank = 2 / 4 are the halves once at 2 / 2.
    assert np.allclose(call(own), call(plain), atol=1e-5)


def without(weights, *names):
    return {key: value for key, value in weights.items() if key not in names}


A0 = f"transformer.{LAYERS[0]}.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {}, r"LoRA dictionary: 0 of its 0 tensors fit no layer .*; none fits: legal are transformer\.LAYER\."),
        (lambda w: {"unet.to_q.lora_A.weight": w[A0]}, r"1 of its 1 tensors fit no layer .*\(unet\.to_q\.lora_A\.weight\)"),
        (
            lambda w: {**w, "transformer.transformer_blocks.9.attn1.to_q.lora_A.weight": w[A0]},
            r"1 of its 7 tensors fit no layer of this transformer \(transformer\.transformer_blocks\.9\.attn1\.to_q\."
            r"lora_A\.weight\); 6 fit \(transformer_blocks\.0\.attn1\.to_out\.0, .*\)",
        ),
        (lambda w: {**w, "text_encoder.a.lora_A.weight": w[A0]}, r"fit no layer of this transformer \(text_encoder\.a\.lora_A"),
        (lambda w: {**w, "lora_te_a.lora_down.weight": w[A0]}, r"fit no layer of this transformer \(lora_te_a\.lora_down"),
        (lambda w: {**w, f"{LAYERS[0]}.dora_scale": w[A0]}, r"dora_scale"),
        (lambda w: {**w, f"{LAYERS[0]}.lokr_w1": w[A0]}, r"fit no layer of this transformer \(.*lokr_w1\)"),
        (lambda w: without(w, A0), r"transformer_blocks\.0\.attn1\.to_q has only one of lora_A\.weight and lora_B\.weight"),
        (
            lambda w: {**w, A0: torch.zeros(2, 9)},
            r"to_q\.lora_A\.weight of \(2, 9\) with its other half of \(16, 2\): \(rank, 16\) and \(16, rank\) are needed",
        ),
        (lambda w: {**w, A0: torch.zeros(3, 16)}, r"of \(3, 16\) with its other half of \(16, 2\)"),
        (lambda w: {**w, A0: w[A0] * float("nan")}, rf"{A0}: all values must be finite numbers"),
        (lambda w: {**w, f"{LAYERS[0]}.alpha": torch.tensor(float("inf"))}, r"\.alpha is inf: one finite number is needed"),
        (lambda w: {**w, f"{LAYERS[0]}.alpha": torch.ones(2)}, r"\.alpha is \[1\.0, 1\.0\]: one finite number is needed"),
    ],
)
@pytest.mark.parametrize("place", ["memory", "file"])
def test_a_file_of_which_nothing_or_only_a_part_fits_is_refused_and_changes_nothing(
    pipe, halves, change, message, place, tmp_path
):
    weights = change(dotted(halves, "transformer."))
    own = like(pipe)
    if place == "file":
        save_file({key: value.clone() for key, value in weights.items()}, tmp_path / "lora.safetensors")
        weights, message = tmp_path / "lora.safetensors", message.replace("LoRA dictionary", r"LoRA .*lora\.safetensors")
    with pytest.raises(UserError, match=message):
        own.load_lora_weights(weights)
    assert not hasattr(own.transformer, "peft_config")
    assert np.array_equal(call(own), call(pipe))


def test_a_file_that_cannot_be_read_or_may_be_a_pickle_is_named(pipe, halves, tmp_path):
    own = like(pipe)
    whole = tmp_path / "whole.safetensors"
    save_file(dotted(halves, ""), whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-9])
    for name in ("cut.safetensors", "nowhere.safetensors"):
        with pytest.raises(UserError, match=f"LoRA .*{name}: cannot be read"):
            own.load_lora_weights(tmp_path / name)
    for given in ({"weight_name": "x.bin"}, {"weight_name": "x.anything"}):
        with pytest.raises(UserError, match=r"LoRA .*x\.\w+: may be a pickle"):
            own.load_lora_weights(tmp_path, **given)


def test_a_second_adapter_fits_beside_the_first(pipe, adapted, halves):
    own = like(pipe)
    own.load_lora_weights(kohya(halves), adapter_name="one")
    own.load_lora_weights({**dotted(halves, ""), **alphas(halves)}, adapter_name="two")
    own.set_adapters("two")
    assert np.array_equal(call(own), call(adapted))
    with pytest.raises(ValueError, match="Adapter name two already in use"):
        own.load_lora_weights(dotted(halves, ""), adapter_name="two")
