"""How a pipeline replays its transformer's calls as CUDA graphs."""

from typing import Any, cast

from promag.training.graphs import disable_graphs, enable_graphs


class Graphed:
    """Mixin of a pipeline with a transformer."""

    def enable_graphs(self) -> None:
        """Replay the transformer's calls as CUDA graphs from now on, one for each shape, temporal ratio and frame rate.

        To be called when attention, compiled blocks and adapters are set; adapters may change later, what is offloaded or
        cached may not. Raises UserError without a GPU, and ValueError for a pipeline that is offloaded, caches blocks or has
        no transformer.
        """
        transformer = cast(Any, self).transformer
        if transformer is None:
            raise ValueError("transformer: this pipeline was made without one")
        disable_graphs(transformer)
        enable_graphs(transformer)

    def disable_graphs(self) -> None:
        """Call the transformer as it is from now on, and free the memory of its graphs."""
        disable_graphs(cast(Any, self).transformer)
