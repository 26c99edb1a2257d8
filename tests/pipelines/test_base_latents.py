import dataclasses
import json

import pytest
import torch
from diffusers import AutoencoderKLWan

from promag import AutoencoderKLProMAG, load_tokenizer
from promag.data.buckets import Bucket
from promag.data.stream import DrawnClips
from promag.pipelines import base_latents
from promag.pipelines.base_latents import open_base_latents
from promag.tokenizer.config import StageConfig, TokenizerConfig, TokenizerDataConfig
from promag.tokenizer.distillation import Distillation
from promag.tokenizer.growth import Growth
from promag.tokenizer.losses import latent_loss
from promag.tokenizer.objectives import StageObjective
from promag.tokenizer.train import train_tokenizer
from promag.training.config import UserError
from promag.training.run import load_checkpoint
from tests.conftest import make_tokenizer, optimization_config, run_config
from tests.existing_models import small_existing


def config_for(folder, steps=4, **change):
    """Return the settings of growing 8x and 16x on the autoencoder in folder/wan; two latent steps, then pixels."""
    stages = [
        StageConfig(
            ratio=ratio,
            frames=ratio + 1,
            growth=Growth(width=16),
            latent_pretrain_steps=2,
            latent_batch_size=2,
            optimization=optimization_config(steps=steps, learning_rate=1e-2),
        )
        for ratio in (8, 16)
    ]
    data = TokenizerDataConfig(
        train="synthetic",
        validation="synthetic",
        synthetic_clips=8,
        size=32,
        temporal_strides=(1,),
        validation_clips=1,
        latent_cache=str(folder / "latents"),
        latent_clips=6,
    )
    values = {"output_dir": str(folder / "run"), "precision": "fp32", "init": str(folder / "wan"), "data": data}
    return TokenizerConfig(**{**values, "stages": tuple(stages), "run": run_config(save_every=1), **change})


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown")
    small_existing("Wan 2.1").save_pretrained(folder / "wan")
    train_tokenizer(config_for(folder), open_latents=open_base_latents)
    return folder


def test_levels_grow_on_cached_latents_then_on_pixels_and_leave_the_base_as_it_is(grown):
    base = AutoencoderKLWan.from_pretrained(grown / "wan")
    merged, small = load_tokenizer(grown / "run" / "tokenizer"), load_tokenizer(grown / "run" / "growth")
    x = torch.rand(1, 3, 17, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(merged.encode(x, 4).latent_dist.parameters, base.encode(x).latent_dist.parameters)
        assert torch.equal(merged.encode(x).latent_dist.parameters, small.encode(x).latent_dist.parameters)
        assert not torch.equal(merged.encode(x).latent_dist.mode(), base.encode(x[:, :, ::4]).latent_dist.mode())
    assert json.loads((grown / "run" / "growth" / "growth.json").read_text())["path"] == "../../wan"  # from there
    for ratio in (8, 16):
        lines = [json.loads(line) for line in (grown / "run" / f"{ratio}x" / "metrics.jsonl").read_text().splitlines()]
        kinds = ["latent" if "latent" in line else "pixels" for line in lines if "loss" in line]
        assert kinds == ["latent", "latent", "pixels", "pixels"]


def test_the_cache_holds_the_bases_latents_of_the_clips_that_training_draws(grown):
    config, base = config_for(grown), AutoencoderKLWan.from_pretrained(grown / "wan")
    model = AutoencoderKLProMAG.from_base(base)
    model.grow(Growth(width=16))

    class Fixed:
        def items(self, *_):
            raise AssertionError("a whole cache needs no clips")

    latents = open_base_latents(config, config.stages[0], model, DrawnClips(Fixed(), 0))
    assert len(latents) == 6
    item = latents.item(3, None)
    assert sorted(item) == ["latents 1", "latents 2"]
    assert (item["latents 1"].shape, item["latents 2"].shape) == ((4, 3, 4, 4), (4, 2, 4, 4))
    with torch.no_grad():
        batch = {key: value[None] for key, value in item.items()}
        loss = StageObjective(model, config.stages[0])(batch, [torch.Generator()], 0)["loss"]
    # at birth the estimate of the base's latents repeats those of every second frame
    twice = batch["latents 2"].repeat_interleave(2, 2)[:, :, 1:]
    assert loss.item() == pytest.approx(latent_loss(twice, batch["latents 1"]).item(), rel=1e-5)


def test_stages_of_other_strides_have_caches_of_their_own(grown, monkeypatch):
    class StoppedError(Exception):
        pass

    def stop(caches, *_, **__):
        raise StoppedError([folder.name for folder in caches])

    monkeypatch.setattr(base_latents, "write_latents", stop)
    config, model = config_for(grown), AutoencoderKLProMAG.from_base(AutoencoderKLWan.from_pretrained(grown / "wan"))
    model.grow(Growth(width=16))
    for strides, names in ((None, ["9x32x32-every-1", "9x32x32-every-2"]), ((1, 2), ["9x32x32-stride-1-stride-2-every-1"])):
        stage = dataclasses.replace(config.stages[0], temporal_strides=strides)
        with pytest.raises(StoppedError) as stopped:
            open_base_latents(config, stage, model, DrawnClips(None, 0))
        assert stopped.value.args[0][: len(names)] == names


def test_a_run_on_cached_latents_resumes_to_the_bit(grown, tmp_path):
    (tmp_path / "wan").symlink_to(grown / "wan")
    (tmp_path / "latents").symlink_to(grown / "latents")
    for stop in (1, 2, None, None):  # in the latent steps, in the pixel steps, at their end
        if stop is None:  # the cache is no longer needed
            (tmp_path / "latents").unlink(missing_ok=True)
        change = {"run": run_config(save_every=1, stop_after=stop), "only_stage": 8}
        train_tokenizer(config_for(tmp_path, **change), open_latents=open_base_latents)
    assert not (tmp_path / "latents").exists()
    resumed, whole = (load_checkpoint(folder / "run" / "8x" / "step-00000004")[0] for folder in (tmp_path, grown))
    for name, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name


def test_latents_of_another_base_are_refused(grown, tmp_path):
    other = small_existing("Wan 2.1")
    with torch.no_grad():
        other.encoder.conv_in.bias.add_(1)
    other.save_pretrained(tmp_path / "wan")
    (tmp_path / "latents").symlink_to(grown / "latents")
    with pytest.raises(UserError, match="another tokenizer"):
        train_tokenizer(config_for(tmp_path), open_latents=open_base_latents)
    data = dataclasses.replace(config_for(tmp_path).data, latent_clips=5)
    fewer = config_for(tmp_path, data=data, init=str(grown / "wan"), output_dir=str(tmp_path / "fewer"))
    with pytest.raises(UserError, match="was made from drawn_clips 6 instead of 5"):
        train_tokenizer(fewer, open_latents=open_base_latents)
    make_tokenizer(levels=1).save_pretrained(tmp_path / "own")
    own = config_for(tmp_path, init=str(tmp_path / "own"), output_dir=str(tmp_path / "own-run"))
    with pytest.raises(UserError, match="only an existing autoencoder's latents are cached"):
        train_tokenizer(own, open_latents=open_base_latents)
    data = dataclasses.replace(own.data, latent_clips=0)
    with pytest.raises(ValueError, match="latent_clips 0"):
        config_for(tmp_path, data=data)
    with pytest.raises(ValueError, match="latent_cache with distill: a student needs pixels"):
        config_for(tmp_path, distill=Distillation(teacher="wan"))
    two = (Bucket(9, 32, 32), Bucket(9, 32, 48))
    stages = tuple(dataclasses.replace(stage, buckets=two) for stage in config_for(tmp_path).stages[:1])
    bucketed = config_for(tmp_path, stages=stages, output_dir=str(tmp_path / "buckets"))
    with pytest.raises(UserError, match="latent_cache: stage 8x has 2 buckets; cached latents are of one shape"):
        train_tokenizer(bucketed, open_latents=open_base_latents)
    with pytest.raises(ValueError, match=r"latent_cache .*latents: needs `open_latents`"):
        train_tokenizer(config_for(tmp_path, output_dir=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="base_features 'encoder'"):
        config_for(tmp_path, base_features="encoder")


def test_the_batch_size_of_a_bucket_changes_no_cached_clip(grown, tmp_path):
    stages = tuple(
        dataclasses.replace(stage, buckets=(Bucket(9, 32, 32, batch_size=3),)) for stage in config_for(grown).stages[:1]
    )
    drawn = []

    def open_latents(config, stage, model, clips):
        drawn.extend(clips.fixed(i)["sample"] for i in range(6))
        return open_base_latents(config, stage, model, clips)

    config = config_for(grown, stages=stages, output_dir=str(tmp_path / "run"))
    data = dataclasses.replace(config.data, latent_cache=str(tmp_path / "latents"))
    train_tokenizer(dataclasses.replace(config, data=data), open_latents=open_latents)
    assert drawn == [*range(6)]
