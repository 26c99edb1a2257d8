import threading

import numpy as np
import pytest
import torch
from PIL import Image

from promag import ProMAGPipeline
from promag.pipelines.sampling import Draft, SampleRequest, Seconds, load_pipeline, make_videos, trained_ratios
from promag.training.config import UserError
from tests.conftest import make_tokenizer
from tests.tiny_pipeline import make_pipeline

REQUESTS = [
    SampleRequest("a red disc moves left", 5),
    SampleRequest("a blue square grows", 5),
    SampleRequest("a red disc moves left", 6),
]
OPTIONS = {"precision": "fp32", "num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def sampled(pipe, requests, batch=1, **options):
    return [video for videos, _ in make_videos(pipe, requests, batch, **OPTIONS, **options) for video in videos]


def test_a_video_depends_on_its_prompt_and_seed_alone(pipe):
    alone = [sampled(pipe, [request])[0] for request in REQUESTS]
    assert alone[0].dtype == np.uint8
    assert alone[0].shape == (17, 16, 24, 3)
    for batch in (1, 2, 3):
        for request, video in zip(alone, sampled(pipe, REQUESTS, batch), strict=True):
            assert np.abs(request.astype(int) - video).max() <= 1  # rounding
    assert np.array_equal(sampled(pipe, REQUESTS[::-1])[-1], alone[0])
    for other in alone[1:]:
        assert np.abs(alone[0].astype(int) - other).mean() > 1


def test_progress_is_reported_and_every_part_takes_time(pipe):
    progress, spent = [], []
    for _, seconds in make_videos(
        pipe, REQUESTS, 2, on_progress=lambda *count: progress.append((len(spent), *count)), **OPTIONS
    ):
        spent.append(seconds)
        assert min(seconds.text, seconds.denoising, seconds.decoding) > 0
    assert [len(videos) for videos, _ in make_videos(pipe, REQUESTS, 2, **OPTIONS)] == [2, 1]
    assert progress == [(0, 1, 6), (0, 2, 6), (0, 3, 6), (1, 4, 6), (1, 5, 6), (1, 6, 6)]
    assert not pipe.transformer._forward_pre_hooks


def test_a_draft_is_lifted_and_refined(pipe):
    """It equals the same calls made by hand, and each step is reported."""
    request, progress = REQUESTS[0], []
    draft = Draft(16, steps=2, strength=0.5)
    options = {"temporal_ratio": 4, "num_inference_steps": 4, "guidance_scale": 2.0}
    on_progress = lambda *count: progress.append(count)  # noqa: E731
    [(videos, seconds)] = make_videos(pipe, [request], 1, "fp32", on_progress, draft=draft, **options)
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seconds.denoising > 0
    noise = torch.Generator().manual_seed(request.seed)
    coarse = {**options, "temporal_ratio": 16, "num_inference_steps": 2, "output_type": "latent"}
    lifted = pipe.vae.lift(pipe(request.prompt, generator=noise, **coarse).frames, 16, 4)
    frames = pipe(request.prompt, generator=noise, latents=lifted, denoise_strength=0.5, **options).frames
    assert np.array_equal(videos[0], (frames[0] * 255).round().astype(np.uint8))
    [(plain, _)] = make_videos(pipe, [request], 1, "fp32", draft=Draft(16, 2, 0.0), **options)
    decoded = pipe.vae.decode(lifted, 4).sample[0].movedim(0, -1) / 2 + 0.5
    assert np.abs(plain[0].astype(int) - decoded.clamp(0, 1).mul(255).round().int().numpy()).max() <= 1


@pytest.mark.parametrize(
    ("given", "drafted", "refined"),
    [(40, range(23, 40), range(23, 28)), (9, [8], [8]), (17, range(17), range(5)), (18, range(1, 18), range(1, 6))],
)
@pytest.mark.parametrize("as_pictures", [False, True])
def test_a_draft_that_continues_a_clip_and_its_refinement_open_with_the_same_moments(
    pipe, monkeypatch, given, drafted, refined, as_pictures
):
    """Each frame of the clip has a colour of its own, by which the encoded frames are known."""
    video = np.broadcast_to(np.arange(given)[:, None, None, None] / 51, (given, 16, 24, 3)).astype(np.float32)
    pictures = [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in video]
    encoded, encode = [], pipe.vae.encode

    def record(pixels, ratio):
        encoded.append((ratio, ((pixels[0, 0, :, 0, 0] / 2 + 0.5) * 51).round().int().tolist()))
        return encode(pixels, ratio)

    monkeypatch.setattr(pipe.vae, "encode", record)
    options = {"temporal_ratio": 4, "num_frames": 33, "num_inference_steps": 2, "video": pictures if as_pictures else video}
    list(make_videos(pipe, REQUESTS[:1], 1, "fp32", draft=Draft(16, 1, 0.5), **options))
    assert encoded == [(16, [*drafted]), (4, [*refined])]


@pytest.mark.parametrize(("ratio", "strength"), [(4, 0.5), (16, 1.0), (16, -0.1)])
def test_invalid_drafts_are_refused(pipe, ratio, strength):
    with pytest.raises(ValueError, match=f"draft at {ratio}x with denoise_strength {strength:g} for a video at 4x"):
        next(make_videos(pipe, REQUESTS, draft=Draft(ratio, 2, strength), temporal_ratio=4, **OPTIONS))


def test_a_draft_that_does_not_lift_is_decoded_and_encoded(pipe):
    frames = make_tokenizer(hand_over="frames")
    changed = ProMAGPipeline(**{**pipe.components, "vae": frames})
    request, options = REQUESTS[0], {**OPTIONS, "temporal_ratio": 4}
    [(videos, _)] = make_videos(changed, [request], 1, draft=Draft(16, 2, 0.5), **options)
    options.pop("precision")
    noise = torch.Generator().manual_seed(request.seed)
    coarse = {**options, "temporal_ratio": 16, "num_inference_steps": 2}
    draft = torch.from_numpy(changed(request.prompt, generator=noise, **coarse).frames).movedim(-1, 1)
    latents = frames.encode(2 * draft - 1, 4).latent_dist.mode()
    refined = changed(request.prompt, generator=noise, latents=latents, denoise_strength=0.5, **options).frames[0]
    assert np.abs(videos[0].astype(int) - (refined * 255).round()).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"num_inference_steps": 0}, "num_inference_steps"), ({"temporal_ratio": 0}, "temporal_ratio"), ({"batch": 0}, "batch")],
)
def test_zero_is_refused_instead_of_meaning_the_default(pipe, arguments, named):
    with pytest.raises(ValueError, match=f"{named} 0: a whole number of at least 1"):
        list(make_videos(pipe, REQUESTS, **arguments))


# -- overlap ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_overlapped_videos_are_the_same(pipe, batch):
    plain = list(make_videos(pipe, REQUESTS, batch, **OPTIONS))
    overlapped = list(make_videos(pipe, REQUESTS, batch, overlap=True, **OPTIONS))
    assert [len(videos) for videos, _ in overlapped] == [len(videos) for videos, _ in plain]
    for (one, _), (other, seconds) in zip(plain, overlapped, strict=True):
        assert np.array_equal(one, other)
        assert min(seconds.text, seconds.denoising, seconds.decoding) > 0


def test_a_batch_is_decoded_while_the_next_one_is_denoised(pipe, monkeypatch):
    """Each decoding but the last waits here for the first step of the denoising after it."""
    begun, decoding = [threading.Event() for _ in REQUESTS], pipe.decode_latents
    following = iter([*begun[1:], None])

    def decode(*arguments):
        event = next(following)
        assert event is None or event.wait(60)
        return decoding(*arguments)

    monkeypatch.setattr(pipe, "decode_latents", decode)
    on_progress = lambda done, _: begun[(done - 1) // 3].set()  # noqa: E731
    assert len(list(make_videos(pipe, REQUESTS, 1, on_progress=on_progress, overlap=True, **OPTIONS))) == 3


def test_decoding_leaves_the_cache_in_which_another_thread_denoises(pipe, monkeypatch):
    resets = []
    monkeypatch.setattr(pipe.transformer, "_reset_stateful_cache", lambda *_: resets.append(1), raising=False)
    pipe.decode_latents(torch.zeros(1, 4, 2, 2, 3), 16)
    assert not resets
    pipe.maybe_free_model_hooks()
    assert resets


def test_what_fails_aside_is_raised_and_nothing_runs_on(pipe, monkeypatch):
    def fail(*_):
        raise ValueError("no video")

    before = threading.active_count()
    videos = make_videos(pipe, REQUESTS, 1, overlap=True, **OPTIONS)
    next(videos)
    videos.close()
    monkeypatch.setattr(pipe, "decode_latents", fail)
    with pytest.raises(ValueError, match="no video"):
        next(make_videos(pipe, REQUESTS, 1, overlap=True, **OPTIONS))
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overlap": 1}, "overlap 1: True or False is needed"),
        ({"overlap": True, "draft": Draft(16, 2, 0.5), "temporal_ratio": 4}, "overlap: a draft needs the tokenizer"),
    ],
)
def test_overlaps_that_cannot_be_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        next(make_videos(pipe, REQUESTS, **arguments, **OPTIONS))


def test_overlap_with_one_model_at_a_time_is_refused():
    pipe = make_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="overlap: this pipeline holds one model at a time on its device"):
        next(make_videos(pipe, REQUESTS, overlap=True, **OPTIONS))


def test_seconds_add_up():
    assert Seconds(1, 2, 3) + Seconds(0.5, 0, 1) == Seconds(1.5, 2, 4)
    assert str(Seconds(1, 2, 3.5)) == "text 1.00 s, denoising 2.00 s, decoding 3.50 s, together 6.50 s"


def test_ratios_are_those_of_the_transformer(pipe):
    assert trained_ratios(pipe) == (4, 16)


def test_a_folder_that_is_no_pipeline_is_named(pipe, tmp_path):
    with pytest.raises(UserError, match=r"no model_index\.json there"):
        load_pipeline(tmp_path)
    pipe.save_pretrained(tmp_path)
    assert trained_ratios(load_pipeline(tmp_path)) == (4, 16)
    (tmp_path / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_pipeline(tmp_path)
    assert "\n" not in str(error.value)
