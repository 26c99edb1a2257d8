"""Train a tiny decoder of a tokenizer's latents, for previews and fast pipelines.

Start it plainly, with `accelerate launch`, or with torchrun; the same command again continues a run.
"""

import sys
from collections.abc import Sequence

from promag.tokenizer.tiny_training import TinyDecoderConfig, train_tiny_decoder
from promag.training.command_line import continues, parse_config, run_main


@continues
def main(argv: Sequence[str]) -> int:
    """Train as the configuration says and print where the decoder lies."""
    folder = train_tiny_decoder(parse_config(TinyDecoderConfig, argv, __doc__ or ""))
    print(f"tiny decoder: {folder}" if folder else "stopped early; the same command continues", file=sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
