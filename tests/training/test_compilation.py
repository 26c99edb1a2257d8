"""Compiled blocks, traced but without code generation, which is PyTorch's matter."""

import pytest
import torch

from promag import AutoencoderKLProMAG
from promag.training import compilation
from promag.training.compilation import compile_blocks, no_recompile
from promag.training.config import UserError
from tests.conftest import SHORT, make_tokenizer
from tests.existing_models import small_existing


@pytest.fixture(autouse=True)
def traced_alone(monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    yield
    torch.compiler.reset()


def losses_and_gradients(model, clip):
    model.zero_grad()
    posterior = model.encode(clip, 8).latent_dist
    loss = model.decode(posterior.mode(), 8).sample.square().mean()
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def test_compiled_blocks_compute_the_same_and_keep_their_names(clip):
    model = make_tokenizer(levels=2, settle=0.05, base=SHORT)
    names = list(model.state_dict())
    loss, gradients = losses_and_gradients(model, clip[:, :, :9])
    torch._dynamo.utils.counters.clear()
    compile_blocks(model)
    result = losses_and_gradients(model, clip[:, :, :9])
    assert list(model.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 5
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(result[0], loss)
    torch.testing.assert_close(result[1], gradients)


def test_streaming_through_compiled_blocks_equals_the_whole(clip):
    model = make_tokenizer(levels=2, settle=0.05, base=SHORT)
    clip = clip[:, :, :17]
    with torch.no_grad():
        whole = model.encode(clip, 8).latent_dist.mode()
        compile_blocks(model)
        torch.testing.assert_close(model.encode(clip, 8).latent_dist.mode(), whole)


def test_no_recompile_compiles_nothing_new(clip):
    model = make_tokenizer(levels=1)
    compile_blocks(model)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad(), no_recompile():
        model.encode(clip, 4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_a_model_that_names_no_blocks_is_refused():
    model = AutoencoderKLProMAG.from_base(small_existing("CogVideoX"))
    with pytest.raises(UserError, match=r"compile: .*set it to false"):
        compile_blocks(model)
