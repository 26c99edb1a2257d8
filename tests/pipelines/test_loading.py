"""Saved pipelines load by the stock class, wherever a class is defined, and only from safetensors; pushed ones have a card."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import diffusers.utils.hub_utils as hub
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file

import promag
from promag import AutoencoderKLProMAG, ProMAGPipeline, ProMAGTransformer3DModel
from promag.diffusion.text import load_frozen
from promag.training.config import UserError
from promag.training.safetensors_only import check_complete
from tests.pipelines.conftest import call, like
from tests.scripts.test_scripts import write_t5


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def loaded(folder, cls=DiffusionPipeline, **arguments):
    pipe = cls.from_pretrained(folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_loaded_pipeline_samples_the_same_video_by_either_class(pipe, saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["vae"] == ["promag", "AutoencoderKLProMAG"]
    assert index["transformer"] == ["promag", "ProMAGTransformer3DModel"]
    for cls in (ProMAGPipeline, DiffusionPipeline):
        result = loaded(saved, cls)
        assert type(result) is ProMAGPipeline
        assert np.array_equal(call(result), call(pipe))
        assert result.config["num_frames"] == 17


def test_a_saved_folder_loads_after_the_file_of_a_class_has_moved(pipe, saved, monkeypatch):
    spec = importlib.util.find_spec("promag.diffusion.transformer")
    moved = importlib.util.spec_from_file_location("promag.diffusion.moved", spec.origin)
    module = importlib.util.module_from_spec(moved)
    monkeypatch.setitem(sys.modules, "promag.diffusion.moved", module)
    moved.loader.exec_module(module)
    monkeypatch.setitem(promag._HOME, "ProMAGTransformer3DModel", ".diffusion.moved")
    result = loaded(saved)
    assert type(result.transformer) is module.ProMAGTransformer3DModel is not ProMAGTransformer3DModel
    assert np.array_equal(call(result), call(pipe))


@pytest.mark.parametrize("cls", [DiffusionPipeline, ProMAGPipeline])
def test_a_class_of_a_foreign_library_is_refused_before_it_is_imported(folder, cls):
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    (folder / "evil.py").write_text("raise SystemExit('imported')")
    path.write_text(json.dumps({**index, "text_encoder": ["evil", "Encoder"]}))
    with pytest.raises(UserError, match="text_encoder is Encoder of 'evil': legal are promag, diffusers, transformers"):
        cls.from_pretrained(folder)


@pytest.mark.parametrize("cls", [DiffusionPipeline, ProMAGPipeline])
@pytest.mark.parametrize("name", ["text_encoder/pytorch_model.bin", "vae/extra.pt", "notes.pkl"])
def test_a_folder_that_holds_a_pickle_is_refused_before_it_is_opened(folder, cls, name):
    (folder / name).write_bytes(b"no pickle at all")
    with pytest.raises(UserError, match=f"{name}: may be pickles, which run code when loaded"):
        cls.from_pretrained(folder)
    with pytest.raises(UserError, match="only safetensors are loaded"):
        AutoencoderKLProMAG.from_pretrained(folder, subfolder="vae")


def test_pickles_are_refused_even_on_request(pipe, saved, tmp_path):
    for part in (pipe, pipe.vae, pipe.transformer):
        with pytest.raises(UserError, match=r"safe_serialization False: .* saved only as safetensors"):
            part.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UserError, match="use_safetensors False: ProMAGPipeline is loaded only from safetensors"):
        ProMAGPipeline.from_pretrained(saved, use_safetensors=False)
    with pytest.raises(UserError, match=r"LoRA .*weights\.bin: may be a pickle"):
        pipe.load_lora_weights(tmp_path / "weights.bin")
    assert list(tmp_path.iterdir()) == []


def test_types_variants_and_shards_of_the_parts(pipe, tmp_path):
    half = like(pipe).to(torch.bfloat16)
    half.save_pretrained(tmp_path, variant="bf16", max_shard_size="20KB")
    names = {path.name for path in (tmp_path / "transformer").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.bf16.json" in names
    assert len([name for name in names if name.startswith("diffusion_pytorch_model.bf16-0000")]) > 1
    with pytest.raises(ValueError, match="variant=fp16"):
        loaded(tmp_path, variant="fp16")
    result = loaded(tmp_path, variant="bf16", dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert (result.transformer.dtype, result.vae.dtype, result.text_encoder.dtype) == (torch.bfloat16, *[torch.float32] * 2)
    again = loaded(tmp_path, variant="bf16", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert np.array_equal(call(again), call(half))
    assert np.abs(call(again) - call(pipe)).mean() < 0.02


@pytest.fixture
def hub_folder(monkeypatch, tmp_path):
    """A folder that receives the uploaded files; the hub has no card yet."""

    def unknown(*_, **__):
        raise RepositoryNotFoundError("no such repository", response=_Answer())

    class _Answer:
        headers, request = {}, None

    class _Repository:
        repo_id = "someone/discs"

    monkeypatch.setattr(hub, "create_repo", lambda *_, **__: _Repository)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.create_repo", lambda *_, **__: _Repository)
    monkeypatch.setattr(hub.ModelCard, "load", unknown)
    monkeypatch.setattr(hub, "upload_folder", lambda folder_path, **_: shutil.copytree(folder_path, tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("method", ["push_to_hub", "save_pretrained"])
def test_a_pushed_pipeline_has_a_card_with_its_use(pipe, hub_folder, tmp_path, method, monkeypatch):
    if method == "push_to_hub":
        pipe.push_to_hub("discs")
    else:
        pipe.save_pretrained(str(tmp_path / "discs"), push_to_hub=True)
    card = (hub_folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\npipeline_tag: text-to-video\n")
    assert "automatically generated" not in card
    assert 'DiffusionPipeline.from_pretrained(snapshot_download("someone/discs"))' in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.setattr("huggingface_hub.snapshot_download", {"someone/discs": hub_folder}.__getitem__)  # no network
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "video.mp4").stat().st_size > 0
    assert "17 frames of 16x24" in card
    assert "| 4 | 5 | 30 |" in card
    assert "| 16 | 2 | 12 |" in card
    assert "up to 2 latent frames" in card
    count = sum(p.numel() for p in pipe.transformer.parameters())
    assert f"| transformer | ProMAGTransformer3DModel | {count:,} |" in card
    assert np.array_equal(call(loaded(hub_folder)), call(pipe))


def test_an_existing_card_is_kept(pipe, hub_folder, monkeypatch):
    written = hub.ModelCard("---\ntags: []\n---\n# My discs")
    monkeypatch.setattr(hub.ModelCard, "load", lambda *_, **__: written)
    pipe.push_to_hub("discs")
    assert "# My discs" in (hub_folder / "README.md").read_text()


def test_models_are_pushed_with_a_card_too(pipe, hub_folder):
    pipe.vae.push_to_hub("tokenizer")
    assert (hub_folder / "README.md").exists()
    result = AutoencoderKLProMAG.from_pretrained(hub_folder)
    assert all(torch.equal(a, b) for a, b in zip(result.parameters(), pipe.vae.parameters(), strict=True))


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
@pytest.mark.parametrize("cls", [DiffusionPipeline, ProMAGPipeline])
def test_a_part_with_a_missing_tensor_is_refused(folder, part, cls):
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks {re.escape(name)}"):
        loaded(folder, cls)


def test_a_text_encoder_with_a_missing_tensor_is_refused(folder):
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("final_layer_norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its file lacks final_layer_norm\.weight \(1 tensors\)"):
        load_frozen(str(folder), None, 10)


def test_tied_weights_may_be_saved_once(tmp_path):
    write_t5(tmp_path)
    load_frozen(str(tmp_path), None, 8)
    check_complete(load_frozen(str(tmp_path), None, 8)[1], tmp_path)


def test_a_name_that_is_no_folder_is_looked_up_by_diffusers(tmp_path):
    for use in ({}, {"use_safetensors": True}):
        with pytest.raises(OSError, match="nowhere"):
            AutoencoderKLProMAG.from_pretrained(str(tmp_path / "nowhere"), **use)
