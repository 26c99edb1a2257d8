"""Replayed calls of the transformer, with a stand-in for the GPU: tests/test_cuda.py has the same on one."""

import copy
import functools

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from torch.nn.parallel import DistributedDataParallel

from promag.diffusion.config import MAY_CHANGE
from promag.pipelines.build import train_pipeline
from promag.scripts.benchmarks.speed import main
from promag.scripts.reliability.odd_arguments import make_transformer
from promag.training import compilation, graphs
from promag.training.compilation import compile_blocks
from promag.training.config import UserError
from promag.training.graphs import check_graphs, disable_graphs, enable_graphs, recompute_block
from tests.diffusion.test_buckets import configuration
from tests.stand_in_recorder import StandInRecorder
from tests.wan import make_transformer as make_wan

SHAPES = ((1, 1), (2, 2))  # clips, latent frames


@pytest.fixture
def recorder():
    return StandInRecorder()


@pytest.fixture
def pair(recorder):
    """A transformer whose calls run as they are, and one with the same weights whose calls are replayed."""
    torch.manual_seed(0)
    plain = make_transformer().train()
    replayed = copy.deepcopy(plain)
    enable_graphs(replayed, recorder)
    return plain, replayed


def arguments(clips=1, frames=1, seed=0, learned=False, **changes):
    """Arguments of a call; with `learned` text has gradients, as that of a text model that is trained along."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    return {
        "hidden_states": draw(clips, 4, frames, 2, 3),
        "timestep": 1000 * torch.rand(clips, generator=generator),
        "encoder_hidden_states": (draw(clips, 5, 16).requires_grad_(learned),),
        "encoder_attention_mask": (torch.arange(5).expand(clips, -1) < 4,),
        "pooled_projections": draw(clips, 16).requires_grad_(learned),
        "temporal_ratio": 16,
        "fps": torch.full((clips,), 8.0),
        "return_dict": False,
        **changes,
    }


def predict(model, **given):
    with torch.no_grad():
        return model(**given)[0]


def learn(model, **given):
    """Add a call's gradients to those of the model; return the loss and the gradients of the text."""
    loss = (model(**given)[0] - given["hidden_states"]).square().mean()
    loss.backward()
    text = (given["encoder_hidden_states"][0], given.get("pooled_projections"))
    return [loss.detach(), *(x.grad for x in text if x is not None and x.requires_grad)]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other):
    """Assert equality up to the order in which gradients are summed: those of the outputs may have other strides."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_steps_of_two_shapes_and_several_batches_equal_plain_ones(pair, recorder, batches):
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in pair]
    for step, (clips, frames) in enumerate(SHAPES * 2):
        results = []
        for model, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            given = [arguments(clips, frames, 10 * step + part, learned=True) for part in range(batches)]
            results.append(([learn(model, **one) for one in given], gradients(model)))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
        assert_same(*results)
        assert all(len(part) == 3 for part in results[0][0])
    assert recorder.recorded == 2 * len(SHAPES)  # forward and backward passes


def test_batches_of_a_step_may_have_several_shapes(pair):
    for model in pair:
        for number, shape in enumerate((*SHAPES, *SHAPES)):
            learn(model, **arguments(*shape, number))
    assert_same(*map(gradients, pair))


def test_what_a_call_returned_is_kept(pair, recorder):
    plain, replayed = pair
    first, second = arguments(seed=1), arguments(seed=2)
    kept = predict(replayed, **first)
    predict(replayed, **second)
    assert_same(kept, predict(plain, **first))
    given = [arguments(seed=seed, learned=True) for seed in (1, 2)]
    kept = learn(replayed, **given[0])
    learn(replayed, **given[1])
    assert_same(kept, learn(plain, **arguments(seed=1, learned=True)))
    assert recorder.recorded == 3


CHANGES = (
    {"temporal_ratio": 4},
    {"fps": 24.0},
    {"encoder_attention_mask": None},
    {"timestep": torch.tensor([300.0])},
    {"return_dict": True},
)


@pytest.mark.parametrize("change", CHANGES, ids=[next(iter(change)) for change in CHANGES])
def test_arguments_that_are_no_tensors_belong_to_a_recording(pair, change):
    plain, replayed = pair
    usual, changed = arguments(), arguments(**change)
    for given in (usual, changed, usual, changed):
        assert_same(predict(replayed, **given), predict(plain, **given))


def test_values_of_tensors_belong_to_the_call(pair, recorder):
    plain, replayed = pair
    for fps, time in ((8.0, 100.0), (24.0, 900.0)):
        given = arguments(fps=torch.tensor([fps]), timestep=torch.tensor([time]))
        given["encoder_attention_mask"] = (torch.arange(5)[None] < fps / 8,)
        assert_same(predict(replayed, **given), predict(plain, **given))
    assert recorder.recorded == 1


def test_the_recording_unused_for_the_longest_time_makes_room(pair, recorder):
    plain, replayed = pair
    disable_graphs(replayed)
    enable_graphs(replayed, recorder, recordings=2)
    hook = replayed._diffusers_hook.get_hook(graphs.NAME)
    counts = []
    for ratio in (4, 8, 4, 16, 4, 8):
        given = arguments(temporal_ratio=ratio)
        assert_same(predict(replayed, **given), predict(plain, **given))
        counts.append((recorder.recorded, len(hook.recordings)))
    assert counts == [(1, 1), (2, 2), (2, 2), (3, 2), (3, 2), (4, 2)]


def test_the_backward_pass_runs_before_the_next_call_and_once(pair):
    _, replayed = pair
    first = replayed(**arguments())[0].sum()
    second = replayed(**arguments(seed=1))[0].sum()
    with pytest.raises(RuntimeError, match="backward pass of a call has to run before the next call, and once"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="before the next call, and once"):
        second.backward()


def test_calls_in_the_other_mode_and_after_the_end_run_as_they_are(pair, recorder):
    plain, replayed = pair
    assert_same(predict(replayed.eval(), **arguments()), predict(plain, **arguments()))
    assert recorder.recorded == 0
    learn(replayed.train(), **arguments())
    assert recorder.recorded == 2
    disable_graphs(replayed)
    learn(replayed, **arguments(seed=1))
    assert recorder.recorded == 2
    disable_graphs(replayed)  # nothing is left to do
    for seed in (0, 1):
        learn(plain, **arguments(seed=seed))
    assert_same(gradients(replayed), gradients(plain))
    assert list(plain.state_dict()) == list(replayed.state_dict())


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_is_that_of_the_call(pair, enabled):
    plain, replayed = pair
    outputs = []
    for model in pair:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(predict(model, **arguments()))
            loss = model(**arguments(learned=True))[0].float().square().mean()
        loss.backward()
    assert_same(*outputs)
    assert_same(*map(gradients, pair))
    assert_same(predict(replayed, **arguments()), predict(plain, **arguments()))  # outside of it
    assert torch.equal(outputs[0], predict(plain, **arguments())) != enabled


def test_weights_that_were_changed_in_place_or_moved_are_used(pair, recorder):
    counts = []
    for change in (
        lambda model: None,
        lambda model: [p.data.mul_(0.9) for p in model.parameters()],
        lambda model: [setattr(p, "data", p.data * 0.9) for p in model.parameters()],
        lambda model: model.to(torch.bfloat16),
    ):
        for model in pair:
            change(model)
        given = arguments() if pair[0].dtype == torch.float32 else halved(arguments())
        assert_same(*(predict(model, **given) for model in pair))
        counts.append(recorder.recorded)
    assert counts == [1, 1, 2, 3]


def halved(given):
    def half(x):
        return x.to(torch.bfloat16) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    tokens = tuple(map(half, given["encoder_hidden_states"]))
    return {**{key: half(value) for key, value in given.items()}, "encoder_hidden_states": tokens}


ADAPTERS = {
    "added": lambda m: m.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False)),  # pyright: ignore
    "weaker": lambda m: m.set_adapters(["default"], [0.5]),
    "off": lambda m: m.disable_adapters(),
    "on": lambda m: m.enable_adapters(),
    "fused": lambda m: m.fuse_lora(),
    "unfused": lambda m: m.unfuse_lora(),
    "removed": lambda m: m.unload_lora(),
    "others": lambda m: m.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False)),  # pyright: ignore
}


def test_adapters_may_change_between_calls(pair):
    outputs = []
    for change in ADAPTERS.values():
        for model in pair:
            torch.manual_seed(1)
            change(model)
        for given in (arguments(), arguments(attention_kwargs={"scale": 0.25}), arguments()):
            plain, replayed = (predict(model, **given) for model in pair)
            assert_same(replayed, plain)
            outputs.append(plain)
    assert len({tuple(x.flatten().tolist()) for x in outputs}) > 8
    for model in pair:
        model.requires_grad_(False)
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora" in name)
        learn(model, **arguments(learned=True))
    assert_same(*map(gradients, pair))
    assert gradients(pair[0])


def test_blocks_that_are_recomputed_and_compiled(pair, recorder, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    for model in pair:
        model.enable_gradient_checkpointing(recompute_block)
    plain, replayed = pair
    compile_blocks(replayed)
    counters = torch._dynamo.utils.counters
    counters.clear()
    try:
        for seed in (0, 1):
            for model in pair:
                learn(model, **arguments(seed=seed, learned=True))
            assert counters["stats"]["unique_graphs"] == 1  # both blocks run the same code, on weights in place of their own
        assert_same(gradients(replayed), gradients(plain))
    finally:
        torch.compiler.reset()


def test_a_replayed_transformer_of_wan():
    plain = make_wan().train()
    replayed, recorder = copy.deepcopy(plain), StandInRecorder()
    enable_graphs(replayed, recorder)
    for _ in range(3):
        x, text = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 5, 12)
        for model in (plain, replayed):
            learn(model, hidden_states=x, timestep=torch.tensor([500.0]), encoder_hidden_states=text, return_dict=False)
        assert_same(gradients(replayed), gradients(plain))
    assert recorder.recorded == 2


def test_a_replayed_model_inside_ddp(pair, tmp_path):
    plain, replayed = pair
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(replayed)
        for step in range(3):
            plain.zero_grad()
            wrapped.zero_grad()
            with wrapped.no_sync():
                learn(wrapped, **arguments(seed=2 * step))
            learn(wrapped, **arguments(seed=2 * step + 1))
            for part in (0, 1):
                learn(plain, **arguments(seed=2 * step + part))
            assert_same(gradients(replayed), gradients(plain))
    finally:
        torch.distributed.destroy_process_group()


def test_hooks_on_parts_are_refused(pair, recorder):
    _, replayed = pair
    predict(replayed, **arguments())
    replayed.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(
        ValueError, match=r"graphs: ProMAGTransformerBlock has hooks \(.+\), which offloading, caches and casts"
    ):
        predict(replayed, **arguments())
    replayed.disable_cache()
    predict(replayed, **arguments())
    assert recorder.recorded == 1
    handle = replayed.proj_out.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"graphs: Linear has hooks \(of PyTorch or accelerate\)"):
        predict(replayed, **arguments())
    other = make_transformer()
    other.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="has hooks"):
        enable_graphs(other, recorder)
    handle.remove()
    predict(replayed, **arguments())


def test_hooks_of_pytorch_on_the_model_run_around_a_replay(pair):
    _, replayed = pair
    seen = []
    replayed.register_forward_pre_hook(lambda *_: seen.append(1))
    for _ in range(3):
        predict(replayed, **arguments())
    assert len(seen) == 3


def test_what_cannot_be_done_is_named(pair, recorder):
    _, replayed = pair
    with pytest.raises(ValueError, match="a model with graphs cannot be copied; call disable_graphs first"):
        copy.deepcopy(replayed)
    with pytest.raises(ValueError, match="graphs: a weight or an input is on meta; all have to be on cpu"):
        predict(replayed, **arguments(timestep=torch.empty(1, device="meta")))
    with pytest.raises(UserError, match="graphs: CUDA graphs need a GPU, and this runs on cpu; leave them off"):
        check_graphs(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_enabled():
    model = make_transformer()
    with pytest.raises(UserError, match="CUDA graphs need a GPU"):
        enable_graphs(model)
    assert predict(model, **arguments()).shape == (1, 4, 1, 2, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_training_with_graphs_ends_before_anything_is_cached_or_written(tmp_path):
    config = configuration(tmp_path / "run", graphs=True)
    for start in (lambda: train_pipeline(config), lambda: main(["train", "--graphs", "--quick"])):
        with pytest.raises(UserError, match="graphs: CUDA graphs need a GPU, and this runs on cpu; leave them off"):
            start()
    assert not list(tmp_path.iterdir())


def test_graphs_belong_to_ddp_and_may_change_when_a_training_goes_on(tmp_path):
    run = {"distributed": "fsdp2", "trackers": []}
    with pytest.raises(UserError, match=r"graphs: fsdp2 gathers the weights of each block anew, .* use distributed ddp"):
        configuration(tmp_path, graphs=True, run=run)
    assert not configuration(tmp_path, run=run).graphs
    assert "graphs" in MAY_CHANGE
