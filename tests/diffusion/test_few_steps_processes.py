"""Few-step distillation on two processes learns what it learns on one, with weights replicated or sharded."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from promag.diffusion.text_cache import CaptionEncoder
from promag.diffusion.train import make_objective, train_diffusion
from promag.training.fsdp import leave_process_group, local_shard, shard
from promag.training.loop import seeded
from promag.training.processes import processes
from promag.training.run import checkpoints, load_checkpoint
from tests.diffusion.test_few_steps import distilling
from tests.diffusion.test_resumed_data import write
from tests.processes import run_two_ranks
from tests.tiny_pipeline import make_pipeline

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo is tested on Unix")

DRIVER = "import sys; from tests.diffusion.test_few_steps_processes import train_all; train_all(sys.argv[1])"
STUDENTS = {"whole": {}, "adapters": {"lora": {"rank": 2}}}
TWO = [f"{student} {distributed}" for student in STUDENTS for distributed in ("ddp", "fsdp2")]
CAPTIONS = [f"clip {number} moves {way}" for number in range(3) for way in ("left", "right")]
LOSSES = ("loss", "gradient_norm", "validation_loss", "validation_loss_first_given")


def distil(folder, name, batch_size, stop_after=None):
    student, _, distributed = name.partition(" ")
    cached = write(folder / "cache", captions=CAPTIONS)
    config = distilling(folder / name, folder / "init", stop_after, **STUDENTS[student])
    loop = dataclasses.replace(config.optimization, batch_size=batch_size)
    run = dataclasses.replace(config.run, distributed=distributed or "ddp", log_every=1)
    train_diffusion(dataclasses.replace(config, optimization=loop, run=run), cached, cached)


def train_all(folder):
    """Train on each of two processes; sharded weights in two parts, of which the second continues the first."""
    for name in TWO:
        for stop_after in (2, None) if name.endswith("fsdp2") else (None,):
            distil(Path(folder), name, 2, stop_after)
    (Path(folder) / f"teacher-{processes().process_index}.json").write_text(json.dumps(shard_teacher(Path(folder))))
    leave_process_group()


def shard_teacher(folder):
    """Return the share of the teacher's weights that this process keeps, and a student's errors before and after sharding."""
    pipe, config = make_pipeline(), distilling(folder, folder / "init")
    pipe.text_encoder.requires_grad_(False)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, distributed="fsdp2"))
    text = CaptionEncoder([None], pipe.tokenizer, pipe.text_encoder)
    objective = make_objective(pipe.transformer, text, config, torch.device("cpu"))
    (teacher,) = objective.teacher
    x, windows = torch.randn(2, 4, 2, 2, 2, generator=seeded(0)), torch.tensor([0, 1])
    clips = {"caption": CAPTIONS[:2], "fps": torch.full((2,), 8.0)}

    def errors():
        return objective.window_errors(x, x.flip(0), windows, clips, 16).tolist()

    weights, before = sum(p.numel() for p in teacher.parameters()), errors()
    shard(objective, objective.units(), torch.device("cpu"), 2, bf16=False)
    share = sum(local_shard(p).numel() for p in teacher.parameters()) / weights
    return {"share": share, "before": before, "after": errors()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    make_pipeline().save_pretrained(folder / "init")
    for student in STUDENTS:
        distil(folder, student, 4)
    run_two_ranks(DRIVER, folder)
    return folder


@pytest.mark.parametrize("name", TWO)
def test_a_student_on_two_processes_learns_what_it_learns_on_one(runs, name):
    alone, together = ((runs / place / "16x") for place in (name.partition(" ")[0], name))
    logs = [[json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()] for stage in (alone, together)]
    for key in LOSSES:
        one, two = ({line["step"]: line[key] for line in lines if key in line} for lines in logs)
        assert len(one) >= 2
        assert two == pytest.approx(one, rel=1e-5), key
    ends = [load_checkpoint(checkpoints(stage)[-1])[0] for stage in (alone, together)]
    for group in ("weights", "ema"):
        assert ends[0][group].keys() == ends[1][group].keys()
        for key, value in ends[0][group].items():
            assert torch.allclose(value, ends[1][group][key], atol=1e-3), f"{group} {key}"


def test_each_process_holds_half_of_the_teacher_that_teaches_the_same(runs):
    results = [json.loads((runs / f"teacher-{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(result["share"] for result in results) == pytest.approx(1)
    for result in results:
        assert result["share"] == pytest.approx(0.5, abs=0.02)
        assert result["after"] == pytest.approx(result["before"], rel=1e-5)
