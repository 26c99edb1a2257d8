import math
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from promag import AutoencoderKLProMAG
from promag.diffusion.config import DiffusionConfig
from promag.diffusion.families import hidden_matrices
from promag.diffusion.transformer import ProMAGTransformer3DModel
from promag.evaluation.cost import TransformerAlone
from promag.tokenizer.config import TokenizerConfig
from promag.training import optimizers
from promag.training.command_line import parse_config
from promag.training.config import build, load_yaml
from promag.training.optimizers import (
    NEWTON_SCHULZ_STEPS,
    Muon,
    OptimizationConfig,
    from_saved,
    make_optimizers,
    muon_flops,
    to_saved,
)
from promag.training.precision import DTYPES
from promag.training.update import Update
from tests.conftest import optimization_config
from tests.tiny_pipeline import make_pipeline

OPTIONS = {"lr": 0.1, "weight_decay": 0.1, "ns_steps": 5}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("clip_norm", (0.0, -1.0, math.nan), r"must be above 0; \.inf clips nothing"),
        ("learning_rate", (0.0, math.nan, math.inf), "must be above 0, and finite"),
        ("muon_learning_rate", (-0.02, math.nan, math.inf), "must be above 0, and finite"),
        ("weight_decay", (-0.01, math.nan, math.inf), "must be 0 or above, and finite"),
        ("warmup", (-1,), "must be 0 or above, and finite"),
        ("ema_decay", (1.0, math.nan), r"must be in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(name, values, message):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} {value}: {message}"):
            optimization_config(**{name: value})
    assert optimization_config(warmup=0, weight_decay=0.0).learning_rate_at(0) == 1e-3


def test_an_infinite_clip_norm_clips_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("clip_norm: .inf")
    (tmp_path / "b.yaml").write_text("clip_norm: 2.0")
    for words in (["a.yaml"], ["b.yaml", "--clip-norm", ".inf"]):
        settings = parse_config(OptimizationConfig, ["--config", str(tmp_path / words[0]), *words[1:]], "")
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3e6, 4e6])
        (norm,) = Update([], None, [weight], [[weight]], settings.clip_norm).clip()
        assert norm == 5e6
        assert weight.grad.tolist() == [3e6, 4e6]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_kernel_is_trained_as_a_matrix_with_a_row_for_each_output(layout):
    torch.manual_seed(0)
    start, gradients = torch.randn(16, 3, 2, 3, 3), torch.randn(2, 16, 3, 2, 3, 3)
    kernel = nn.Parameter(start.clone().to(memory_format=layout))
    matrix = nn.Parameter(start.flatten(1).clone())
    ours, reference = Muon([kernel], **OPTIONS), torch.optim.Muon([matrix], **OPTIONS)
    for gradient in gradients:
        kernel.grad, matrix.grad = gradient.clone(), gradient.flatten(1)
        ours.step()
        reference.step()
    # Newton-Schulz runs in bfloat16, where another order of columns changes the rounding.
    assert torch.allclose(kernel.flatten(1), matrix, atol=2e-3)
    assert (kernel - start).abs().max() > 0.02
    ours.zero_grad()
    assert kernel.grad is None


def test_a_matrix_is_trained_as_by_torchs_muon():
    torch.manual_seed(0)
    a, b = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    a.grad = torch.randn(5, 3)
    b.grad = a.grad.clone()
    Muon([a], **OPTIONS).step()
    torch.optim.Muon([b], **OPTIONS).step()
    assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(6, 6), (7, 10), (5, 12), (12, 5), (4, 108)])
def test_muons_flops_equal_those_counted_by_torch(shape, precision):
    weight = nn.Parameter(torch.ones(shape))
    weight.grad = torch.randn(shape)
    optimizer = Muon([weight], DTYPES[precision], **{**OPTIONS, "ns_steps": NEWTON_SCHULZ_STEPS})
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert muon_flops(shape, precision) == counter.get_total_flops()


def test_the_steps_of_long_matrices_share_gram_matrices():
    """That takes a third of plain steps' arithmetic for a kernel 512 x 256 x 3 x 3 x 3 in float32, 0.57 in bfloat16."""
    rows, columns = 512, 27 * 256
    plain = NEWTON_SCHULZ_STEPS * (4 * rows**2 * columns + 2 * rows**3)
    assert muon_flops((rows, columns), "fp32") == pytest.approx(0.36 * plain, rel=0.02)
    assert muon_flops((rows, columns), "bf16") == pytest.approx(0.58 * plain, rel=0.02)
    assert muon_flops((rows, rows), "fp32") == muon_flops((rows, rows), "bf16") == NEWTON_SCHULZ_STEPS * 6 * rows**3


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_shares_of_plain_steps_arithmetic_that_the_docs_quote(size):
    with torch.device("meta"):
        tokenizer = AutoencoderKLProMAG(**asdict(build(TokenizerConfig, load_yaml(f"tokenizer/{size}"), size).model))
        model = build(DiffusionConfig, load_yaml(f"diffusion/{size}"), size).model
        transformer = ProMAGTransformer3DModel(**asdict(model), text_dim=128, pooled_dim=128, in_channels=16)
    kernels = [(p.shape[0], p[0].numel()) for p in tokenizer.hidden_kernels()]
    for shapes, fp32, bf16 in ((kernels, 0.38, 0.59), ([p.shape for p in hidden_matrices(transformer)], 0.82, 0.88)):
        plain = sum(NEWTON_SCHULZ_STEPS * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in shapes)
        for precision, share in (("fp32", fp32), ("bf16", bf16)):
            assert sum(muon_flops(s, precision) for s in shapes) / plain == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("smallest", [1, 1e-2, 1e-6])
def test_products_of_newton_schulz_steps_keep_small_singular_values(dtype, tolerance, smallest):
    """Gradients have singular values of many magnitudes, and a Gram matrix squares them: rounding must not blow up."""
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(48, 480, generator=generator).double(), full_matrices=False)
    values = torch.logspace(0, math.log10(smallest), 48, dtype=torch.float64)
    group = {**Muon([nn.Parameter(torch.ones(2, 2))]).param_groups[0], "ns_steps": NEWTON_SCHULZ_STEPS}
    moved = optimizers._orthogonal(((u * values) @ v)[None].to(dtype), group)[0].double()
    a, b, c = group["ns_coefficients"]
    ends = values / values.norm()
    for _ in range(NEWTON_SCHULZ_STEPS):
        ends = a * ends + b * ends**3 + c * ends**5
    assert (moved - (u * ends) @ v).norm() < tolerance * ends.norm()


def test_a_weight_without_a_matrix_view_is_refused():
    with pytest.raises(ValueError, match=r"weight of shape \(4, 3, 2, 2\), strides .*: no matrix view"):
        Muon([nn.Parameter(torch.randn(4, 2, 3, 2).transpose(1, 2))], **OPTIONS)


def test_a_weight_that_was_moved_is_not_silently_left_untrained():
    weight = nn.Parameter(torch.ones(5, 3))
    optimizer = Muon([weight], **OPTIONS)
    weight.data = weight.data.clone()
    weight.grad = torch.randn(5, 3)
    with pytest.raises(RuntimeError, match=r"weight of shape \(5, 3\) lies elsewhere now"):
        optimizer.step()


def test_momentum_is_saved_in_the_weights_shape_for_every_layout():
    torch.manual_seed(0)
    start, gradient = torch.randn(4, 3, 2, 3, 3), torch.randn(4, 3, 2, 3, 3)
    layouts = (torch.contiguous_format, torch.channels_last_3d)
    kernels = [nn.Parameter(start.clone().to(memory_format=layout)) for layout in layouts]
    optimizers = [Muon([kernel], **OPTIONS) for kernel in kernels]
    for kernel, optimizer in zip(kernels, optimizers, strict=True):
        kernel.grad = gradient.clone()
        optimizer.step()
    moments = [next(iter(optimizer.state.values()))["momentum_buffer"] for optimizer in optimizers]
    saved = [to_saved(*three) for three in zip(optimizers, moments, kernels, strict=True)]
    assert torch.equal(saved[0], saved[1])
    assert saved[0].shape == start.shape
    for value in saved:
        assert all(torch.equal(from_saved(o, value, k), m) for o, k, m in zip(optimizers, kernels, moments, strict=True))


def test_batched_matrices_of_a_shape_move_as_single_ones(monkeypatch):
    monkeypatch.setattr(optimizers, "BATCHED", 2 * 6 * 4)  # two of the three matrices of 6 x 4 at once
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5), (6, 4)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    both = [[nn.Parameter(weight.clone()) for weight in weights] for _ in range(2)]
    ours, reference = Muon(both[0], **OPTIONS), torch.optim.Muon(both[1], **OPTIONS)
    for _ in range(3):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for own, other, gradient in zip(*both, gradients, strict=True):
            own.grad, other.grad = gradient.clone(), gradient.clone()
        ours.step()
        reference.step()
    for own, other in zip(*both, strict=True):
        torch.testing.assert_close(own, other, atol=2e-3, rtol=0)  # bfloat16 products of another kernel
    states = [optimizer.state_dict()["state"] for optimizer in (ours, reference)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        torch.testing.assert_close(state["momentum_buffer"], states[1][number]["momentum_buffer"])


@pytest.mark.parametrize(
    ("shape", "bf16_error"), [((6, 6), 3e-2), ((5, 12), 3e-2), ((12, 5), 3e-2), ((4, 54), 6e-2), ((54, 4), 6e-2)]
)
def test_orthogonalisation_in_float32_has_the_precision_of_float32(shape, bf16_error):
    """Newton-Schulz in float32 is within 1e-5 of float64, in bfloat16 within some hundredths."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = gradient.double() / gradient.double().norm()
    x = x.T if shape[0] > shape[1] else x
    a, b, c = optimizers.Muon([nn.Parameter(torch.ones(2, 2))], lr=1.0).param_groups[0]["ns_coefficients"]
    for _ in range(OPTIONS["ns_steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    expected = (x.T if shape[0] > shape[1] else x) * max(1, shape[0] / shape[1]) ** 0.5
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = gradient.clone()
        optimizer = Muon([weight], dtype, lr=1.0, weight_decay=0.0, ns_steps=5, momentum=0.0, nesterov=False)
        optimizer.step()
        moved[dtype] = -weight.detach().double()
        alone = optimizers._orthogonal_step(gradient, optimizer.param_groups[0], dtype)
        torch.testing.assert_close(alone, weight.detach(), atol=2e-3 if dtype == torch.bfloat16 else 1e-6, rtol=0)
    assert (moved[torch.float32] - expected).abs().max() < 1e-5
    assert 1e-4 < (moved[torch.bfloat16] - expected).abs().max() < bf16_error


def test_trainings_in_float32_orthogonalise_in_float32():
    objective = TransformerAlone(make_pipeline().transformer)
    settings = optimization_config(muon_learning_rate=0.02)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        muon = make_optimizers(objective, settings, precision)[-1]
        assert muon.dtype == dtype


def test_momentum_is_allocated_once(monkeypatch):
    weights = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    muon, made, zeros_like = Muon(weights), [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *arguments, **options: made.append(1) or zeros_like(*arguments, **options))
    for steps in (2, 2, 2):
        for weight in weights:
            weight.grad = torch.ones(4, 3)
        muon.step()
        assert len(made) == steps
