"""Base-ahead denoising: both halves of the channels go from noise to data, the key frames' half first."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from promag.diffusion import ahead, flow
from promag.diffusion.conditioning import mean_over_generated, times_of_frames
from promag.diffusion.finetune import adapt_to_latents
from promag.diffusion.latent_cache import LatentDataset
from promag.diffusion.objective import VALIDATION_TIMES, FlowObjective
from promag.diffusion.text import learn_vocabulary, small_clip
from promag.diffusion.text_cache import CaptionEncoder
from promag.diffusion.train import new_transformer
from promag.diffusion.transformer import ProMAGTransformer3DModel
from promag.diffusion.validation import ValidationSet
from promag.pipelines.timesteps import SchedulerStep, set_flow_times
from promag.training.config import UserError
from promag.training.loop import seeded
from tests.diffusion.test_buckets import VIDEO, configuration, write
from tests.diffusion.test_flow import midpoint_step

LEADS = st.floats(0.001, 0.999)
ILLEGAL = (-0.1, 1, 1.5, math.nan, True, "0.3", None)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(LEADS, st.integers(1, 200), st.floats(-2, 4))
def test_both_halves_go_from_noise_to_data_and_the_base_is_never_behind(lead, steps, mu):
    base, residual = ahead.half_times(flow.flow_times(steps, mu).double(), lead)
    for times in (base, residual):
        assert times[0] == 1
        assert times[-1] == 0
        assert (times.diff() <= 0).all()
    assert (base <= residual).all()
    both_move = (base > 0) & (residual < 1)
    assert torch.allclose((residual - base)[both_move], torch.tensor(lead, dtype=torch.float64))


@given(LEADS, st.floats(0, 1))
def test_sampling_times_are_the_inverse_of_each_halfs_times(lead, time):
    wanted = torch.tensor([time], dtype=torch.float64)
    for number, times in enumerate(ahead.sampling_times(wanted, lead)):
        assert 0 <= times <= 1
        assert torch.allclose(ahead.half_times(times, lead)[number], wanted, atol=1e-12)


def test_times_at_a_lead_of_one_half():
    base, residual = ahead.half_times(torch.tensor([1.0, 0.8, 0.6, 0.2, 0.0]), 0.5)
    assert torch.allclose(base, torch.tensor([1.0, 0.7, 0.4, 0.0, 0.0]))
    assert torch.allclose(residual, torch.tensor([1.0, 1.0, 0.9, 0.3, 0.0]))


def test_without_a_lead_all_is_plain_rectified_flow():
    x, noise, times = random(2, 4, 3, 2, 2), random(2, 4, 3, 2, 2, seed=1), torch.tensor([0.3, 0.9])
    assert torch.equal(ahead.interpolate(x, noise, times, 0), flow.interpolate(x, noise, times))
    assert ahead.moving_only(x, times, 0) is x
    assert ahead.paced(flow.euler_step, 0) is flow.euler_step


def test_each_half_of_the_noisy_latents_is_at_its_own_time():
    x, noise = random(2, 4, 3, 1, 1), random(2, 4, 3, 1, 1, seed=1)
    times = torch.tensor([[0.0, 0.6, 0.9], [0.2, 0.6, 1.0]], dtype=torch.float64)
    noisy = ahead.interpolate(x, noise, times, 0.5)
    for half, t in zip((slice(0, 2), slice(2, 4)), ahead.half_times(times, 0.5), strict=True):
        t = t[:, None, :, None, None]
        assert torch.equal(noisy[:, half], (1 - t) * x[:, half] + t * noise[:, half])
    moves = ahead.moving_only(torch.ones_like(x), times, 0.5)
    assert moves[:, :2].mean((1, 3, 4)).tolist() == [[0, 1, 1], [0, 1, 1]]
    assert moves[:, 2:].mean((1, 3, 4)).tolist() == [[1, 1, 0], [1, 1, 0]]


def scheduled(kind, steps):
    """Return the step of a scheduler and its times."""
    scheduler = kind(shift=2.0)
    times = set_flow_times(scheduler, steps, 64, torch.device("cpu"))
    return SchedulerStep(scheduler, scheduler.timesteps, None), times


RULES = {
    "euler": lambda steps: (flow.euler_step, flow.flow_times(steps, 1.0)),
    "midpoint": lambda steps: (midpoint_step, flow.flow_times(steps, 1.0)),
    "Euler of diffusers": lambda steps: scheduled(FlowMatchEulerDiscreteScheduler, steps),
    "Heun of diffusers": lambda steps: scheduled(FlowMatchHeunDiscreteScheduler, steps),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_straight_paths_are_exact_in_any_steps(rule, steps):
    clean, noise = (random(2, 4, 3, 2, 2, seed=n).float() for n in (0, 1))
    step, times = RULES[rule](steps)
    result = flow.sample_flow(lambda x, t: flow.velocity(clean, noise), noise, times, step=ahead.paced(step, 0.3))
    assert torch.allclose(result, clean, atol=2e-6)


@pytest.mark.parametrize(
    ("rule", "steps", "tolerance"), [("euler", 400, 0.02), ("midpoint", 60, 0.002), ("Heun of diffusers", 60, 0.004)]
)
def test_correlated_gaussian_data_is_sampled_to_its_mean_and_covariance(rule, steps, tolerance):
    """The velocity is E[noise - clean | noisy] in closed form; noise of exactly unit covariance shows the linear map alone."""
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    covariance = torch.tensor([[1.5, 0.6], [0.6, 0.5]], dtype=torch.float64)

    def model(x, times):
        t = torch.stack([each[0] for each in ahead.half_times(times.double(), 0.3)])
        clean, noisy = torch.diag(1 - t), torch.diag(t)
        gain = (noisy - covariance @ clean) @ torch.linalg.inv(clean @ covariance @ clean + noisy @ noisy)
        centred = x.double() - ((1 - t) * mean).view(1, 2, 1, 1, 1)
        return (torch.einsum("dc,bcthw->bdthw", gain, centred) - mean.view(1, 2, 1, 1, 1)).to(x.dtype)

    raw = random(2, 4096)
    raw = raw - raw.mean(1, keepdim=True)
    white = torch.linalg.solve(torch.linalg.cholesky(raw @ raw.T / 4096), raw)
    noise = white.view(1, 2, 1, 64, 64).float()
    step, times = RULES[rule](steps)
    sampled = flow.sample_flow(model, noise, times, step=ahead.paced(step, 0.3)).view(2, -1).double()
    assert torch.allclose(sampled.mean(1), mean, atol=tolerance)
    assert torch.allclose(torch.cov(sampled, correction=0), covariance, atol=tolerance)


def transformer(lead=0.0, **changes):
    torch.manual_seed(0)
    settings = {"in_channels": 4, "patch_size": (1, 1, 1), "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    return ProMAGTransformer3DModel(**{**settings, "text_dim": 16, "base_ahead": lead, **changes})


def predict(model, time, x=None):
    x = random(1, 4, 2, 2, 2).float() if x is None else x
    with torch.no_grad():
        return model(x, torch.tensor([1000 * time]), random(1, 3, 16, seed=2).float()).sample


def moved(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def test_a_lead_adds_only_an_embedding_that_starts_at_zero():
    plain, leading = transformer(), transformer(0.5)
    assert {name for name in leading.state_dict() if name not in plain.state_dict()} == {
        f"residual_time_embed.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")
    }
    assert all(torch.equal(value, leading.state_dict()[name]) for name, value in plain.state_dict().items())
    moved(plain)
    leading.load_state_dict(plain.state_dict(), strict=False)
    at_birth = predict(plain, 1 - 1.5 * 0.4)  # the base's time alone
    assert torch.allclose(predict(leading, 0.6), at_birth, atol=1e-4)
    assert not torch.allclose(predict(plain, 0.6), at_birth, atol=1e-2)


def test_the_transformer_has_both_times():
    model = moved(transformer(0.5))
    same_base, same_residual = ((0.1, 0.2), (0.8, 0.9))  # the base is at 0, the residual at 1
    for first, second in (same_base, same_residual):
        assert not torch.allclose(predict(model, first), predict(model, second), atol=1e-4)


def test_a_lead_is_saved_and_loaded(tmp_path):
    model = moved(transformer(0.25))
    model.save_pretrained(tmp_path)
    again = ProMAGTransformer3DModel.from_pretrained(tmp_path)
    assert again.config["base_ahead"] == 0.25
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.allclose(predict(again, 0.4), predict(model, 0.4), atol=1e-4)


@pytest.mark.parametrize("lead", ILLEGAL)
def test_illegal_leads_are_named(lead, tmp_path):
    with pytest.raises(ValueError, match=r"base_ahead .*: a number from 0 to below 1 is needed"):
        transformer(lead)
    if isinstance(lead, float | int):
        with pytest.raises(UserError, match="base_ahead"):
            configuration(tmp_path, base_ahead=lead)


def test_an_odd_number_of_channels_has_no_halves():
    with pytest.raises(ValueError, match=r"base_ahead 0\.3 with in_channels 5: an even number is needed"):
        transformer(0.3, in_channels=5)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return LatentDataset(write(tmp_path_factory.mktemp("ahead"), VIDEO, 16, 4))


def objective_of(clips, folder, lead):
    vocabulary = learn_vocabulary(clips.captions(), 300, max_length=12)
    config = configuration(folder, budgets=[{"ratio": 16}], base_ahead=lead)
    torch.manual_seed(0)
    text = CaptionEncoder([None], vocabulary, small_clip(vocabulary, 16, 1, 2))
    return FlowObjective(moved(new_transformer(config, [clips], text)), text, config)


def squared(objective, x, noise, times, text, fps, lead):
    predicted = objective.transformer(
        ahead.interpolate(x, noise, times, lead), times * 1000, text.tokens, text.masks, text.pooled, temporal_ratio=16, fps=fps
    ).sample
    return (predicted - (noise - x)).square()


@torch.no_grad()
def test_a_half_that_rests_counts_nothing_in_the_loss(clips, tmp_path):
    x, noise, fps = random(3, 4, 2, 2, 2).float(), random(3, 4, 2, 2, 2, seed=1).float(), torch.full((3,), 8.0)
    times, mask = torch.tensor([0.95, 0.6, 0.1]), torch.tensor([[True, False], [False, False], [False, False]])
    plain = objective_of(clips, tmp_path, 0.0)
    text = plain.text({"caption": ["a", "b", "c"]})
    for cond_mask in (None, mask):
        each = times if cond_mask is None else times_of_frames(times, cond_mask)
        wanted = squared(plain, x, noise, each, text, fps, 0.0)
        wanted = wanted.flatten(1).mean(1) if cond_mask is None else mean_over_generated(wanted, cond_mask)
        assert torch.equal(plain.errors(x, noise, times, text, fps, 16, cond_mask), wanted)
    leading = objective_of(clips, tmp_path, 0.5)
    text = leading.text({"caption": ["a", "b", "c"]})
    errors = squared(leading, x, noise, times, text, fps, 0.5)
    errors[0, 2:] = errors[2, :2] = 0  # the residual rests at noise, the base at data
    assert torch.allclose(leading.errors(x, noise, times, text, fps, 16), errors.flatten(1).mean(1))
    errors = squared(leading, x, noise, times_of_frames(times, mask), text, fps, 0.5)
    errors[0, 2:] = errors[2, :2] = 0
    assert torch.allclose(leading.errors(x, noise, times, text, fps, 16, mask), mean_over_generated(errors, mask))


@torch.no_grad()
def test_the_validation_loss_takes_each_half_at_the_same_times_of_its_own(clips, tmp_path):
    leading, fps = objective_of(clips, tmp_path, 0.5), torch.full((4,), 8.0)
    rows = [clips.fixed(i) for i in range(4)]
    x = torch.stack([row["latents"] for row in rows])
    noise = torch.stack([torch.randn(x.shape[1:], generator=seeded(0, i)) for i in range(4)])
    text = leading.text({"caption": [row["caption"] for row in rows]})
    wanted = []
    for time in VALIDATION_TIMES:
        base_at, residual_at = (torch.full((4,), s) for s in (1 - (1 - time) / 1.5, time / 1.5))
        wanted.append(squared(leading, x, noise, base_at, text, fps, 0.5)[:, :2].mean())
        wanted.append(squared(leading, x, noise, residual_at, text, fps, 0.5)[:, 2:].mean())
    assert ValidationSet(clips, "17x16x16", clips, 4).loss(leading) == pytest.approx(sum(wanted).item() / len(wanted), rel=1e-5)


def test_further_training_keeps_the_lead_of_init(clips, tmp_path):
    text = objective_of(clips, tmp_path, 0.0).text

    def adapt(model, lead, frozen=False):
        adapt_to_latents(model, [clips], text, 0, frozen, base_ahead=lead)
        return model

    def trained(lead):
        statistics = {"16": [0.5] * 4}
        return moved(transformer(lead, pooled_dim=16, latents_mean=statistics, latents_std=statistics))

    before = trained(0.0)
    state = {name: value.clone() for name, value in before.state_dict().items()}
    grown = adapt(before, 0.25)
    assert grown.config["base_ahead"] == 0.25
    assert all(torch.equal(value, grown.state_dict()[name]) for name, value in state.items())
    assert not grown.residual_time_embed.linear_2.weight.any()
    assert adapt(trained(0.25), 0.25, frozen=True).config["base_ahead"] == 0.25
    for lead in (0.0, 0.3):
        with pytest.raises(UserError, match=f"base_ahead {lead:g}: the transformer of init was trained with 0.25; give that"):
            adapt(trained(0.25), lead)
    with pytest.raises(UserError, match=r"base_ahead 0\.3: .* trained with 0; give that, or train all weights for a lead"):
        adapt(trained(0.0), 0.3, frozen=True)
    with pytest.raises(ValueError, match=r"base_ahead 0: this model was trained with 0\.25; keep a lead above 0"):
        trained(0.25).set_base_ahead(0)
