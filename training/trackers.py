"""Logging of figures, images and videos to TensorBoard and Weights & Biases.

Shapes: H W C and T H W C uint8. Videos are logged as animated GIFs: TensorBoard's own add_video silently writes nothing if
moviepy is missing, but its image tab plays GIFs. Weights & Biases drops what is logged for a step below its newest one, and
every stage counts from 1: there the step is a figure too, over which the stage's others are drawn.
"""

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from .config import UserError
from .gif import encode_gif

Tracker = Literal["tensorboard", "wandb"]


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raise UserError if a tracker's package is missing: accelerate would silently skip it."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; run pip install {name}, or leave it out")


class Log:
    """Logs figures, images and videos of a stage to the rank's trackers; names start with that of the stage."""

    def __init__(self, trackers: Sequence[Any] = (), stage: str = ""):
        self.trackers, self.stage = trackers, stage
        for tracker in trackers:
            if tracker.name == "wandb":
                tracker.run.define_metric(f"{stage}/step")
                tracker.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Log figures by their names."""
        for tracker in self.trackers:
            self._log(tracker, values, step)

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Log an image, H W 3."""
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "png")
        self._show(name, buffer.getvalue(), "png", picture.shape[:2], step)

    def video(self, name: str, frames: np.ndarray, fps: float, step: int) -> None:
        """Log a video, T H W 3, that plays at `fps` frames per second."""
        self._show(name, encode_gif(frames, fps), "gif", frames.shape[1:3], step)

    def _show(self, name: str, data: bytes, kind: str, size: tuple[int, ...], step: int) -> None:
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                image = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=data)
                summary = Summary(value=[Summary.Value(tag=self._named(name), image=image)])
                tracker.writer._get_file_writer().add_summary(summary, step)
            else:
                import wandb  # pyright: ignore[reportMissingImports]

                media = (
                    wandb.Video(io.BytesIO(data), format="gif") if kind == "gif" else wandb.Image(Image.open(io.BytesIO(data)))
                )
                self._log(tracker, {name: media}, step)

    def _named(self, name: str) -> str:
        return f"{self.stage}/{name}"

    def _log(self, tracker: Any, values: Mapping[str, Any], step: int) -> None:
        values = {self._named(name): value for name, value in values.items()}
        if tracker.name == "wandb":
            tracker.log({**values, f"{self.stage}/step": step})
        else:
            tracker.log(values, step=step)
