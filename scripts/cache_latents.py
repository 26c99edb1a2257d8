"""Encode the clips and captions of a text-to-video training into its caches.

Clips are encoded by the frozen tokenizer, captions by the frozen text encoders.

Start it plainly, with `accelerate launch`, or with torchrun, which divides the work; after an interruption the same command
continues.
"""

from collections.abc import Sequence

from promag.diffusion.config import DiffusionConfig
from promag.pipelines.build import cache
from promag.tokenizer.checkpoint import load_tokenizer
from promag.training.command_line import continues, parse_config, run_main
from promag.training.processes import processes


@continues
def main(argv: Sequence[str]) -> int:
    """Write the caches of both splits and print where they lie."""
    config = parse_config(DiffusionConfig, argv, __doc__ or "")
    cached = cache(config, load_tokenizer(config.tokenizer))
    if processes().is_main_process:
        for split, part in ((split, part) for split, parts in cached.items() for part in parts):
            print(f"{split}: {', '.join(map(str, [*part.latents, *part.texts.values()]))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
