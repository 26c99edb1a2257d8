"""Both trainers on two CPU processes: their results, resuming, and termination."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from promag.scripts import cache_latents, train_diffusion
from promag.training.config import UserError
from promag.training.run import checkpoints, load_checkpoint
from tests.processes import run_two_ranks
from tests.scripts.conftest import LOOP
from tests.scripts.test_scripts import RUN, diffusion_arguments, encoder, tokenizer_arguments, write_t5
from tests.wan import make_grown, make_stock

# Several trainings run in one process, because starting it takes much longer than training.
DRIVER = """
import importlib, json, os, sys
from pathlib import Path
from promag.training.fsdp import leave_process_group
for script, arguments in json.load(open(sys.argv[1])):
    importlib.import_module(script).main(arguments)
leave_process_group()
threads = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
Path(sys.argv[1]).with_name(f"threads-{os.environ['RANK']}.json").write_text(json.dumps(threads))
"""
# Rank 1 is killed after a few logged steps, as on a machine that is out of memory.
KILLED = """
import os, signal, sys, threading, time
def kill():
    while not os.path.exists(sys.argv[2]) or open(sys.argv[2]).read().count("\\n") < 6:
        time.sleep(0.02)
    open(sys.argv[3], "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1":
    threading.Thread(target=kill, daemon=True).start()
"""
FOUR = {**LOOP, "steps": 4, "batch_size": 2, "learning_rate": 0.01}


def run_trainings(folder: Path, trainings: list) -> None:
    given = folder / "trainings.json"
    given.write_text(json.dumps(trainings))
    run_two_ranks(DRIVER, given)


def torchrun(folder: Path, driver: str, trainings: list, *more: Path) -> int:
    """Return the status of torchrun itself, which ends the other rank where one is killed."""
    script, given = folder / "driver.py", folder / "trainings.json"
    script.write_text(driver)
    given.write_text(json.dumps(trainings))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), environment.get("PYTHONPATH", "")])
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2", str(script)]
    run = subprocess.Popen([*command, given, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        return run.wait(600)
    except subprocess.TimeoutExpired:
        run.terminate()  # it ends its workers
        run.wait()
        raise


def cache_settings(folder: Path) -> dict:
    sizes = {"synthetic_clips": 6, "validation_clips": 2, "frames": 17, "size": 32}
    return {**sizes, "cache": str(folder / "latents"), "shard_size": 1}


def two_texts(folder: Path) -> dict:
    """A cached frozen T5 and a jointly trained small CLIP."""
    return {"encoders": [encoder(folder / "t5"), encoder("small")], "width": 16, "layers": 1, "heads": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A tokenizer, and text-to-video trained at once and in two parts, on the same latents."""
    folder = tmp_path_factory.mktemp("two")
    write_t5(folder / "t5")

    def diffusion(name, tokenizer=folder / "t" / "tokenizer", **change):
        fixed = {"optimization": FOUR, "data": cache_settings(folder), "text": two_texts(folder)}
        change = {**fixed, "condition": {"probability": 0.5}, **change}
        return diffusion_arguments(folder / name, tokenizer, **change)

    half, spread = {**RUN, "stop_after": 2}, {**RUN, "distributed": "fsdp2"}
    half_spread = {**half, **spread}
    samples = {"prompts": ["a red disc"], "every": 2, "steps": 1, "guidance": 2.0}
    accumulated = {**FOUR, "batch_size": 1, "accumulate": 2}
    lora = {"init": str(folder / "whole" / "pipeline"), "model": None, "lora": {"rank": 2, "alpha": 2.0, "targets": ["to_q"]}}
    lora |= {"budgets": [{"ratio": 16, "share": 1.0}]}
    stock = {"init": str(folder / "init"), "model": None, "text": {"encoders": [encoder(folder / "init")]}}
    stock |= {"condition": {"probability": 0.0}, "shift": 3.0, "tokenizer": folder / "grown", "samples": samples}
    stock |= {"data": {**cache_settings(folder), "cache": str(folder / "stock-latents")}}
    make_stock().save_pretrained(folder / "init")
    make_grown().save_pretrained(folder / "grown")
    trainings = [
        ("promag.scripts.train_tokenizer", tokenizer_arguments(folder / "t")),
        ("promag.scripts.train_diffusion", diffusion("whole", samples=samples)),
        ("promag.scripts.train_diffusion", diffusion("parts", run=half)),
        ("promag.scripts.train_diffusion", diffusion("parts", run=half)),
        ("promag.scripts.train_diffusion", diffusion("spread", run=spread, samples=samples)),
        ("promag.scripts.train_diffusion", diffusion("spread-parts", run=half_spread)),
        ("promag.scripts.train_diffusion", diffusion("spread-parts", run=half_spread, gradient_checkpointing=True)),
        ("promag.scripts.train_diffusion", diffusion("spread-then-ddp", run=half_spread, optimization=accumulated)),
        ("promag.scripts.train_diffusion", diffusion("spread-then-ddp", run=half, optimization=accumulated)),
        ("promag.scripts.train_diffusion", diffusion("spread-lora", run=spread, **lora)),
        ("promag.scripts.train_diffusion", diffusion("stock", **stock)),
        ("promag.scripts.train_diffusion", diffusion("spread-stock", run=spread, **stock)),
        ("tests.scripts.spread_weights", [str(folder)]),
    ]
    run_trainings(folder, trainings)
    train_diffusion.main(diffusion("one", optimization={**FOUR, "batch_size": 4}))
    train_diffusion.main(diffusion("lora", optimization={**FOUR, "batch_size": 4}, **lora))
    accumulated = {**FOUR, "batch_size": 2, "accumulate": 2}
    train_diffusion.main(diffusion("accumulated", optimization=accumulated))
    return folder


def test_two_processes_cache_the_same_as_one_bit_for_bit(runs, tmp_path):
    """There is one clip per shard, so both processes had work."""
    alone = {**cache_settings(runs), "cache": str(tmp_path)}
    cache_latents.main(diffusion_arguments(runs / "whole", runs / "t" / "tokenizer", data=alone, text=two_texts(runs)))
    for folder in ("train-16x", "eval-16x", "train-text-1", "eval-text-1"):
        together, again = ({p.name: p.read_bytes() for p in (f / folder).iterdir()} for f in (runs / "latents", tmp_path))
        assert together == again
    assert len(list((tmp_path / "train-text-1").glob("shard*"))) == 6


def logged(stage: Path, key: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def test_both_trainers_write_once_and_leave_a_pipeline(runs):
    for stage in ("4x", "16x"):
        assert list(logged(runs / "t" / stage)) == [1, 2]
    lines = (runs / "whole" / "16x" / "metrics.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["step"] for line in lines if "gradient_norm" in line) == [1, 2, 3, 4]
    assert (runs / "whole" / "pipeline" / "model_index.json").exists()
    assert json.loads((runs / "latents" / "train-16x" / "index.json").read_text())["clips"] == 6


@pytest.mark.parametrize(("whole", "parts"), [("whole", "parts"), ("spread", "spread-parts")])
def test_two_steps_resume_two_steps_equal_four_bit_for_bit(runs, whole, parts):
    """Weights are replicated on both processes, or sharded over them."""
    left, right = (load_checkpoint(checkpoints(runs / name / "16x")[-1]) for name in (whole, parts))
    assert left[1]["step"] == right[1]["step"] == 4
    assert left[0].keys() == {"weights", "ema", "optimizer"} | ({"buffers"} & left[0].keys())
    for group, tensors in left[0].items():
        assert tensors.keys() == right[0][group].keys()
        assert all(torch.equal(value, right[0][group][name]) for name, value in tensors.items()), group
    assert logged(runs / whole / "16x") == logged(runs / parts / "16x")


@pytest.mark.parametrize("name", ["spread", "spread-then-ddp"])
def test_sharded_weights_learn_the_same_as_replicated_ones(runs, name):
    """The second run changed to DDP halfway and accumulated gradients over two batches."""
    for key in ("loss", "gradient_norm", "validation_loss"):
        assert logged(runs / name / "16x", key) == pytest.approx(logged(runs / "whole" / "16x", key), rel=1e-5)
    spread, whole = (load_checkpoint(checkpoints(runs / n / "16x")[-1])[0] for n in (name, "whole"))
    for group, tensors in whole.items():
        assert tensors.keys() == spread[group].keys()
        for key, value in tensors.items():
            # Muon's products round to bfloat16; AdamW is explained below.
            assert torch.allclose(spread[group][key], value, atol=1e-3), f"{group} {key}"


def test_adapters_on_sharded_weights_learn_the_same(runs):
    names = ("spread-lora", "lora")
    assert logged(runs / names[0] / "16x") == pytest.approx(logged(runs / names[1] / "16x"), rel=1e-5)
    spread, whole = (load_file(runs / name / "lora" / "pytorch_lora_weights.safetensors") for name in names)
    assert spread.keys() == whole.keys()
    assert all(torch.allclose(spread[key], value, atol=1e-3) for key, value in whole.items())


def test_a_sharded_stock_transformer_learns_the_same(runs):
    for key in ("loss", "gradient_norm", "validation_loss"):
        assert logged(runs / "spread-stock" / "16x", key) == pytest.approx(logged(runs / "stock" / "16x", key), rel=1e-5)
    spread, whole = (
        load_file(runs / name / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("spread-stock", "stock")
    )
    assert spread.keys() == whole.keys()
    assert all(torch.allclose(spread[key], value, atol=1e-3) for key, value in whole.items())


def test_each_process_holds_half_of_the_sharded_weights(runs):
    """This holds for every tensor; gathered weights are freed, and the final whole model is the initial object."""
    results = [json.loads((runs / f"spread-{rank}.json").read_text()) for rank in (0, 1)]
    for precision, dtype in (("float32", "torch.float32"), ("bf16", "torch.bfloat16")):
        both = [part[precision] for part in results]
        assert sum(part["part"] for part in both) == pytest.approx(1)
        for part in both:
            assert part["part"] == pytest.approx(0.5, abs=0.01)
            assert part["largest"][0] <= 2 / 3, part["largest"]
            assert part["computed_in"] == dtype
            assert part["gradients"] == ["DTensor"]
            assert part["gathered_after_the_step"] == 0
            assert (part["class"], part["equal"]) == ("ProMAGTransformer3DModel", True)


def test_no_thread_of_communication_outlives_the_process_group(runs):
    """Such a thread may abort the process while the interpreter shuts down."""
    for rank in (0, 1):
        threads = json.loads((runs / f"threads-{rank}.json").read_text())
        assert threads
        assert not [name for name in threads if "gloo" in name]


def test_muon_steps_sharded_matrices_like_whole_ones(runs):
    for rank in (0, 1):
        assert max(json.loads((runs / f"spread-{rank}.json").read_text())["muon_learning_rate"]) < 1e-6


@pytest.mark.parametrize("other", ["one", "accumulated"])
def test_two_processes_learn_the_same_as_one_from_the_same_global_batch(runs, other):
    for key in ("loss", "gradient_norm", "validation_loss"):
        two, one = (logged(runs / name / "16x", key) for name in ("whole", other))
        assert two == pytest.approx(one, rel=1e-5)
    two, one = (load_checkpoint(checkpoints(runs / name / "16x")[-1])[0]["ema"] for name in ("whole", other))
    # Where a gradient is almost zero, AdamW still takes steps of the learning rate, 0.01, in either direction.
    assert max(float((two[name] - one[name]).abs().max()) for name in two) < 1e-3


@pytest.mark.parametrize("name", ["whole", "spread"])
def test_samples_are_shown_once(runs, name):
    from tests.training.test_trackers import shown_videos

    assert [step for step, _, _ in shown_videos(runs / name)["16x/0 a red disc"]] == [2, 4]


def test_a_killed_rank_ends_the_other_and_the_last_checkpoint_resumes(runs, tmp_path):
    endless = {**FOUR, "steps": 100000}
    change = {
        "data": cache_settings(runs),
        "optimization": endless,
        "text": two_texts(runs),
        "run": {**RUN, "keep_every": 2, "keep_last": 1},
    }
    arguments = diffusion_arguments(tmp_path / "run", runs / "t" / "tokenizer", **change)
    metrics = tmp_path / "run" / "16x" / "metrics.jsonl"
    killed = tmp_path / "killed"
    assert torchrun(tmp_path, KILLED + DRIVER, [("promag.scripts.train_diffusion", arguments)], metrics, killed) != 0
    assert time.time() - killed.stat().st_mtime < 60
    kept = checkpoints(tmp_path / "run" / "16x")
    steps = [int(path.name.removeprefix("step-")) for path in kept]
    assert steps[:2] == [2, 4]  # multiples of keep_every stay
    with pytest.raises(UserError, match="was trained on 4 samples a step, these processes have 2"):
        train_diffusion.main(arguments)
    run_trainings(tmp_path, [("promag.scripts.train_diffusion", [*arguments, "--run.stop_after", "1"])])
    assert max(logged(tmp_path / "run" / "16x")) == steps[-1] + 1


# A rank takes longer than the others' exchanges may last, and rank 0 chooses the precision, which ranks measure differently.
DIFFERENT = """
import datetime, json, os, sys, time
from pathlib import Path
import torch
from promag.training import precision, processes
from promag.training.fsdp import leave_process_group
rank = int(os.environ["RANK"])
processes.processes()
torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=0.5))
assert processes.broadcast_from_main(lambda: time.sleep(1.5) or 7) == 7
with processes.main_process_first() as main:
    time.sleep(1.5 * main)
precision._measured = lambda device: precision.Choice(("bf16", "fp32")[rank], f"measured on rank {rank}")
chosen = processes.choose_precision_once("auto", sys.argv[1])
Path(sys.argv[1]).with_name(f"precision-{rank}.json").write_text(json.dumps(chosen))
leave_process_group()
"""


def test_ranks_wait_for_the_slowest_and_use_the_precision_of_rank_0(tmp_path):
    run_two_ranks(DIFFERENT, tmp_path / "run")
    assert [json.loads((tmp_path / f"precision-{rank}.json").read_text()) for rank in range(2)] == ["bf16", "bf16"]
