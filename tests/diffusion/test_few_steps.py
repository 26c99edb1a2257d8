"""Few-step distillation: windows of the sampler's times, the teacher's integral, a student that learns it, exact resume."""

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from promag.diffusion import ahead, train
from promag.diffusion.conditioning import Condition
from promag.diffusion.families import adopt
from promag.diffusion.few_steps import FewSteps, FewStepsObjective
from promag.diffusion.flow import euler_step, flow_times, interpolate, token_shift
from promag.diffusion.text import Embedded
from promag.diffusion.train import train_diffusion
from promag.pipelines.timesteps import set_flow_times
from promag.scripts.reliability.odd_arguments import make_transformer
from promag.tokenizer.geometry import tokens
from promag.training import graphs
from promag.training.config import UserError
from promag.training.loop import seeded
from tests.diffusion.test_buckets import VIDEO, configuration
from tests.diffusion.test_resumed_data import PRINT, write
from tests.stand_in_recorder import StandInRecorder
from tests.tiny_pipeline import make_pipeline

WITH_TEXT, WITHOUT = -1.0, -0.4  # growth rates of the linear flows below


# -- times -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(-2, 4))
def test_windows_join_and_hold_the_times_of_both_samplers(steps, inside, mu):
    times = FewSteps(steps=steps, guidance=2.0, teacher_steps=steps * inside).times(mu)
    assert times.shape == (steps, inside + 1)
    assert torch.equal(times[1:, 0], times[:-1, -1])
    assert (times[0, 0], times[-1, -1]) == (1, 0)
    assert torch.allclose(torch.cat([times[:, 0], times[-1, -1:]]), flow_times(steps, mu), rtol=2e-7, atol=0)
    assert torch.equal(torch.cat([times[:, :-1].flatten(), times[-1, -1:]]), flow_times(steps * inside, mu))


@pytest.mark.parametrize("ratio", [4, 8, 16])
@pytest.mark.parametrize("steps", [1, 4, 6, 8])
def test_the_pipeline_samples_at_the_times_of_the_training(ratio, steps):
    count = tokens(65, 64, 64, ratio, (1, 1, 1))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    sampled = set_flow_times(scheduler, steps, count, torch.device("cpu"))
    windows = FewSteps(steps=steps, teacher_steps=24).times(token_shift(count, 3.0))
    assert torch.allclose(sampled, torch.cat([windows[:, 0], windows[-1, -1:]]), rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 5}, "steps 5, teacher_steps 24: at least 1 step is needed, and a multiple of it for the teacher"),
        ({"steps": 0}, "steps 0, teacher_steps 24: at least 1"),
        ({"teacher_steps": 0}, "steps 4, teacher_steps 0: at least 1"),
        ({"guidance": 0.5}, r"guidance 0\.5: at least 1 is needed"),
        ({"guidance": math.nan}, "guidance nan: at least 1 is needed"),
        ({"guidance": 1.0, "teacher_steps": 4}, "a teacher of 4 steps without guidance is what the student starts as"),
    ],
)
def test_illegal_settings_are_named(change, message):
    with pytest.raises(ValueError, match=f"few_steps: {message}"):
        FewSteps(**change)


def test_another_shift_than_the_teachers_is_refused(init, tmp_path):
    with pytest.raises(
        UserError, match=r"few_steps: shift 3\.0: the teacher samples with 1 \(.*scheduler_config\.json\); use shift 1"
    ):
        adopt(distilling(tmp_path, init, shift=3.0))
    assert adopt(distilling(tmp_path, init / "transformer", shift=3.0)).shift == 3.0  # a transformer alone states none


def test_a_student_needs_a_teacher(tmp_path):
    with pytest.raises(UserError, match="few_steps: the student needs a trained teacher; name one with init"):
        configuration(tmp_path, few_steps={})


# -- flows of which the solution is known ----------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """A transformer whose velocity is the latents times a rate, another one with a caption than with the null caption."""

    config = {"patch_size": (1, 1, 1)}  # noqa: RUF012

    def __init__(self, with_text, without):
        super().__init__()
        self.rates, self.seen = (without, with_text), []

    def forward(self, x, times, tokens, **_):
        self.seen.append((x, times / 1000))
        return (torch.where(tokens[0][:, :1, :1, None, None] > 0, self.rates[1], self.rates[0]) * x,)


def text(batch, dropped=None):
    """Embed captions as 1 and the null caption as 0."""
    rows = torch.tensor([0.0 if drop else 1.0 for drop in dropped or [False] * len(batch["caption"])])
    return Embedded((rows.view(-1, 1, 1),), (torch.ones(len(rows), 1),), None)


def linear_objective(few, base_ahead=0.0, student=(0.0, 0.0)):
    rates = SimpleNamespace(learning_rate=1.0)
    values = {"caption_dropout": 0.0, "shift": 3.0, "condition": Condition(0.0, 1), "base_ahead": base_ahead}
    config = SimpleNamespace(**values, text=rates, optimization=rates, few_steps=few)
    return FewStepsObjective(Linear(*student), text, config, Linear(WITH_TEXT, WITHOUT))  # pyright: ignore


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(count):
    return {"caption": ["a"] * count, "fps": torch.full((count,), 8.0)}


def test_the_teacher_comes_nearer_to_the_exact_integral_with_more_steps():
    """The guided flow dx/dt = r x has the solution x e^(r (t_1 - t_0)); Euler's error is of first order."""
    x, noise, windows = random(6, 4, 2, 2, 2), random(6, 4, 2, 2, 2, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
    rate = WITHOUT + 4.0 * (WITH_TEXT - WITHOUT)
    misses = []
    for teacher_steps in (96, 192, 384):
        objective = linear_objective(FewSteps(steps=3, teacher_steps=teacher_steps))
        errors = objective.window_errors(x, noise, windows, batch(6), 16)
        times = flow_times(3, objective.mu(x))
        now, then = times[:-1][windows], times[1:][windows]
        start = interpolate(x, noise, now)
        mean = (rate * (then - now)).expm1().view(-1, 1, 1, 1, 1) * start / (then - now).view(-1, 1, 1, 1, 1)
        misses.append((errors - mean.square().flatten(1).mean(1)).abs() / errors)
    assert (misses[0] < 0.2).all()
    for coarse, fine in itertools.pairwise(misses):
        assert torch.allclose(coarse / fine, torch.full((6,), 2.0), rtol=0.1)


def test_a_student_that_is_the_guided_teacher_has_no_error():
    """With as many steps as the teacher only the guidance is to be learned."""
    guided = WITHOUT + 4.0 * (WITH_TEXT - WITHOUT)
    few = FewSteps(steps=4, teacher_steps=4)
    x, noise, windows = random(4, 4, 2, 2, 2), random(4, 4, 2, 2, 2, seed=1), torch.arange(4)
    exact, off = linear_objective(few, student=(guided, 9.0)), linear_objective(few, student=(guided + 0.1, 9.0))
    assert exact.window_errors(x, noise, windows, batch(4), 16).max() < 1e-10
    assert off.window_errors(x, noise, windows, batch(4), 16).min() > 1e-3
    assert exact.validation_errors(x, noise, batch(4), 16).max() < 1e-10
    assert off.validation_errors(x, noise, batch(4), 16).min() > 1e-6


def test_conditioning_frames_stay_clean_and_count_nothing():
    objective = linear_objective(FewSteps(steps=2, teacher_steps=8), student=(-0.7, 9.0))
    x, noise, windows = random(4, 4, 3, 2, 2), random(4, 4, 3, 2, 2, seed=1), torch.tensor([0, 1, 0, 1])
    mask = torch.tensor([[True, False, False]] * 3 + [[False] * 3])
    errors = objective.window_errors(x, noise, windows, batch(4), 16, mask)
    (teacher,) = objective.teacher
    for seen, at in objective.transformer.seen + teacher.seen:
        rows = torch.cat([mask] * (len(seen) // 4))
        assert torch.equal(at == 0, rows)
        pinned = rows[:, None, :, None, None].expand_as(seen)
        assert torch.equal(seen[pinned], torch.cat([x] * (len(seen) // 4))[pinned])
    mu = objective.mu(x)
    objective.mu = lambda _: mu  # pyright: ignore[reportAttributeAccessIssue] (that of three frames)
    alone = objective.window_errors(x[:, :, 1:], noise[:, :, 1:], windows, batch(4), 16)
    assert torch.allclose(errors[:3], alone[:3], rtol=1e-4)


@settings(max_examples=30)
@given(st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 1))
def test_a_step_with_a_lead_is_the_paced_step_of_the_sampler(lead, one, other):
    now, then = torch.tensor(max(one, other)), torch.tensor(min(one, other))
    x, velocity = random(2, 4, 1, 2, 2), random(2, 4, 1, 2, 2, seed=1)
    wanted = ahead.paced(euler_step, lead)(lambda y, t: velocity, x, now, then) if now != then else x
    assert torch.allclose(ahead.advance(x, velocity, now.expand(2), then.expand(2), lead), wanted, atol=1e-5)


def test_with_a_lead_the_student_learns_the_paced_sampling():
    """A student that is the guided teacher makes no error, and the halves of its latents have times of their own."""
    guided = WITHOUT + 4.0 * (WITH_TEXT - WITHOUT)
    objective = linear_objective(FewSteps(steps=4, teacher_steps=4), 0.3, student=(guided, 9.0))
    x, noise, windows = random(4, 4, 2, 2, 2), random(4, 4, 2, 2, 2, seed=1), torch.arange(4)
    assert objective.window_errors(x, noise, windows, batch(4), 16).max() < 1e-10
    seen, at = objective.transformer.seen[-1]
    assert torch.allclose(seen, ahead.interpolate(x, noise, at, 0.3), atol=1e-6)
    assert not torch.allclose(seen, interpolate(x, noise, at), atol=1e-2)


# -- transformers ----------------------------------------------------------------------------------------------------


def real_objective(few):
    torch.manual_seed(0)
    teacher = make_transformer().requires_grad_(False).eval()
    objective = linear_objective(few)
    objective.transformer, objective.teacher = copy.deepcopy(teacher).requires_grad_(True), (teacher,)
    table = random(2, 5, 16, seed=7)

    def embed(batch, dropped=None):
        rows = torch.tensor([0 if drop else 1 for drop in dropped or [False] * len(batch["caption"])])
        return Embedded((table[rows],), (torch.ones(len(rows), 5),), table[rows].mean(1))

    objective.text = embed  # pyright: ignore
    return objective


def test_a_student_approaches_the_many_guided_steps_of_its_teacher():
    objective = real_objective(FewSteps(steps=2, teacher_steps=8))
    data = {**batch(4), "latents": random(4, 4, 2, 2, 2), "ratio": torch.full((4,), 16)}
    noise = random(4, 4, 2, 2, 2, seed=1)
    before = objective.validation_errors(data["latents"], noise, data, 16).mean()
    optimizer = torch.optim.Adam(objective.transformer.parameters(), 3e-3)
    for step in range(60):
        loss = objective(data, [seeded(step, n) for n in range(4)], step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert objective.validation_errors(data["latents"], noise, data, 16).mean() < 0.2 * before
    teacher, start = objective.teacher[0], real_objective(FewSteps()).transformer.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in teacher.state_dict().items())


def test_under_autocast_every_weight_has_the_gradient_that_it_has_without():
    """Weights that autocast rounded in the steps without gradients must not be used in the step that has them."""
    gradients = []
    for enabled in (False, True):
        objective = real_objective(FewSteps(steps=2, teacher_steps=4))
        x, windows = random(4, 4, 2, 2, 2), torch.tensor([0, 1, 0, 1])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            objective.window_errors(x, x.flip(0), windows, batch(4), 16).mean().backward()
        named = objective.transformer.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None and p.grad.abs().max() > 1e-4})
    plain, rounded = gradients
    assert plain.keys() <= rounded.keys()
    for name, value in plain.items():
        assert torch.cosine_similarity(value.flatten(), rounded[name].flatten(), 0) > 0.9, name


# -- trainings -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    make_pipeline().save_pretrained(folder)
    return folder


def distilling(folder, init, stop_after=None, **change):
    text = {"encoders": [{"model": "small", "weights": None, "max_length": 10}]}
    few = {"steps": 2, "teacher_steps": 4}
    base = {"init": str(init), "model": None, "few_steps": few, "budgets": [{"ratio": 16}], "condition": {"probability": 0.5}}
    base |= {"shift": 1.0}  # the teacher's
    config = configuration(folder, **{**base, "text": text, **change})
    loop = dataclasses.replace(config.optimization, steps=4)
    run = dataclasses.replace(config.run, stop_after=stop_after, validate_every=2, save_every=2)
    return dataclasses.replace(config, optimization=loop, run=run, data=dataclasses.replace(config.data, buckets=(VIDEO,)))


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_2_steps_and_2_after_a_resume_equal_4_and_only_the_student_is_trained(init, tmp_path, lora):
    cached = write(tmp_path / "cache")
    whole = train_diffusion(distilling(tmp_path / "whole", init, lora=lora), cached, cached)
    for stop_after in (2, None):
        parts = train_diffusion(distilling(tmp_path / "parts", init, stop_after, lora=lora), cached, cached)
    assert parts.outcome.step == whole.outcome.step == 4
    assert parts.outcome.metrics == whole.outcome.metrics
    assert math.isfinite(whole.outcome.metrics["validation_loss_first_given"])
    one, other = whole.transformer.state_dict(), parts.transformer.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    pipe = make_pipeline()
    before = pipe.transformer.state_dict()
    moved = [name for name, value in one.items() if not torch.equal(value, before.get(name.replace(".base_layer", ""), value))]
    assert bool(moved) == (lora is None)
    assert any(value.any() for name, value in one.items() if "lora_B" in name) == bool(lora)
    small = whole.small_text[1].state_dict()
    assert all(torch.equal(value, small[name]) for name, value in pipe.text_encoder.state_dict().items())
    assert list(whole.transformer.config["latents_mean"]) == list(whole.transformer.config["latents_std"]) == ["16"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [{"ratio": 8}]}, "budget 8x: the transformer of init was trained at 16x, 4x; another needs"),
        ({"base_ahead": 0.3}, r"base_ahead 0\.3: the transformer of init was trained with 0; give that"),
    ],
)
def test_what_the_teacher_was_not_trained_for_is_refused(init, tmp_path, change, message):
    ratio = change.get("budgets", [{"ratio": 16}])[0]["ratio"]
    cached = write(tmp_path / "cache", dataclasses.replace(PRINT, ratio=ratio))
    with pytest.raises(UserError, match=message):
        train_diffusion(distilling(tmp_path / "run", init, **change), cached, cached)


@pytest.mark.parametrize(("lora", "accumulate"), [(None, 2), ({"rank": 2}, 2), (None, 1)])
def test_a_student_trained_through_graphs_equals_one_trained_without(init, tmp_path, monkeypatch, lora, accumulate):
    recorders = []

    def record():
        recorders.append(StandInRecorder())
        return recorders[-1]

    monkeypatch.setattr(graphs, "CudaRecorder", record)
    monkeypatch.setattr(train, "check_graphs", lambda device: None)
    cached = write(tmp_path / "cache")
    outcomes = []
    for replayed in (False, True):
        config = distilling(tmp_path / str(replayed), init, lora=lora, graphs=replayed, gradient_checkpointing=True)
        loop = dataclasses.replace(config.optimization, accumulate=accumulate)
        outcomes.append(train_diffusion(dataclasses.replace(config, optimization=loop), cached, cached))
    plain, through_graphs = (outcome.transformer.state_dict() for outcome in outcomes)
    torch.testing.assert_close(plain, through_graphs, rtol=1e-4, atol=1e-5)
    assert outcomes[0].outcome.metrics == pytest.approx(outcomes[1].outcome.metrics, rel=1e-4)
    counts = [recorder.recorded for recorder in recorders]  # the student's two passes, its teacher's one, that in validation
    assert counts == ([3, 0] if lora else [2, 2, 0])
    if accumulate == 1:  # accumulated gradients may lie at new addresses in each step
        assert recorders[-1].steps == 2  # clipping, and the optimisers with the average
    assert graphs.NAME not in outcomes[1].transformer._diffusers_hook.hooks
