"""Settings of a tokenizer's training that would be ignored, or would train towards themselves, are refused."""

import dataclasses
import math

import pytest

from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from promag.tokenizer.base import BaseConfig
from promag.tokenizer.growth import Growth
from promag.tokenizer.train import train_tokenizer
from promag.training.config import UserError, build, plain
from tests.conftest import SHORT, TINY
from tests.tokenizer.test_train import data_config, make_config, stage

CACHED = data_config(latent_cache="latents")


def test_a_model_beside_init_is_refused(tmp_path):
    with pytest.raises(ValueError, match="init base, model given: the base is that of `init`; give model null"):
        make_config(tmp_path, init="base", model=BaseConfig(**TINY))


def test_latent_steps_that_would_do_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="latent_pretrain_steps 2 without growth: a level that is not grown has no lower"):
        stage(4, 5, latent_pretrain_steps=2)
    with pytest.raises(ValueError, match="latent_cache latents: no stage has latent_pretrain_steps, which alone train on"):
        make_config(tmp_path, init="wan", data=CACHED, stages=(stage(8, 9, Growth()),))


def test_a_stage_does_not_regress_latents_of_an_encoder_that_it_trains(tmp_path):
    def config(growth, cached=None, before=()):
        stages = (*before, stage(16, 17, growth, latent_pretrain_steps=2, trainable="all"))
        return make_config(tmp_path, init="wan", stages=stages, data=data_config(latent_cache=cached))

    moves = "stage 16x: latent_pretrain_steps 2 with trainable all: they would train the encoder whose latents they regress"
    with pytest.raises(ValueError, match=moves):
        config(Growth())
    with pytest.raises(ValueError, match=moves):
        config(Growth(), cached="latents", before=(stage(8, 9, Growth(), 2),))
    # The target is fixed: the level trains copies of the encoders, or regresses cached latents of the base.
    assert config(Growth(encoder="finetune")).stages[0].latent_pretrain_steps == 2
    assert config(Growth(), cached="latents").stages[0].latent_pretrain_steps == 2


def test_values_that_cannot_be_meant_are_refused(tmp_path):
    for name, value in (("mse_weight", -6.0), ("kl_weight", -1.0), ("mse_weight", math.nan), ("between_weight", math.inf)):
        with pytest.raises(ValueError, match=f"{name} {value}: 0 or more is needed, and finite"):
            dataclasses.replace(stage(8, 9), **{name: value})
    for strides in ((), (0, 1)):
        for made in (stage(8, 9), data_config()):
            with pytest.raises(ValueError, match=r"temporal_strides \[.*\]: needs one or more whole numbers from 1 up"):
                dataclasses.replace(made, temporal_strides=strides)
    with pytest.raises(ValueError, match=r"buckets \[\]: give one or more, or null"):
        dataclasses.replace(stage(8, 9), buckets=())
    with pytest.raises(ValueError, match="seed -1: 0 or above is needed"):
        make_config(tmp_path, seed=-1)
    with pytest.raises(
        UserError, match="model: down-sampling 8 -> 10 channels by 4x2x2: 128 gathered channels are no multiple"
    ):
        train_tokenizer(make_config(tmp_path / "m", model=BaseConfig(**{**SHORT, "block_out_channels": (8, 10)})))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block_out_channels", [8], "1 strides: 1 widths need one fewer than widths"),
        ("block_out_channels", [8, 0], r"block_out_channels \[8, 0\]: whole numbers from 1 up are needed"),
        ("latent_channels", 0, "latent_channels 0: whole numbers from 1 up are needed"),
        ("layers_per_block", -1, "layers_per_block -1: whole numbers from 1 up are needed"),
        ("strides", [[4, -2]], r"strides \[\[4, -2\]\]: whole numbers from 1 up are needed"),
        ("strides", [[4, 3]], "patch_size times spatial strides is 12: it must be one of 8, 16, 32"),
        ("framewise", 3, r"framewise 3 with strides \[\[4, 2\]\]: a number of the finest widths is needed, from 0 to 1"),
    ],
)
def test_a_base_that_cannot_be_built_is_refused_by_configurations_and_by_the_model(name, value, message):
    values = {**SHORT, name: value}
    with pytest.raises(ValueError, match=message):
        AutoencoderKLProMAG(**values)
    with pytest.raises(UserError, match=message):
        build(BaseConfig, plain(values), "test")
