"""Videos are read back from TensorBoard's files, frame by frame."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.tracking import WandBTracker
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from promag.training.config import UserError
from promag.training.gif import encode_gif
from promag.training.loop import close_trackers, make_accelerator
from promag.training.trackers import Log, check_trackers


def decoded(gif: bytes) -> tuple[np.ndarray, list[int]]:
    """Return frames, T H W 3, and the display time of each in milliseconds."""
    with Image.open(io.BytesIO(gif)) as picture:
        frames = [(np.asarray(f.convert("RGB")), f.info.get("duration", 0)) for f in ImageSequence.Iterator(picture)]
    return np.stack([pixels for pixels, _ in frames]), [duration for _, duration in frames]


def shown_videos(run: Path) -> dict[str, list[tuple[int, np.ndarray, list[int]]]]:
    """Return step, frames and durations of the animated images in TensorBoard's files below a folder, by tag."""
    (events,) = {path.parent for path in run.rglob("events.out*")}
    accumulator = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    return {
        tag: [(event.step, *decoded(event.encoded_image_string)) for event in accumulator.Images(tag)]
        for tag in accumulator.Tags()["images"]
    }


def clip(frames=9):
    """T 24 32 3: a gradient with a moving square."""
    video = np.zeros((frames, 24, 32, 3), np.uint8)
    video[..., 0] = np.arange(32) * 8
    video[..., 1] = (np.arange(24) * 10)[:, None]
    for t in range(frames):
        video[t, 4:10, 2 * t : 2 * t + 6] = (255, 255, 255 - 10 * t)
    return video


def test_a_gif_holds_every_frame_for_its_time():
    video = clip()
    frames, durations = decoded(encode_gif(video, 16))
    assert frames.shape == video.shape
    assert np.abs(frames.astype(int) - video).mean() < 4
    assert all(frames[t, 6, 2 * t + 2].tolist() == pytest.approx([255, 255, 255 - 10 * t], abs=8) for t in range(9))
    assert sum(durations) == pytest.approx(9 / 16 * 1000, abs=10)
    still = np.repeat(video[:1], 3, 0)
    frames, durations = decoded(encode_gif(still, 10))
    assert sum(durations) == 300  # equal frames may be stored as one longer frame


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_what_accelerate_would_wrap_a_model_with_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=rf"\(ACCELERATE_USE_{name}\): run.distributed, ddp or fsdp2, .* launch --multi_gpu"):
        make_accelerator(tmp_path, "fp32")
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_the_logged_videos(tmp_path):
    accelerator = make_accelerator(tmp_path, "fp32")
    accelerator.init_trackers("promag")
    log, videos = Log(accelerator.trackers, "16x"), [clip(), clip()[::-1].copy()]
    for step, video in enumerate(videos):
        log.video("0 a square", video, 8, step)
    log.picture("sheet", videos[0][0], 3)
    close_trackers(accelerator)
    shown = shown_videos(tmp_path)
    assert [step for step, _, _ in shown["16x/0 a square"]] == [0, 1]
    for (_, frames, durations), video in zip(shown["16x/0 a square"], videos, strict=True):
        assert frames.shape == video.shape
        assert np.abs(frames.astype(int) - video).mean() < 4
        assert sum(durations) == pytest.approx(1125, abs=10)


class WandbRun:
    """A run of Weights & Biases: what is logged for a step below its newest one is dropped."""

    def __init__(self):
        self.step, self.lines, self.axes = 0, [], {}

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, values, step=None):
        if step is None or step >= self.step:
            self.step = self.step + 1 if step is None else step
            self.lines.append(values)


def test_wandb_keeps_what_later_stages_log(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda picture: picture.size))
    tracker = WandBTracker("promag")
    tracker.run = run = WandbRun()
    for stage, steps in (("4x", (1, 50)), ("8x", (1, 25))):
        log = Log([tracker], stage)
        for step in steps:
            log.figures({"loss": step / 100}, step)
        log.picture("reconstruction", clip()[0], steps[-1])
    assert run.lines == [
        {"4x/loss": 0.01, "4x/step": 1},
        {"4x/loss": 0.5, "4x/step": 50},
        {"4x/reconstruction": (32, 24), "4x/step": 50},
        {"8x/loss": 0.01, "8x/step": 1},
        {"8x/loss": 0.25, "8x/step": 25},
        {"8x/reconstruction": (32, 24), "8x/step": 25},
    ]
    assert run.axes == {"4x/step": None, "4x/*": "4x/step", "8x/step": None, "8x/*": "8x/step"}


def test_tensorboard_keeps_each_stages_steps(tmp_path):
    accelerator = make_accelerator(tmp_path, "fp32")
    accelerator.init_trackers("promag")
    for stage, step in (("4x", 50), ("8x", 25)):
        Log(accelerator.trackers, stage).figures({"loss": 0.5}, step)
    close_trackers(accelerator)
    (events,) = {path.parent for path in tmp_path.rglob("events.out*")}
    accumulator = EventAccumulator(str(events)).Reload()
    assert [accumulator.Scalars(f"{stage}/loss")[0].step for stage in ("4x", "8x")] == [50, 25]


def test_without_trackers_nothing_is_written(tmp_path):
    accelerator = make_accelerator(tmp_path, "fp32", trackers=())
    Log().video("a", clip(), 8, 0)
    assert not accelerator.trackers
    assert list(tmp_path.rglob("events*")) == []


def test_mistakes_are_named():
    with pytest.raises(UserError, match="trackers: wandb is not installed; run pip install wandb"):
        check_trackers(["tensorboard", "wandb"])
    for frames, fps in ((clip().astype(float), 8), (clip()[0], 8), (clip(), 0), (clip()[:0], 8)):
        with pytest.raises(ValueError, match="T H W 3 of uint8 and an fps above 0 are needed"):
            encode_gif(frames, fps)
