"""Train a video tokenizer, or grow levels on an existing video autoencoder.

Start it plainly, with `accelerate launch`, or with torchrun; the same command again continues a run.
"""

import sys
from collections.abc import Sequence

from promag.pipelines.base_latents import open_base_latents
from promag.tokenizer.config import TokenizerConfig
from promag.tokenizer.train import train_tokenizer
from promag.training.command_line import continues, parse_config, run_main


@continues
def main(argv: Sequence[str]) -> int:
    """Train as the configuration says and print where the tokenizer lies."""
    folder = train_tokenizer(parse_config(TokenizerConfig, argv, __doc__ or ""), open_latents=open_base_latents)
    print(f"tokenizer: {folder}" if folder else "stopped early; the same command continues", file=sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
