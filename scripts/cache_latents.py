"""Encode the clips of a diffusion configuration once with its frozen tokenizer; continues after an interruption."""

from collections.abc import Sequence

from promag.diffusion.train import DiffusionConfig
from promag.pipelines.assemble import cache_latents
from promag.tokenizer.train import load_tokenizer
from promag.training.config import parse_config, run_main


def main(argv: Sequence[str]) -> int:
    """Write the caches of both splits and print where they lie."""
    config = parse_config(DiffusionConfig, argv, __doc__ or "")
    vae = load_tokenizer(config.tokenizer)
    for split in ("train", "eval"):
        print(f"{split}: {', '.join(map(str, cache_latents(config, split, vae)))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
