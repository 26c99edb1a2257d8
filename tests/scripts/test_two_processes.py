"""Both trainers started by torchrun on two CPU processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.scripts.test_scripts import diffusion_arguments, tokenizer_arguments


def torchrun(script: str, arguments: list[str]) -> None:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        "--nproc_per_node",
        "2",
        f"scripts/{script}.py",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_processes_train_one_tokenizer_and_one_pipeline(tmp_path):
    torchrun("train_tokenizer", tokenizer_arguments(tmp_path / "t"))
    torchrun("train_diffusion", diffusion_arguments(tmp_path / "d", tmp_path / "t" / "tokenizer"))
    for folder in (tmp_path / "t" / "4x", tmp_path / "t" / "16x", tmp_path / "d" / "16x"):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in lines if "loss" in r] == [1, 2]  # written once, not by each process
    assert (tmp_path / "d" / "pipeline" / "model_index.json").exists()
    index = json.loads((tmp_path / "d" / "latents" / "train-16x" / "index.json").read_text())
    assert index["clips"] == 3
