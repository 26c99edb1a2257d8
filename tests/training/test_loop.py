import contextlib
import dataclasses
import gc
import json
import os
import signal
import weakref

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from promag.data.stream import TrainingStream
from promag.training.config import UserError
from promag.training.loop import Objective, close_trackers, make_accelerator, seeded, train
from promag.training.run import StopSignal, checkpoints, load_checkpoint
from promag.training.throughput import Work
from tests.conftest import optimization_config, run_config
from tests.training.test_run import small_files

SETTINGS = optimization_config(batch_size=2, learning_rate=0.05, warmup=2, weight_decay=0.1)
RUN = run_config()


class Numbers:
    """Rows of random numbers."""

    weights = None

    def __len__(self):
        return 10

    def item(self, index: int, rng: np.random.Generator):
        return {"x": torch.from_numpy(rng.standard_normal(3).astype(np.float32)), "caption": "row"}


class Noisy(Objective):
    """A regression with the step's noise in its loss, so that a resumed run shows whether noise is repeated."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        # Files do not keep this memory layout; moments must follow it after loading.
        self.conv = nn.Conv3d(3, 3, 3, padding=1).to(memory_format=torch.channels_last_3d)

    def forward(self, batch, generators, step):
        noise = randn_tensor(batch["x"].shape, generators)
        given = self.conv((batch["x"] + noise)[..., None, None, None].expand(-1, -1, 3, 3, 3))[..., 1, 1, 1]
        loss = (self.layer(given) - self.frozen(batch["x"])).square().mean()
        return {"loss": loss, "at": torch.tensor(float(step))}

    def learning_rate_scales(self):
        return [(self.conv, 0.25)]

    def matrices(self):
        return [self.layer.weight, self.conv.weight]


def run(folder, run=RUN, settings=SETTINGS, objective=None, validate=None, workers=0, accelerator=None):
    objective = objective or Noisy()
    accelerator = accelerator or make_accelerator(folder, "fp32", run.trackers)

    def open_stream(first):
        return TrainingStream(Numbers(), 3, settings.batch_size, 0, 1, first, settings.accumulate)

    outcome = train(accelerator, folder / "stage", objective, open_stream, settings, run, 3, validate)
    close_trackers(accelerator)
    return outcome, objective


def tensors(folder):
    groups, _ = load_checkpoint(checkpoints(folder / "stage")[-1])
    return {f"{g}/{k}": v for g, part in groups.items() for k, v in part.items()}


@pytest.mark.parametrize(("workers", "muon"), [(0, None), (1, None), (0, 0.02)])
def test_two_steps_resume_two_steps_equal_four_bit_for_bit(tmp_path, workers, muon):
    settings = dataclasses.replace(SETTINGS, muon_learning_rate=muon)
    whole, a = run(tmp_path / "whole", settings=settings)
    config = run_config(save_every=50, workers=workers, stop_after=2)
    first, _ = run(tmp_path / "parts", config, settings)
    assert (first.step, first.finished) == (2, False)
    second, b = run(tmp_path / "parts", config, settings)
    assert (second.step, second.finished, whole.finished) == (4, True, True)
    left, right = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert torch.equal(a.layer.weight, b.layer.weight)

    def losses(name):
        lines = (tmp_path / name / "stage" / "metrics.jsonl").read_text().splitlines()
        return [(r["step"], r["loss"]) for r in map(json.loads, lines) if "loss" in r]

    assert losses("whole") == losses("parts")
    assert [step for step, _ in losses("whole")] == [1, 2, 3, 4]


def test_the_averaged_weights_are_left_in_the_model_and_validated(tmp_path):
    seen = []
    objective = Noisy()

    def validate(tracker, step):
        seen.append((step, objective.layer.weight.clone()))
        return {"psnr": 1.0}

    outcome, _ = run(tmp_path, objective=objective, validate=validate)
    assert [step for step, _ in seen] == [2, 4]
    assert outcome.metrics == {"psnr": 1.0}
    saved = tensors(tmp_path)
    assert torch.equal(objective.layer.weight, saved["ema/layer.weight"])
    assert torch.equal(seen[-1][1], saved["ema/layer.weight"])
    assert not torch.equal(saved["ema/layer.weight"], saved["weights/layer.weight"])


def test_the_model_of_a_stage_can_be_freed_when_it_ends(tmp_path):
    accelerator = make_accelerator(tmp_path, "fp32", RUN.trackers)
    objective = weakref.ref(run(tmp_path, accelerator=accelerator)[1])
    gc.collect()
    assert objective() is None


def test_only_trained_weights_change_and_are_saved(tmp_path):
    before = Noisy()
    _, after = run(tmp_path)
    assert torch.equal(before.frozen.weight, after.frozen.weight)
    assert not torch.equal(before.layer.weight, after.layer.weight)
    assert {k for k in tensors(tmp_path) if "frozen" in k} == set()


def test_a_module_may_have_its_own_learning_rate(tmp_path):
    """AdamW's first step moves every weight by its learning rate, whatever the gradient; the convolution's is a quarter."""
    settings = dataclasses.replace(SETTINGS, steps=1, warmup=1, weight_decay=0.0)
    before = Noisy()
    run(tmp_path, settings=settings)
    after = tensors(tmp_path)
    for name, rate in (("layer.weight", 0.05), ("conv.weight", 0.0125)):
        moved = (after[f"weights/{name}"] - before.get_parameter(name).detach()).abs()
        assert float(moved.max()) == pytest.approx(rate, rel=1e-3)
        assert float(moved.median()) == pytest.approx(rate, rel=1e-2)


def test_muon_moves_matrices_by_orthogonal_steps(tmp_path):
    """All singular values of its first step are near its learning rate; AdamW trains the rest at its own."""
    settings = dataclasses.replace(SETTINGS, steps=1, batch_size=8, warmup=1, weight_decay=0.0, muon_learning_rate=0.02)
    before = Noisy()
    run(tmp_path, settings=settings)
    after = tensors(tmp_path)
    moved = after["weights/layer.weight"] - before.layer.weight.detach()
    values = torch.linalg.svdvals(moved)
    assert values.max() < 1.3 * 0.02
    assert values.min() > 0.3 * 0.02
    bias = (after["weights/layer.bias"] - before.layer.bias.detach()).abs()
    assert float(bias.max()) == pytest.approx(0.05, rel=1e-3)
    assert {k for k in after if k.startswith("optimizer/layer.weight")} == {"optimizer/layer.weight/momentum_buffer"}


def test_muon_without_matrices_is_refused(tmp_path):
    class Without(Noisy):
        def matrices(self):
            return []

    with pytest.raises(UserError, match=r"muon_learning_rate 0\.02: nothing here has matrices"):
        run(tmp_path, settings=dataclasses.replace(SETTINGS, muon_learning_rate=0.02), objective=Without())
    with pytest.raises(ValueError, match="muon_learning_rate -1: must be above 0"):
        dataclasses.replace(SETTINGS, muon_learning_rate=-1)


def test_sigterm_saves_and_ends_the_run(tmp_path):
    class Terminated(Noisy):
        def forward(self, batch, generators, step):
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(batch, generators, step)

    before = signal.getsignal(signal.SIGTERM)
    outcome, _ = run(tmp_path, objective=Terminated())
    assert (outcome.step, outcome.finished) == (2, False)
    assert [p.name for p in checkpoints(tmp_path / "stage")] == ["step-00000002"]
    assert signal.getsignal(signal.SIGTERM) == before
    again, _ = run(tmp_path)
    assert again.step == 4


def test_sigterm_in_the_last_step_finishes_in_the_next_call(tmp_path):
    def validate(log, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    outcome, _ = run(tmp_path, validate=validate)
    assert (outcome.step, outcome.finished) == (4, False)
    again, _ = run(tmp_path)
    assert (again.step, again.finished) == (4, True)


def test_sigterm_while_the_loaders_end_finishes_in_the_next_call(tmp_path, monkeypatch):
    from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

    def shut_down(loader):  # as iterators over worker processes have it
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(_SingleProcessDataLoaderIter, "_shutdown_workers", shut_down, raising=False)
    outcome, _ = run(tmp_path)
    assert (outcome.step, outcome.finished) == (4, False)
    again, _ = run(tmp_path)
    assert (again.step, again.finished) == (4, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["save_checkpoint", "thin_out"])
def test_more_signals_during_the_final_save_do_not_end_it(tmp_path, monkeypatch, place, number):
    from promag.training import loop

    original = getattr(loop, place)

    def interrupted(*arguments):
        for _ in range(2):
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(loop, place, interrupted)
    outcome, _ = run(tmp_path, run_config(save_every=50, stop_after=3))
    assert (outcome.step, outcome.finished) == (3, False)
    assert [p.name for p in checkpoints(tmp_path / "stage")] == ["step-00000003"]


def test_a_second_ctrl_c_during_a_step_ends_it(tmp_path):
    class Interrupted(Noisy):
        def forward(self, batch, generators, step):
            for _ in range(2 * step):
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(batch, generators, step)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, objective=Interrupted())


def test_leftovers_of_a_killed_call_are_removed_even_without_steps_left(tmp_path):
    run(tmp_path)
    last = run_config(keep_last=1)
    (tmp_path / "stage" / ".step-00000001").mkdir()  # killed while deleting an old checkpoint, after the last step
    assert run(tmp_path, last)[0].finished  # and before deleting that of step 2
    assert {path.name for path in (tmp_path / "stage").iterdir()} == {"step-00000004", "metrics.jsonl"}


def test_a_run_stopped_by_a_full_disk_continues_when_there_is_space(tmp_path):
    """The disk is full at the second checkpoint: the first one stays, and the weights equal those of an undisturbed run."""

    class Filling(Noisy):
        def forward(self, batch, generators, step):
            if step == 3:
                limits.enter_context(small_files(1500))
            return super().forward(batch, generators, step)

    run(tmp_path / "whole")
    with contextlib.ExitStack() as limits, pytest.raises(OSError, match="File too large") as caught:
        run(tmp_path / "full", run_config(trackers=()), objective=Filling())
    assert caught.value.filename == str(tmp_path / "full" / "stage" / "step-00000004")
    assert {path.name for path in (tmp_path / "full" / "stage").iterdir()} == {"step-00000002", "metrics.jsonl"}
    run(tmp_path / "full")
    left, right = tensors(tmp_path / "whole"), tensors(tmp_path / "full")
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_an_unhandled_signal_is_sent_again():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        for handled in (True, False):
            with StopSignal() as stop:
                os.kill(os.getpid(), signal.SIGTERM)
                stop.handled = handled
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_step_is_saved_once(tmp_path, monkeypatch):
    from promag.training import loop

    saved = []
    original = loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", lambda f, step, *rest: (saved.append(step), original(f, step, *rest)))

    class Terminated(Noisy):
        def forward(self, batch, generators, step):
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(batch, generators, step)

    run(tmp_path, run_config(save_every=2), objective=Terminated())
    assert saved == [2]


def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(tmp_path, capsys):
    run(tmp_path, run_config(save_every=1, stop_after=3, keep_last=3))
    file = tmp_path / "stage" / "step-00000003" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    run(tmp_path / "whole")
    outcome, _ = run(tmp_path)
    error = capsys.readouterr().err
    assert "step-00000003: damaged: " in error
    assert "falling back to the checkpoint before it" in error
    assert outcome.finished
    assert all(torch.equal(value, tensors(tmp_path)[key]) for key, value in tensors(tmp_path / "whole").items())


class Sick(Noisy):
    """A module whose loss is NaN at some steps, with a moving average that such a step would damage."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = steps
        self.register_buffer("average", torch.zeros(1))

    def forward(self, batch, generators, step):
        losses = super().forward(batch, generators, step)
        sick = float("nan") if step in self.steps else 1.0
        self.average.lerp_(losses["loss"].detach() * sick, 0.5)
        return {**losses, "loss": losses["loss"] * sick}


def test_a_step_that_is_not_finite_is_named_counted_and_skipped(tmp_path, capsys):
    settings, config = dataclasses.replace(SETTINGS, max_skipped=1), run_config(save_every=1, keep_last=9)
    outcome, _ = run(tmp_path, config, settings, Sick(1))
    assert outcome.finished
    assert "stage step 2: loss, gradient_norm not finite, skipped (1 in all)" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "stage" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "samples_per_second" in line]
    assert [line["skipped"] for line in logged] == [0, 1, 1, 1]
    assert ["loss" in line for line in logged] == [True, False, True, True]
    saved = [load_checkpoint(path)[0] for path in checkpoints(tmp_path / "stage")]
    for group in ("weights", "ema", "optimizer", "buffers"):
        assert all(torch.equal(value, saved[1][group][key]) for key, value in saved[0][group].items())
    assert not torch.equal(saved[2]["weights"]["layer.weight"], saved[1]["weights"]["layer.weight"])
    assert saved[3]["buffers"]["average"].isfinite().all()


def test_skipped_steps_resume_bit_for_bit(tmp_path):
    settings = dataclasses.replace(SETTINGS, max_skipped=2)
    run(tmp_path / "whole", settings=settings, objective=Sick(1, 2))
    for _ in range(2):
        run(tmp_path / "parts", run_config(stop_after=2), settings, Sick(1, 2))
    left, right = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert load_checkpoint(checkpoints(tmp_path / "parts" / "stage")[-1])[1]["skipped"] == 2


def test_too_many_consecutive_steps_that_are_not_finite_end_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="step 1: loss, gradient_norm not finite, 1 in a row; lower learning_rate"):
        run(tmp_path / "a", objective=Sick(0))
    settings = dataclasses.replace(SETTINGS, max_skipped=1)
    assert run(tmp_path / "b", settings=settings, objective=Sick(0, 2))[0].finished
    config = run_config(stop_after=1)  # steps skipped before an interruption count
    run(tmp_path / "c", config, settings, Sick(0, 1))
    with pytest.raises(FloatingPointError, match=r"step 2: .* 2 in a row"):
        run(tmp_path / "c", config, settings, Sick(0, 1))


def test_accumulated_gradients_are_the_mean_of_those_of_the_batches(tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=1, accumulate=3, clip_norm=1e9)
    run(tmp_path, settings=settings)
    objective = Noisy()
    stream = TrainingStream(Numbers(), 3, settings.batch_size, 0, 1)
    losses = [objective(b, [seeded(3, int(n)) for n in b["sample"]], 0)["loss"] for b in map(stream.batch, range(3))]
    (sum(losses) / 3).backward()
    norm = torch.stack([p.grad.norm() for p in objective.parameters() if p.grad is not None]).norm()
    (line,) = (json.loads(line) for line in (tmp_path / "stage" / "metrics.jsonl").read_text().splitlines())
    assert line["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert line["loss"] == pytest.approx(float(sum(losses).detach()) / 3, rel=1e-5)


def test_a_run_resumes_only_with_the_same_global_batch(tmp_path):
    run(tmp_path, run_config(stop_after=2), optimization_config(batch_size=2))
    with pytest.raises(UserError, match="was trained on 2 samples a step, these processes have 4"):
        run(tmp_path, run_config(), optimization_config(batch_size=2, accumulate=2))
    assert run(tmp_path, run_config(), optimization_config(batch_size=1, accumulate=2))[0].finished


def test_accumulating_runs_resume_bit_for_bit(tmp_path):
    settings = dataclasses.replace(SETTINGS, accumulate=2)
    run(tmp_path / "whole", settings=settings)
    for _ in range(2):
        run(tmp_path / "parts", run_config(stop_after=2, workers=1), settings)
    left, right = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_throughput_follows_from_flops_and_a_given_peak(tmp_path):
    class Counted(Noisy):
        def work(self, batch):
            return Work(7 * len(batch["x"]), 3e6)

    settings = dataclasses.replace(SETTINGS, accumulate=2)
    run(tmp_path, run_config(peak_tflops=0.5), settings, Counted())
    lines = [json.loads(line) for line in (tmp_path / "stage" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(7 * line["samples_per_second"])
        assert line["tflops"] == pytest.approx(1.5e-6 * line["samples_per_second"])  # 3 MFLOP for a batch of two
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.5)


def test_illegal_intervals_are_named():
    for name, value in (("log_every", 0), ("keep_every", 0), ("stop_after", 0), ("workers", -1), ("peak_tflops", 0.0)):
        with pytest.raises(ValueError, match=f"{name} {value}: "):
            run_config(**{name: value})
    for name, value in (("accumulate", 0), ("max_skipped", -1)):
        with pytest.raises(ValueError, match=f"{name} {value}: "):
            optimization_config(**{name: value})


def test_rates_warm_up_and_fall_to_a_twentieth():
    settings = optimization_config(steps=100, learning_rate=1.0, warmup=10)
    rates = [settings.learning_rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.05 + 0.95 / 2)
    assert rates[100] == pytest.approx(0.05)
    assert dataclasses.replace(settings, schedule="constant").learning_rate_at(99) == 1.0
    linear = dataclasses.replace(settings, schedule="linear")
    assert [linear.learning_rate_at(step) for step in (9, 10, 55, 100)] == pytest.approx([1.0, 1.0, 0.05 + 0.95 / 2, 0.05])


def test_seeds_depend_on_every_number():
    draws = {torch.randn(1, generator=seeded(*n)).item() for n in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(draws) == 4
    assert torch.randn(1, generator=seeded(0, 1)).item() == torch.randn(1, generator=seeded(0, 1)).item()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 0}, "steps 0"), ({"learning_rate": 0}, "learning_rate 0"), ({"ema_decay": 1.0}, "ema_decay 1.0")],
)
def test_illegal_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)
