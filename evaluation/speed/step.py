"""What follows the backward pass of a training step."""

import torch
from diffusers.training_utils import EMAModel

from promag.training.graphs import make_recorder
from promag.training.loop import Objective
from promag.training.optimizers import OptimizationConfig, make_optimizers
from promag.training.precision import Chosen
from promag.training.update import Update


class WeightUpdate:
    """Clips gradients, lets the optimisers step and averages the weights, as the training loop does; then drops the gradients.

    Args:
        objective: what is trained; its weights must stay where they are.
        settings: how to optimise.
        precision: in which Muon orthogonalises.
        graphs: replay clipping, optimisers and average as CUDA graphs.
    """

    def __init__(self, objective: Objective, settings: OptimizationConfig, precision: Chosen, graphs: bool = False):
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(objective, settings, precision)
        average = EMAModel(self.parameters, decay=settings.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.update = Update(
            self.optimizers, average, self.parameters, [self.parameters], settings.clip_norm, make_recorder(graphs)
        )

    def __call__(self) -> None:
        """Use the gradients that the weights hold now."""
        (norm,) = self.update.clip()
        self.update((~torch.isfinite(norm)).float())
        for optimizer in self.optimizers:
            optimizer.zero_grad()
