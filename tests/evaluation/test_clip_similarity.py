"""CLIP similarity equals that of the models called directly, with random weights."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from promag.diffusion.text import learn_vocabulary
from promag.evaluation.clip_similarity import ClipSimilarity
from promag.training.config import UserError
from tests.diffusion.test_text import OPEN_CLIP, TINY_PICTURES, write_openclip

PROMPT = "a red disc moves left"


@pytest.fixture
def video():
    return np.random.default_rng(0).integers(0, 256, (35, 40, 48, 3), np.uint8)  # more frames than one batch


def write_clip(folder):
    """Write a tiny CLIP model of transformers with random weights; return the folder."""
    torch.manual_seed(0)
    words = learn_vocabulary([PROMPT], 300, max_length=12)
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **ends}
    config = CLIPConfig(text_config={**text, "max_position_embeddings": 12}, vision_config=TINY_PICTURES, projection_dim=16)
    for part in (CLIPModel(config), words, CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def openclip_folder(tmp_path_factory):
    torch.manual_seed(0)
    return write_openclip(tmp_path_factory.mktemp("clips") / "openclip", OPEN_CLIP)


@torch.no_grad()
def mean_cosine(text, pictures):
    return float(np.mean([torch.cosine_similarity(text, picture).item() for picture in pictures]))


def test_a_transformers_clip_model_gives_its_own_cosine(clip_folder, video):
    model = CLIPModel.from_pretrained(clip_folder).eval()
    words, prepare = learn_vocabulary([PROMPT], 300, max_length=12), CLIPImageProcessor.from_pretrained(clip_folder)
    tokens = words([PROMPT], return_tensors="pt", truncation=True)
    similarities = []
    for frame in video:  # logits_per_image is the cosine times a learned scale
        pixels = prepare(Image.fromarray(frame), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = model(tokens["input_ids"], pixels, tokens["attention_mask"])
            similarities.append(float(output.logits_per_image / model.logit_scale.exp()))
    assert ClipSimilarity.load(str(clip_folder))(video, PROMPT) == pytest.approx(np.mean(similarities), abs=1e-5)
    assert np.std(similarities) > 1e-5


def test_an_openclip_model_gives_its_own_cosine(openclip_folder, video):
    name = f"local-dir:{openclip_folder}"
    model, _, prepare = open_clip.create_model_and_transforms(name)
    model.eval()
    with torch.no_grad():
        text = model.encode_text(open_clip.get_tokenizer(name)([PROMPT]))
        pictures = [model.encode_image(prepare(Image.fromarray(frame))[None]) for frame in video]
    expected = mean_cosine(text, pictures)
    assert ClipSimilarity.load(f"open_clip:{name}")(video, PROMPT) == pytest.approx(expected, abs=1e-5)


def test_weights_of_a_named_openclip_model_come_from_a_file(openclip_folder, video):
    (openclip_folder / "tiny-test.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(openclip_folder / "tiny-test.json")
    named = ClipSimilarity.load("open_clip:tiny-test", str(openclip_folder / "open_clip_pytorch_model.bin"))
    whole = ClipSimilarity.load(f"open_clip:local-dir:{openclip_folder}")
    assert named(video[:3], PROMPT) == pytest.approx(whole(video[:3], PROMPT), abs=1e-6)


def test_a_long_prompt_is_cut_and_what_it_loses_is_named(clip_folder, openclip_folder, video, caplog):
    long = f"{PROMPT} {PROMPT} {PROMPT}"
    for model, length in (
        (clip_folder, 12),
        (f"open_clip:local-dir:{openclip_folder}", OPEN_CLIP["text_cfg"]["context_length"]),
    ):
        caplog.clear()
        score = ClipSimilarity.load(str(model))
        assert score(video[:2], f"{long} {PROMPT}") == score(video[:2], f"{long} {long}")
        first, _ = (record.getMessage() for record in caplog.records)
        assert first.startswith(f"prompt '{long} {PROMPT}' is longer than the CLIP model's {length} tokens: '")
        kept, lost = first.split("'")[1], first.split("'")[-2]
        assert kept.endswith(lost)
        assert len(kept) > len(lost) > len(PROMPT)
        caplog.clear()
        score(video[:2], PROMPT)
        assert not caplog.records


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("nowhere", None, r"clip nowhere: no config\.json there"),
        ("open_clip:ViT-B-32", None, "needs a file with its trained weights"),
        ("open_clip:ViT-B-32", "nowhere.bin", r"no file nowhere\.bin"),
        ("open_clip:local-dir:nowhere", None, "clip open_clip:local-dir:nowhere: cannot be loaded"),
        ("open_clip:local-dir:nowhere", "a.bin", r"includes its weights; leave a\.bin out"),
        ("folder", "a.bin", r"includes its weights; leave a\.bin out"),
    ],
)
def test_missing_models_and_packages_are_named(model, weights, message):
    with pytest.raises(UserError, match=message) as error:
        ClipSimilarity.load(model, weights)
    assert "\n" not in str(error.value)


def test_a_folder_without_the_image_tower_is_refused(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(clip_folder / "model.safetensors")
    text = {key: value for key, value in weights.items() if not key.startswith("vision_model.")}
    save_file(text, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"no weights there for vision_model\."):
        ClipSimilarity.load(str(tmp_path))
