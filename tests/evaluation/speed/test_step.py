import torch

from promag.data.stream import TrainingStream
from promag.evaluation.speed.step import WeightUpdate
from promag.training.loop import close_trackers, make_accelerator, seeded, train
from tests.conftest import optimization_config, run_config
from tests.training.test_loop import Noisy, Numbers

SETTINGS = optimization_config(batch_size=2, schedule="constant", learning_rate=0.05, weight_decay=0.1, muon_learning_rate=0.02)


def test_a_measured_update_is_that_of_the_training_loop(tmp_path):
    trained, measured = Noisy(), Noisy()
    stream = lambda first: TrainingStream(Numbers(), 3, 2, 0, 1, first, 1)  # noqa: E731
    batches = iter(stream(0))
    accelerator = make_accelerator(tmp_path, "fp32")
    train(accelerator, tmp_path / "stage", trained, stream, SETTINGS, run_config(), 3)
    close_trackers(accelerator)
    update = WeightUpdate(measured.train(), SETTINGS, "fp32")
    for optimizer in update.optimizers:  # as the loop sets it
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.learning_rate * group["factor"]
    for step in range(SETTINGS.steps):
        batch = next(batches)
        measured(batch, [seeded(3, n) for n in batch["sample"].tolist()], step)["loss"].backward()
        update()
    update.update.average.copy_to(update.parameters)
    for own, expected in zip(measured.parameters(), trained.parameters(), strict=True):
        assert torch.equal(own, expected)


def test_gradients_that_are_not_finite_move_nothing_and_are_dropped():
    objective = Noisy()
    before = [p.detach().clone() for p in objective.parameters()]
    update = WeightUpdate(objective, SETTINGS, "fp32")
    for parameter in update.parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    update()
    assert all(torch.equal(a, b) for a, b in zip(before, objective.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in update.parameters)
