"""Both trainers started by torchrun on two CPU processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from scripts import cache_latents
from tests.scripts.conftest import overrides
from tests.scripts.test_scripts import diffusion_arguments, encoder, tokenizer_arguments, write_t5


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
    write_t5(tmp_path / "t5")
    text = {"encoders": [encoder(tmp_path / "t5"), encoder("small")], "width": 16, "layers": 1, "heads": 2}
    diffusion = diffusion_arguments(tmp_path / "d", tmp_path / "t" / "tokenizer", text=text)
    torchrun("train_diffusion", diffusion)
    for folder in (tmp_path / "t" / "4x", tmp_path / "t" / "16x", tmp_path / "d" / "16x"):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in lines if "loss" in r] == [1, 2]  # written once, not by each process
    assert (tmp_path / "d" / "pipeline" / "model_index.json").exists()
    caches = (tmp_path / "d" / "latents", tmp_path / "alone")
    # Two processes cached the three clips, one clip a shard; alone, one process writes the same, bit for bit.
    cache_latents.main([*diffusion, *overrides({"data": {"cache": str(caches[1])}})])
    for folder in ("train-16x", "eval-16x", "train-text-1", "eval-text-1"):
        together, alone = ({p.name: p.read_bytes() for p in (cache / folder).iterdir()} for cache in caches)
        assert together == alone
    assert len(list((caches[0] / "train-16x").glob("shard*"))) == 3
