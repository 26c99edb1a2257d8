"""Odd arguments of the pipeline's call, the tokenizer, the transformer, the samplers and the schedulers."""
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# Arguments of wrong types are what this module is about.

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from PIL import Image

from promag import AutoencoderKLProMAG, ProMAGPipeline, ProMAGTransformer3DModel
from promag.diffusion.flow import euler_step, flow_times, sample_flow
from promag.diffusion.text import learn_vocabulary, small_clip
from promag.pipelines.sampling import Draft, SampleRequest, make_videos, sample_videos
from promag.tokenizer.growth import Growth
from promag.tokenizer.streaming import chunk_plan, reconstruct

from .outcomes import Case

PROMPT = "a red disc moves left"
NOT_COUNTS = (0, -1, 1.5, math.nan, math.inf, True, "8", [16], 10**30)
NOT_NUMBERS = (math.nan, math.inf, -math.inf, True, "4", [1.0], None.__class__, 1e308)
# What a message about an argument may call it instead.
OTHER_WORDS = {
    "num_frames": ("frames",),
    "max_sequence_length": ("text tokens",),
    "prompt_attention_mask": ("prompt_embeds",),
}
PROMPTS = (
    "", [], ["a", 5], 5, b"a disc", "\ud800", "a \x00\x07\x1b disc", "disc " * 20_000, [["a"]], ("a",), {"a": 1}, [""], [None],
    math.nan, True,
)  # fmt: skip


def make_transformer(patch_size: Sequence[int] = (1, 1, 1)) -> ProMAGTransformer3DModel:
    """Return a small transformer of random weights that knows 4x and 16x and takes given frames."""
    statistics = {str(ratio): [0.5] * 4 for ratio in (4, 16)}
    transformer = ProMAGTransformer3DModel(
        in_channels=4,
        patch_size=patch_size,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        text_dim=16,
        pooled_dim=16,
        condition_frames=2,
        latents_mean=statistics,
        latents_std=statistics,
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return transformer


def make_pipeline() -> ProMAGPipeline:
    """Return a small pipeline of random weights that samples 17 frames of 16x24 at 16x and takes given frames."""
    torch.manual_seed(0)
    vocabulary = learn_vocabulary([PROMPT, "a blue square grows"], 300, max_length=10)
    transformer = make_transformer()
    vae = AutoencoderKLProMAG(
        latent_channels=4, patch_size=4, block_out_channels=(16, 16, 16), layers_per_block=1, strides=((2, 2), (2, 1))
    )
    for _ in range(2):
        vae.grow(Growth())
    pipe = ProMAGPipeline(
        vocabulary,
        small_clip(vocabulary, width=16, layers=1, heads=2),
        transformer.eval(),
        vae.eval(),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        height=16,
        width=24,
        num_frames=17,
        fps=8.0,
        temporal_ratio=16,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def odd_arguments(pipe: Any) -> Iterator[Case]:
    """Yield every case."""
    yield from _calls(pipe)
    yield from _schedulers(pipe)
    yield from _tokenizer(pipe.vae)
    yield from _transformer(pipe)
    yield from _samplers(pipe)


def _calls(pipe: Any) -> Iterator[Case]:
    nan_picture, picture = torch.full((3, 16, 24), math.nan), torch.rand(3, 16, 24)
    seeds = [torch.Generator(), torch.Generator()]
    shape = (1, 4, 2, 2, 3)
    values: dict[str, Any] = dict.fromkeys(
        ("height", "width", "num_frames", "num_inference_steps", "num_videos_per_prompt", "temporal_ratio"), NOT_COUNTS
    )
    values |= dict.fromkeys(("guidance_scale", "fps", "denoise_strength"), (*NOT_NUMBERS, -1))
    values |= {
        "prompt": PROMPTS,
        "negative_prompt": PROMPTS,
        "generator": (42, "0", [42], seeds, [], -1.5, True, [None, None], (seeds[0],)),
        "max_sequence_length": (0, -1, 1.5, True, 10**6, [8, 8], "8", math.nan, [], np.int64(8), np.ones(2)),
        "latents": (np.zeros(shape), torch.full(shape, math.nan), torch.zeros(2, 4), torch.ones(shape).long(), [0], 0, "x",
                    torch.full(shape, math.inf), torch.zeros(shape, dtype=torch.complex64)),
        "image": (0, "x.png", [], nan_picture, torch.rand(3, 8, 8), torch.rand(1, 16, 24), picture.to(torch.uint8), math.nan,
                  Image.new("L", (24, 16)), Image.new("RGBA", (24, 16)), np.zeros((16, 24)), torch.rand(0, 3, 16, 24), True,
                  [picture] * 3, [[picture]]),
        "video": (0, [], nan_picture[None], [picture] * 2, [[picture], [picture, picture]], "x.mp4", torch.rand(0, 3, 16, 24),
                  torch.rand(5, 3, 16, 24), [picture, 5]),
        "output_type": ("mp4", "", 5, ["np"], np.array(["np", "pt"]), math.nan),
        "callback_on_step_end": (5, "f", [print], lambda *_: 5, lambda *_: {"latents": 5}, lambda *_: None),
        "callback_on_step_end_tensor_inputs": ("latents", None, [5], [["latents"]], ["x"], 5),
        "attention_kwargs": (5, {"scale": "x"}, {"scale": math.nan}, {"sclae": 1}, [], {"scale": None}, {"scale": 1e308}),
        "prompt_attention_mask": (torch.ones(1, 10), 5),
    }  # fmt: skip
    for name, given in values.items():
        for value in given:
            arguments = {"prompt": PROMPT, "num_inference_steps": 1, name: value}
            if name == "denoise_strength":
                arguments["latents"] = torch.zeros(shape)
            yield Case(
                f"pipe({name}={value!r:.80})",
                lambda arguments=arguments: pipe(**arguments).frames,
                (name, *OTHER_WORDS.get(name, ())),
            )
    names = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
    with torch.no_grad():
        embeds = dict(zip(names, pipe.encode_prompt(PROMPT)[:3], strict=True))
    for name, tensor in embeds.items():
        for value in (5, [], "x", tensor * math.nan if tensor.is_floating_point() else tensor * 0, tensor[..., :-1], tensor[0],
                      [tensor, tensor], tensor.numpy(), None, tensor[:0]):  # fmt: skip
            arguments = {**embeds, "num_inference_steps": 1, name: value}
            yield Case(
                f"pipe({name}={value!r:.60})",
                lambda arguments=arguments: pipe(**arguments).frames,
                (*names, "pooled_projections"),
            )


def _schedulers(pipe: Any) -> Iterator[Case]:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
    made = [*itertools.product(names, ({}, flow))]
    euler = "FlowMatchEulerDiscreteScheduler"
    for settings in ({"invert_sigmas": True}, {"stochastic_sampling": True}, {"shift_terminal": 0.1}, {"shift": math.nan},
                     {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"time_shift_type": "linear"},
                     {"shift": 0}, {"shift": "x"}, {"num_train_timesteps": 500}, {"num_train_timesteps": 0}):  # fmt: skip
        made.append((euler, {"use_dynamic_shifting": True, **settings}))
    for name, settings in made:
        try:
            scheduler = getattr(diffusers, name)(**settings)
        except (ImportError, IndexError, TypeError):
            continue  # diffusers itself cannot make it
        if isinstance(scheduler, SchedulerMixin):
            yield Case(f"scheduler {name}({settings})", lambda made=scheduler: _with_scheduler(pipe, made), (name,))
    for value in (None, 5, "euler", FlowMatchEulerDiscreteScheduler, pipe.vae):
        yield Case(f"scheduler {value!r:.60}", lambda value=value: _with_scheduler(pipe, value), ("scheduler",))


def _with_scheduler(pipe: Any, scheduler: Any, steps: int = 1) -> Any:
    parts = {**pipe.components, "scheduler": scheduler}
    other = ProMAGPipeline(**parts, height=16, width=24, num_frames=17, fps=8.0, temporal_ratio=16)
    other.set_progress_bar_config(disable=True)
    return other(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).frames


def _tokenizer(vae: Any) -> Iterator[Case]:
    clip, latent = torch.zeros(1, 3, 17, 16, 24), torch.zeros(1, 4, 2, 2, 3)
    ratios = (0, -4, 1.5, 16.0, math.nan, math.inf, True, "16", [16], 12, torch.tensor(16), 10**30)
    shapes = (5, None, [1], "x", np.zeros(clip.shape), clip[0], clip[:, :2], clip[..., :9], clip[:, :, :0], clip.int(),
              clip[:0], clip.bool(), clip.to(torch.complex64))  # fmt: skip
    for ratio in ratios:
        for name, call in {
            "encode": lambda ratio=ratio: vae.encode(clip, ratio).latent_dist.mode(),
            "decode": lambda ratio=ratio: vae.decode(latent, ratio).sample,
            "encode_levels": lambda ratio=ratio: vae.encode_levels(clip, [ratio])[0].mode(),
            "lift": lambda ratio=ratio: vae.lift(latent, 16, ratio),
        }.items():
            yield Case(f"{name} at {ratio!r}", call, ("ratio",))
    for x in shapes:
        yield Case(f"encode {x!r:.60}", lambda x=x: vae.encode(x, 16).latent_dist.mode(), ("input", "frames", "width"))
        yield Case(f"encode_chunk {x!r:.60}", lambda x=x: vae.encode_chunk(x)[0].mode(), ("input", "frames", "width"))
        yield Case(f"reconstruct {x!r:.60}", lambda x=x: reconstruct(vae, x, 16).sample, ("input", "frames", "width"))
    for z in (5, None, [1], "x", latent[0], latent[:, :2], latent[:, :, :0], latent[..., :0], latent.int(), latent.numpy()):
        yield Case(f"decode {z!r:.60}", lambda z=z: vae.decode(z, 16).sample, ("latent",))
        yield Case(f"lift {z!r:.60}", lambda z=z: vae.lift(z, 16, 4), ("latent",))
    for state in (5, "x", {}, [1]):
        yield Case(
            f"encode_chunk state {state!r}", lambda s=state: vae.encode_chunk(clip[:, :, 1:], s, 16)[0].mode(), ("state",)
        )
        yield Case(f"decode_chunk state {state!r}", lambda s=state: vae.decode_chunk(latent, s, 16)[0], ("state",))
    for value in (0, -8, 1.5, 12, math.nan, math.inf, True, "64", [64], 10**30):
        for name in ("tile_sample_min_height", "tile_sample_stride_width"):
            yield Case(f"enable_tiling({name}={value!r})", lambda n=name, v=value: _tiled(vae, {n: v}), ("height", "width"))
        yield Case(f"chunk {value!r}", lambda v=value: chunk_plan(17, 16, v), ("chunk",))
        yield Case(f"reconstruct(chunk={value!r})", lambda v=value: reconstruct(vae, clip, 16, v).sample, ("chunk",))
    yield Case("encode_levels at none", lambda: vae.encode_levels(clip, []), ("ratio",))
    yield Case("encode_levels at 5", lambda: vae.encode_levels(clip, 5), ("ratio",))


def _tiled(vae: Any, sizes: dict[str, Any]) -> None:
    tiling = vae.tiling
    try:
        vae.enable_tiling(**sizes)
    finally:
        vae.tiling, vae.use_tiling = tiling, False


@torch.no_grad()
def _transformer(pipe: Any) -> Iterator[Case]:
    tokens, mask, pooled = pipe.encode_prompt(PROMPT)[:3]
    right = {
        "hidden_states": torch.zeros(1, 4, 2, 2, 3),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": tokens,
        "encoder_attention_mask": mask,
        "pooled_projections": pooled,
        "temporal_ratio": 16,
        "fps": 8.0,
        "attention_kwargs": None,
    }
    x = right["hidden_states"]
    odd: dict[str, tuple[Any, ...]] = {
        "hidden_states": (5, None, x[0], x[:, :2], x.numpy(), x.int(), x[:, :, :0], x[:0]),
        "timestep": (500.0, 500, None, "x", torch.tensor(500.0), torch.ones(2), torch.ones(1, 3), torch.ones(1, 1, 1), [500.0],
                     math.nan),
        "encoder_hidden_states": (5, None, tokens[0], tokens[..., :4], [], [tokens, tokens], tokens.numpy(), tokens[:, :0],
                                  torch.cat([tokens] * 3), ["x"]),
        "encoder_attention_mask": (5, None, mask[0], mask[:, :4], [], [mask, mask], "x", mask.numpy(), torch.cat([mask] * 3),
                                   mask * 0),
        "pooled_projections": (5, None, pooled[:, :4], "x", torch.cat([pooled] * 3), pooled[0], pooled.numpy()),
        "temporal_ratio": (*NOT_COUNTS, None, torch.tensor(16), torch.tensor([16, 16])),
        "fps": (0, -1, *NOT_NUMBERS, [8.0], None, torch.tensor([8.0]), torch.ones(3), 1e-300),
        "attention_kwargs": (5, {"scale": "x"}, {"scale": math.nan}, {"sclae": 1}),
    }  # fmt: skip
    for name, given in odd.items():
        for value in given:
            arguments = {**right, name: value}
            yield Case(
                f"transformer({name}={value!r:.60})",
                lambda a=arguments: _predicted(pipe.transformer, a),
                (name, "text of", "latent"),
            )
    for ratio in (0, True, "16", 16.0, math.nan, 8):
        yield Case(f"normalise at {ratio!r}", lambda r=ratio: pipe.transformer.normalise(x, r), ("ratio",))


@torch.no_grad()
def _predicted(transformer: Any, arguments: dict[str, Any]) -> Any:
    return transformer(**arguments).sample


def _samplers(pipe: Any) -> Iterator[Case]:
    noise = torch.zeros(1, 4, 2, 2, 3)
    for steps in NOT_COUNTS:
        yield Case(f"flow_times({steps!r})", lambda s=steps: flow_times(s), ("steps",))
    for mu in NOT_NUMBERS:
        yield Case(f"flow_times(4, {mu!r})", lambda m=mu: flow_times(4, m), ("mu",))
    model = lambda x, t: torch.zeros_like(x)  # noqa: E731
    for times in ([], [0, 1], [math.nan, 0], [2, 0], "x", None, 5, [[1, 0]], ["a"], [1, 0, 0], [True, False]):
        yield Case(f"sample_flow(times={times!r})", lambda t=times: sample_flow(model, noise, t), ("times",))
    for value in (None, 5, "x", noise[0], noise.int(), noise.numpy()):
        yield Case(f"sample_flow(noise={value!r:.40})", lambda v=value: sample_flow(model, v, [1, 0]), ("noise",))
    for value in (5, "x", noise[0], noise[:, :2], torch.cat([noise] * 3), torch.zeros(1, 4, 3, 2, 3), noise[..., :1]):
        yield Case(
            f"sample_flow(conditioning={value!r:.40})",
            lambda v=value: sample_flow(model, noise, [1, 0], conditioning=v),
            ("conditioning",),
        )
    for value in (None, 5, "euler"):
        yield Case(f"sample_flow(model={value!r})", lambda v=value: sample_flow(v, noise, [1, 0]), ("model",))
        yield Case(f"sample_flow(step={value!r})", lambda v=value: sample_flow(model, noise, [1, 0], step=v), ("step",))
    yield Case("sample_flow", lambda: sample_flow(model, noise, [1, 0], step=euler_step), ())
    one = [SampleRequest(PROMPT, 0)]
    odd: dict[str, tuple[Any, ...]] = {
        "batch": NOT_COUNTS[:-1],
        "num_inference_steps": NOT_COUNTS,
        "temporal_ratio": NOT_COUNTS,
        "guidance_scale": NOT_NUMBERS,
        "fps": NOT_NUMBERS,
        "precision": ("fp8", 5, None),
        "output_type": ("latent", "pil", "pt", 5),
        "num_videos_per_prompt": (2, 0),
        "return_dict": (False,),
        "draft": (5, Draft(0, 1, 0.5), Draft(16, 1, math.nan), Draft(16, 1, 0.5), Draft(8, 0, 0.5), Draft(8, 1.5, 0.5)),  # pyright: ignore
        "overlap": (1, "yes", None),
        "wrong_name": (1,),
    }
    for name, given in odd.items():
        for value in given:
            arguments = {"num_inference_steps": 1, name: value}
            yield Case(
                f"make_videos({name}={value!r:.40})",
                lambda a=arguments: [list(videos) for videos, _ in make_videos(pipe, one, **a)],
                (name, "tokens"),
            )
    for seed in (-1, 1.5, math.nan, "0", True, 2**64, None):
        request: Any = SampleRequest(PROMPT, seed)  # pyright: ignore
        yield Case(
            f"make_videos of seed {seed!r}",
            lambda r=request: [list(videos) for videos, _ in make_videos(pipe, [r], num_inference_steps=1)],
            ("seed",),
        )
    for prompts in PROMPTS:
        yield Case(f"sample_videos({prompts!r:.40})", lambda p=prompts: sample_videos(pipe, p, 1, 1.0, name=None), ("prompt",))
    for name, given in {"steps": NOT_COUNTS, "guidance": NOT_NUMBERS, "first_seed": (-1, 1.5, math.nan, "0", 2**64)}.items():
        for value in given:
            arguments = {"steps": 1, "guidance": 1.0, "name": None, name: value}
            yield Case(
                f"sample_videos({name}={value!r})", lambda a=arguments: sample_videos(pipe, [PROMPT], **a), (name, "seed")
            )
