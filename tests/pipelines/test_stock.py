"""Stock WanPipelines behind our sampling: the same videos as their own call gives, and errors where they would round."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from PIL import Image
from safetensors.torch import save_file

from promag import load_pipeline
from promag.evaluation.generation import generation_figures
from promag.evaluation.sampling_cost import Seconds
from promag.pipelines.sampling import Draft, SampleRequest, make_videos, open_pipeline, sample_videos, trained_ratios
from promag.pipelines.stock import SETTINGS, StockDefaults, StockPipeline, load_stock
from promag.scripts import sample
from promag.scripts._parts import _limit_ratios
from promag.training.config import UserError
from promag.training.loop import seeded
from tests.existing_models import small_existing
from tests.wan import make_grown, make_stock, make_transformer

SHAPE = {"height": 32, "width": 48, "num_frames": 9, "fps": 8.0, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("stock") / "pipeline"
    StockPipeline(make_stock(), StockDefaults(**SHAPE)).save_pretrained(place)
    return place


def test_videos_are_those_of_the_stock_call(folder):
    pipe = open_pipeline(folder)
    assert isinstance(pipe, StockPipeline)
    assert trained_ratios(pipe) == (4,)
    pipe.set_progress_bar_config(disable=True)
    requests, steps = [SampleRequest("a red disc", 3), SampleRequest("a blue square", 4)], []
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "on_progress": lambda done, total: steps.append((done, total))}
    (one, seconds), (other, _) = make_videos(pipe, requests, 1, "fp32", **options)
    assert steps[-1] == (6, 6)
    assert isinstance(seconds, Seconds)
    assert min(seconds.text, seconds.denoising, seconds.decoding) > 0
    stock = DiffusionPipeline.from_pretrained(folder)
    assert type(stock) is WanPipeline
    stock.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 2.0}
    for (video,), request in zip((one, other), requests, strict=True):
        generator = torch.Generator().manual_seed(request.seed)
        expected = stock(request.prompt, generator=generator, max_sequence_length=8, **call).frames[0]
        assert video.shape == (9, 32, 48, 3)
        assert abs(video - expected * 255).max() <= 0.51


def test_latents_are_decoded_as_in_the_stock_call(folder):
    pipe = open_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red disc", "num_inference_steps": 2, "guidance_scale": 1.0}
    latents = pipe(generator=seeded(1), output_type="latent", **call).frames
    for output_type in ("np", "pt"):
        frames = pipe(generator=seeded(1), output_type=output_type, **call).frames
        decoded = pipe.decode_latents(latents, output_type=output_type)
        assert type(decoded) is type(frames)
        assert abs(decoded - frames).max() < 1e-5
    with pytest.raises(ValueError, match="temporal ratio 8: this tokenizer has 4x"):
        pipe.decode_latents(latents, 8)
    with torch.no_grad():
        for parameter in pipe.vae.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match="video decoded from finite latents: holds NaN"):
        pipe.decode_latents(latents)


def test_embeddings_lose_their_padding(folder):
    pipe = open_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    embeds, _ = pipe.pipe.encode_prompt("a red disc", do_classifier_free_guidance=False, max_sequence_length=8)
    mask = embeds.abs().sum(-1) > 0
    assert 0 < mask.sum() < 8
    given = {"prompt_embeds": embeds + ~mask[..., None], "prompt_attention_mask": mask}
    latents = [pipe(generator=seeded(1), **text, **call).frames for text in (given, {"prompt": "a red disc"})]
    assert torch.allclose(*latents, atol=1e-5)
    unmasked = pipe(generator=seeded(1), prompt_embeds=given["prompt_embeds"], **call).frames
    assert not torch.allclose(unmasked, latents[0], atol=1e-3)


def test_a_folder_without_settings_has_the_shape_of_the_published_models_and_our_steps(folder, tmp_path):
    make_stock().save_pretrained(tmp_path)
    pipe = open_pipeline(tmp_path)
    assert pipe.config == {
        **{"height": 480, "width": 832, "num_frames": 81, "fps": 16.0, "temporal_ratios": (), "max_sequence_length": 512},
        **{"temporal_ratio": 4, "num_inference_steps": 30, "guidance_scale": 4.0},
    }
    values = json.loads((folder / SETTINGS).read_text())
    assert values == {**SHAPE, "temporal_ratios": [4], "num_inference_steps": 30, "guidance_scale": 4.0}


def test_prompt_accuracy_is_measured(folder):
    figures = generation_figures(open_pipeline(folder), 4, prompts=2, steps=1, guidance=1.0)
    assert figures["accuracy"].keys() == {"shape", "colour", "motion", "all"}
    assert figures["sampling_seconds"] > 0


def test_sample_writes_videos_and_names_mistakes(folder, tmp_path, capsys):
    arguments = [str(folder), "--prompt", "a red disc", "--out", str(tmp_path / "out.mp4"), "--steps", "1"]
    sample.main(arguments)
    assert "1 video of 9 frames of 48x32 at 4x, 1 steps" in capsys.readouterr().out
    for change, message in (
        (["--frames", "10"], "10 frames: 4x needs 1 . 4k; use 9 or 13"),
        (["--height", "40"], "height 40: needs a multiple of 16; use 32 or 48"),
        (["--ratio", "8"], "temporal ratio 8: this tokenizer has 4x"),
        (["--draft-ratio", "8"], "draft: a WanPipeline starts from noise"),
    ):
        with pytest.raises(UserError, match=message):
            sample.main([*arguments, *change])
    Image.new("RGB", (48, 32)).save(tmp_path / "first.png")
    with pytest.raises(UserError, match=r"image: no argument that can be given here; legal are .*guidance_scale"):
        sample.main([*arguments, "--image", str(tmp_path / "first.png")])


def test_drafts_and_our_own_commands_refuse_it(folder, tmp_path):
    with pytest.raises(ValueError, match="draft: a WanPipeline starts from noise; leave drafts out"):
        next(make_videos(open_pipeline(folder), [SampleRequest("a", 0)], draft=Draft(8, 1, 0.5)))
    with pytest.raises(UserError, match="a WanPipeline, which sample, evaluate-pipeline and compare-budgets take"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("model_index.json", {"vae": ["os", "system"]}, "vae is system of 'os': legal are promag, diffusers, transformers"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKLMochi"]}, "AutoencoderKLWan or AutoencoderKLProMAG is needed"),
        (SETTINGS, {"colour": "red"}, "cannot be loaded: .*colour"),
        (SETTINGS, {"temporal_ratios": [16]}, "temporal ratio 16: this tokenizer has 4x"),
    ],
)
def test_damaged_folders_are_refused(folder, tmp_path, file, value, message):
    shutil.copytree(folder, tmp_path / "copy")
    place = tmp_path / "copy" / file
    place.write_text(json.dumps({**json.loads(place.read_text()), **value}))
    with pytest.raises(UserError, match=message):
        open_pipeline(tmp_path / "copy")


def test_other_prompts_change_nothing(folder):
    pipe = open_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    alone = sample_videos(pipe, ["a red disc"], 2, 3.0, "fp32", name=None)[0]
    first, _ = sample_videos(pipe, ["a red disc", "a blue square grows"], 2, 3.0, "fp32", name=None)
    assert abs(alone.astype(int) - first).max() <= 1


def test_a_grown_autoencoder_takes_the_place_of_the_pipelines_own(tmp_path, capsys):
    make_grown().save_pretrained(tmp_path / "grown")
    call = [str(tmp_path / "plain"), "--prompt", "a red disc", "--steps", "1", "--frames", "17", "--height", "32"]
    make_stock().save_pretrained(call[0])
    sample.main([*call, "--width", "32", "--tokenizer", str(tmp_path / "grown"), "--out", str(tmp_path / "out.gif")])
    assert "1 video of 17 frames of 32x32 at 16x, 1 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        (lambda: small_existing("LTX"), "its latents have channels 8, those of the pipeline's own 4; give one grown from that"),
        (lambda: small_existing("Wan 2.2"), "its latents have pixels a position 16, those of the pipeline's own 8"),
        (lambda: small_existing("Wan 2.1"), "its latents_mean and latents_std are not those of the pipeline's own"),
    ],
)
def test_an_autoencoder_of_other_latents_is_refused(folder, tmp_path, vae, message):
    vae().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"tokenizer {tmp_path}: {message}"):
        open_pipeline(folder, tmp_path)


def test_model_offload_changes_no_video(folder):
    pipe, own = open_pipeline(folder), open_pipeline(folder)
    own.pipe.enable_model_cpu_offload(device="cpu")
    one, other = (sample_videos(each, ["a red disc"], 1, 1.0, "fp32", name=None)[0].astype(int) for each in (pipe, own))
    assert abs(one - other).max() <= 1  # weights lie elsewhere in memory, so sums may round differently
    assert len(own.pipe._all_hooks) == 3


def test_offload_without_a_gpu_is_refused(folder, monkeypatch):
    monkeypatch.setattr("promag.pipelines.sampling.best_device", lambda: torch.device("cpu"))
    with pytest.raises(UserError, match="offload: there is no GPU here to move models to; leave it out"):
        open_pipeline(folder, offload=True)


def test_the_default_ratio_survives_saving(tmp_path):
    stock = StockPipeline(make_stock(vae=make_grown(levels=2)))
    assert stock.config["temporal_ratio"] == 8
    stock.save_pretrained(tmp_path)
    loaded = load_stock(tmp_path)
    assert loaded.config["temporal_ratio"] == 8
    assert sorted(loaded.temporal_ratios) == [4, 8]


def test_adapters_may_be_of_a_ratio_that_the_base_was_not_trained_at(tmp_path):
    stock = StockPipeline(make_stock(vae=make_grown(levels=2)), StockDefaults(temporal_ratios=(4,)))
    assert _limit_ratios(stock, [8], tmp_path) == [8]
    assert stock.config["temporal_ratio"] == 8
    with pytest.raises(UserError, match="trained at 16x; this pipeline samples at 4x, 8x; name the autoencoder"):
        _limit_ratios(stock, [16], tmp_path)


def test_a_pipeline_that_states_no_shape_is_sampled_as_its_authors_do(tmp_path):
    make_stock().save_pretrained(tmp_path / "2.1")
    make_stock(expand_timesteps=True).save_pretrained(tmp_path / "2.2")
    keys = ("height", "width", "num_frames", "fps")
    older, newer = ([load_stock(tmp_path / name).config[key] for key in keys] for name in ("2.1", "2.2"))
    assert (older, newer) == ([480, 832, 81, 16.0], [704, 1280, 121, 24.0])
    StockPipeline(make_stock(expand_timesteps=True), StockDefaults(**SHAPE)).save_pretrained(tmp_path / "trained")
    assert {**load_stock(tmp_path / "trained").config, **SHAPE} == load_stock(tmp_path / "trained").config


def test_adapters_for_one_of_two_transformers_are_refused(tmp_path):
    make_stock(transformer_2=make_transformer(), boundary_ratio=0.9).save_pretrained(tmp_path / "two")
    make_stock().save_pretrained(tmp_path / "one")
    layer = "transformer.blocks.0.attn1.to_q"
    width = make_transformer().blocks[0].attn1.to_q.in_features
    weights = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
    save_file(weights, tmp_path / "lora.safetensors")
    words = ["--prompt", "a red disc", "--lora", str(tmp_path / "lora.safetensors"), "--out", str(tmp_path / "out.mp4")]
    shape = ["--frames", "5", "--height", "32", "--width", "32", "--steps", "1"]
    assert sample.main([str(tmp_path / "one"), *words, *shape]) == 0
    with pytest.raises(UserError, match=r"LoRA .*lora\.safetensors: the pipeline has two transformers"):
        sample.main([str(tmp_path / "two"), *words, *shape])
