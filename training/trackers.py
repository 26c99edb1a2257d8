"""Where figures, pictures and videos of a training are looked at: TensorBoard, Weights & Biases, or nowhere.

Shapes: H W C and T H W C uint8. Videos are animated GIFs: TensorBoard's own add_video writes nothing, without a word, where
moviepy is missing, while its image page plays a GIF.
"""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from .config import UserError

Tracker = Literal["tensorboard", "wandb"]


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raise UserError for a tracker whose package is missing: accelerate would leave it out without a word."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; pip install {name}, or leave it out")


class Log:
    """Shows pictures and videos on accelerate's trackers; on ranks without trackers nothing happens."""

    def __init__(self, trackers: Sequence[Any] = ()):
        self.trackers = trackers

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Show a picture, H W 3."""
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "png")
        self._show(name, buffer.getvalue(), "png", picture.shape[:2], step)

    def video(self, name: str, frames: np.ndarray, fps: float, step: int) -> None:
        """Show a video, T H W 3, as it is played at `fps`."""
        self._show(name, encode_gif(frames, fps), "gif", frames.shape[1:3], step)

    def _show(self, name: str, data: bytes, kind: str, size: tuple[int, ...], step: int) -> None:
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                image = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=data)
                summary = Summary(value=[Summary.Value(tag=name, image=image)])
                tracker.writer._get_file_writer().add_summary(summary, step)
            else:
                import wandb  # pyright: ignore[reportMissingImports]

                shown = (
                    wandb.Video(io.BytesIO(data), format="gif") if kind == "gif" else wandb.Image(Image.open(io.BytesIO(data)))
                )
                tracker.log({name: shown}, step=step)


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """Return T H W 3 as a GIF that plays for ever, each frame in 256 colours of its own; frames last whole centiseconds.

    Raises ValueError for another shape or type.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames) or fps <= 0:
        raise ValueError(f"frames of shape {frames.shape}, {frames.dtype}, fps {fps}: T H W 3 of uint8, fps above 0 are needed")
    # Rounded ends, not rounded lengths: the whole lasts as long as it should.
    ends = np.round(100 * np.arange(1, len(frames) + 1) / fps).astype(int)
    lengths = np.diff(ends, prepend=0).clip(2)  # browsers show shorter frames for a tenth of a second
    pictures = [Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer,
        "gif",
        save_all=True,
        append_images=pictures[1:],
        duration=[10 * int(length) for length in lengths],
        loop=0,
        optimize=False,
        disposal=2,
    )
    return buffer.getvalue()
