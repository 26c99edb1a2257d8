"""Train a text-to-video transformer in a frozen tokenizer's latent space.

The result is a pipeline. A trained one is trained further, whole or by LoRA.

Latents are cached first, or found in the cache. Start it plainly, with `accelerate launch`, or with torchrun; the same
command again continues a run.
"""

from collections.abc import Sequence

from promag.diffusion.config import DiffusionConfig
from promag.pipelines.build import train_pipeline
from promag.training.command_line import continues, parse_config, run_main


@continues
def main(argv: Sequence[str]) -> int:
    """Train as the configuration says and print where the pipeline lies."""
    config = parse_config(DiffusionConfig, argv, __doc__ or "")
    folder = train_pipeline(config)
    print(f"{'lora' if config.lora else 'pipeline'}: {folder}" if folder else "stopped early; the same command continues")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
