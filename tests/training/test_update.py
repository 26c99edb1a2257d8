"""Recorded clipping, steps of optimisers and averages equal plain ones."""

import copy

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from promag.training.graphs import RECORDINGS
from promag.training.loop import Objective
from promag.training.optimizers import OptimizationConfig, make_optimizers
from promag.training.update import Update
from tests.stand_in_recorder import StandInRecorder

SETTINGS = OptimizationConfig(steps=8, warmup=4, learning_rate=0.05, muon_learning_rate=0.1, ema_decay=0.9, clip_norm=0.02)


class Layers(Objective):
    # Orthogonal matrices, as many outputs and samples as rows: Muon blows up the rounding of nearly singular gradients.
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)
        self.unused = nn.Parameter(torch.ones(3))

    def matrices(self):
        return [self.layers[1].weight, self.layers[2].weight]

    def learning_rate_scales(self):
        return [(self.layers[3], 0.5)]


def make(recorder, objective=None):
    objective = copy.deepcopy(objective or Layers())
    parameters = [p for p in objective.parameters() if p.requires_grad]
    average = EMAModel(parameters, decay=SETTINGS.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    optimizers, separate = make_optimizers(objective, SETTINGS, "fp32"), [*objective.layers[0].parameters()]
    together = [p for p in parameters if all(p is not other for other in separate)]
    return objective, Update(optimizers, average, parameters, (together, separate), SETTINGS.clip_norm, recorder)


def test_the_norm_of_a_group_without_gradients_is_on_the_device_of_the_weights():
    weight = nn.Parameter(torch.ones(2, device="meta"))
    (norm,) = Update([], None, [weight], [[weight]], 1.0).clip()
    assert norm.device == weight.device


def norm_of_gradients(weights):
    return torch.cat([p.grad.flatten() for p in weights if p.grad is not None]).norm()


def memory_of_gradients(update):
    return {p: torch.empty_like(p) for p in update.parameters}


def take_steps(objective, update, steps, kept=True, skipped=(), memory=None):
    """Take steps; with `kept` gradients stay in the same memory, as those of a model with graphs.

    The gradients of `skipped` steps are not finite.
    """
    memory = memory or memory_of_gradients(update)
    for step in steps:
        for group in update.groups:
            group["lr"] = SETTINGS.learning_rate_at(step) * group["factor"]
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(objective.unused.device)
        objective.layers(x).square().mean().backward()
        for p in update.parameters:
            if p.grad is not None:
                p.grad = (memory[p] if kept else torch.empty_like(p)).copy_(p.grad)
                p.grad.flatten()[:1] += float("nan") if step in skipped else 0.0
        expected = [norm_of_gradients(group) for group in update.clipped]
        torch.testing.assert_close(list(update.clip()), expected, equal_nan=True)
        if step not in skipped:
            assert all(norm_of_gradients(group) < 1.001 * SETTINGS.clip_norm for group in update.clipped)
        update(torch.tensor(float(step in skipped)))
        if not kept:
            memory |= {(step, p): p.grad for p in update.parameters}  # so that none is used again
        for optimizer in update.optimizers:
            optimizer.zero_grad()


def results(objective, update):
    moments = [state for optimizer in update.optimizers for state in optimizer.state.values()]
    return [objective.state_dict(), update.average.shadow_params, moments, update.taken]


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_recorded_steps_equal_plain_ones(steps):
    recorder = StandInRecorder()
    plain, recorded = make(None), make(recorder)
    for objective, update in (plain, recorded):
        take_steps(objective, update, range(steps))
    torch.testing.assert_close(results(*recorded), results(*plain), rtol=1e-5, atol=1e-7)
    assert recorder.steps == 2 * (steps > 1)  # clipping and what follows
    for group in recorded[1].groups:
        assert isinstance(group["lr"], float)
        assert not group.get("capturable")


def test_gradients_in_new_memory_are_not_recorded():
    recorder = StandInRecorder()
    plain, recorded = make(None), make(recorder)
    for objective, update in (plain, recorded):
        take_steps(objective, update, range(8), kept=False)
    assert recorder.steps == 0
    torch.testing.assert_close(results(*recorded), results(*plain))
    assert len(recorded[1].recordings) <= RECORDINGS


def test_training_goes_on_with_the_state_that_a_recording_leaves():
    plain, mixed = make(None), make(StandInRecorder())
    take_steps(*plain, range(8))
    take_steps(*mixed, range(4))
    mixed[1].recorder = None
    take_steps(*mixed, range(4, 8))
    torch.testing.assert_close(results(*mixed), results(*plain), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("recorder", [None, StandInRecorder()], ids=["plain", "recorded"])
@pytest.mark.parametrize("skipped", [{0}, {1}, {2, 3}, {0, 1, 4}], ids=str)
def test_a_skipped_step_changes_nothing(recorder, skipped):
    """Bit for bit, in a first step too, whose moments stay zero, and in one that is recorded."""
    objective, update = make(recorder)
    other, memory = make(None), memory_of_gradients(update)
    for step in range(6):
        before = copy.deepcopy(results(objective, update))
        take_steps(objective, update, [step], skipped=skipped, memory=memory)
        if step in skipped:
            weights, averages, moments, taken = results(objective, update)
            assert moments
            torch.testing.assert_close([weights, averages, taken], [*before[:2], before[3]], rtol=0, atol=0)
            if before[2]:
                torch.testing.assert_close(moments, before[2], rtol=0, atol=0)
            else:
                assert not any(moment.any() for state in moments for moment in state.values())
    assert [recorded is not None for recorded in update.recordings.values()] == ([] if recorder is None else [True])
    take_steps(*other, [step for step in range(6) if step not in skipped])
    torch.testing.assert_close(results(objective, update), results(*other), rtol=1e-5, atol=1e-7)


def test_averages_are_those_of_diffusers():
    objective, update = make(None)
    average = EMAModel(update.parameters, decay=SETTINGS.ema_decay, use_ema_warmup=True, power=0.75)
    for step in range(40):  # the warm-up ends after 22
        take_steps(objective, update, [step % 8], skipped={5})
        if step % 8 != 5:
            average.step(update.parameters)
        torch.testing.assert_close(update.average.shadow_params, average.shadow_params)
    assert average.cur_decay_value == SETTINGS.ema_decay
