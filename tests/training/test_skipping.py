"""Bad steps are decided at once and named later, in order, none lost."""

from types import SimpleNamespace

import pytest
import torch

from promag.training.config import UserError
from promag.training.skipping import DivergedError, Skipping
from promag.training.state import State

FINE, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def make(lag, max_skipped=1, main=True):
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, is_main_process=main)
    state, messages = State({}, {}, [], None, 1), []  # pyright: ignore[reportArgumentType]
    return Skipping(accelerator, state, "stage", max_skipped, messages.append, lag), state, messages  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_the_host_names_a_bad_step_as_many_steps_later_as_the_lag(lag):
    skipping, state, messages = make(lag)
    for step in range(1, 6):
        bad = skipping.decide(step, {"loss": BAD if step == 2 else FINE, "norm": FINE}, stop=False)
        assert (bad.item(), bad.dtype) == (float(step == 2), torch.float32)
        assert not skipping.read(everything=False)
        assert len(messages) == state.skipped == int(step >= 2 + lag)
    assert messages == ["stage step 2: loss not finite, skipped (1 in all)"]
    assert state.skipped_in_a_row == 0
    assert len(skipping.unread) == lag


def test_reading_everything_leaves_nothing():
    skipping, state, messages = make(2, max_skipped=2)
    for step in (1, 2):
        skipping.decide(step, {"loss": torch.tensor(float("inf")), "norm": BAD}, stop=step == 1)
    assert skipping.read(everything=True)
    assert (state.skipped, state.skipped_in_a_row) == (2, 2)
    assert messages[1] == "stage step 2: loss, norm not finite, skipped (2 in all)"
    assert not skipping.read(everything=True)


def test_too_many_bad_steps_in_a_row_are_an_error():
    skipping, _, messages = make(0)
    for step, loss in enumerate((BAD, FINE, BAD, BAD), 1):
        skipping.decide(step, {"loss": loss}, stop=False)
    with pytest.raises(FloatingPointError, match="stage step 4: loss not finite, 2 in a row; lower"):
        skipping.read(everything=True)
    assert len(messages) == 2
    assert issubclass(DivergedError, UserError)  # commands show it as one line


def test_only_the_main_process_warns():
    skipping, state, messages = make(0, main=False)
    skipping.decide(1, {"loss": BAD}, stop=False)
    skipping.read(everything=True)
    assert (state.skipped, messages) == (1, [])
