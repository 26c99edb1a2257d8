"""The tiny pipeline, and the arguments with which the tests call it."""

import copy

import pytest
import torch

from promag import ProMAGPipeline
from tests.tiny_pipeline import PROMPTS, SIZES, make_pipeline


@pytest.fixture(scope="session")
def pipe():
    return make_pipeline()


def seed(n=0):
    return torch.Generator().manual_seed(n)


def call(pipe, prompt=PROMPTS[0], **arguments):
    return pipe(prompt, **{"num_inference_steps": 2, "generator": seed(), **arguments}).frames


def like(pipe, **changes):
    """Return a pipeline with copies of the parts, with changes; tests may modify it."""
    pipeline = ProMAGPipeline(**{**copy.deepcopy(pipe.components), **changes}, **SIZES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
