"""Fixtures shared by all tests: one thread per process, no network, tiny models."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # also in scripts that tests start: several threads on busy cores wait for each other

import pytest
import torch
from hypothesis import settings

from promag.tokenizer.autoencoder import AutoencoderKLProMAG
from promag.tokenizer.growth import Growth
from promag.training.loop import RunConfig
from promag.training.optimizers import OptimizationConfig
from tests.browser import start_chromium

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # guards against a loss of power, which no test has, and waits for the disk
# A deadline in wall-clock time measures what else the machine does.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")

# The smallest autoencoder with every part: 4x8x8 base, one block a width.
TINY = {
    "latent_channels": 4,
    "patch_size": 4,
    "block_out_channels": (16, 16, 16),
    "layers_per_block": 1,
    "strides": ((2, 2), (2, 1)),
    "linear_shortcuts": True,
}
# Half of its layers: for tests that train, load or compile it many times.
SHORT = {**TINY, "block_out_channels": (8, 8), "strides": ((4, 2),)}


def optimization_config(**changes) -> OptimizationConfig:
    """Return the settings of a training of four steps, with changes."""
    values = {"steps": 4, "batch_size": 1, "accumulate": 1, "learning_rate": 1e-3, "warmup": 1, "schedule": "cosine"}
    values |= {"weight_decay": 0.0, "clip_norm": 1.0, "ema_decay": 0.9, "max_skipped": 0, "muon_learning_rate": None}
    return OptimizationConfig(**{**values, **changes})


def run_config(**changes) -> RunConfig:
    """Return the run settings of such a training: every step is logged, every second step is validated and saved."""
    values = {"log_every": 1, "validate_every": 2, "save_every": 2, "keep_last": 2, "keep_every": None, "workers": 0}
    values |= {"distributed": "ddp", "stop_after": None, "trackers": (), "peak_tflops": 1.0}
    return RunConfig(**{**values, **changes})


def make_tokenizer(levels: int = 3, seed: int = 0, settle: float = 0.0, base=TINY, **growth) -> AutoencoderKLProMAG:
    """Return a tokenizer with `levels` levels; `settle` moves every weight at random, as training would."""
    torch.manual_seed(seed)
    model = AutoencoderKLProMAG(**base)
    for _ in range(levels - 1):
        model.grow(Growth(**growth))
    if settle:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * settle)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> AutoencoderKLProMAG:
    """Return a tokenizer of three levels in which no weight has its initial zeros."""
    return make_tokenizer(settle=0.05)


@pytest.fixture
def clip() -> torch.Tensor:
    """1 3 33 16 24: smooth random colours that move."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 9, 3, 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (33, 16, 24), mode="trilinear")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return a headless Chromium with a new profile for each test file; skip the test if Chromium is missing."""
    driver = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


def pytest_collection_finish() -> None:
    """Keep what imports made out of later garbage collections: each training runs one, over a million objects."""
    gc.collect()
    gc.freeze()
