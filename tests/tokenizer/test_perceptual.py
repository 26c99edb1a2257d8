import pytest
import torch
from safetensors.torch import save_file

from promag.tokenizer.perceptual import LPIPS, VideoFeatures, frechet_distance
from promag.training.config import UserError


def clips(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 2, 32, 32, generator=generator) * 2 - 1


def published_layout():
    """Random weights with the names of torchvision's vgg16 and of lpips."""
    torch.manual_seed(1)
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    vgg = {}
    for place, a, b in zip(places, widths, widths[1:], strict=False):
        vgg |= {
            f"features.{place}.weight": torch.randn(b, a, 3, 3) * (2 / (9 * a)) ** 0.5,
            f"features.{place}.bias": torch.zeros(b),
        }
    heads = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate((64, 128, 256, 512, 512))}
    return vgg, heads


def test_lpips_reads_the_published_layout_and_measures(tmp_path):
    vgg, heads = published_layout()
    torch.save(vgg, tmp_path / "vgg16.pth")
    save_file(heads, tmp_path / "lpips.safetensors")
    model = LPIPS.load(tmp_path)
    assert torch.equal(model.convs[12].weight, vgg["features.28.weight"])
    x = clips()
    assert model(x, x).tolist() == [0, 0]
    near, far = (model(x + s * clips(1), x) for s in (0.05, 0.5))
    assert near.shape == (2,)
    assert bool((near > 0).all() and (near < far).all())
    # only the first tap, by hand
    with torch.no_grad():
        for weight in model.weights[1:]:
            weight.zero_()
    y = x + 0.1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    features = [(f[:, :, 0] - shift) / scale for f in (x, y)]
    for i in (0, 1):
        features = [torch.relu(model.convs[i](f)) for f in features]
    one, two = (f / f.norm(dim=1, keepdim=True) for f in features)
    by_hand = ((one - two) ** 2 * heads["lin0.model.1.weight"]).sum(1).mean((1, 2))
    assert model(x[:, :, :1], y[:, :, :1]).tolist() == pytest.approx(by_hand.tolist(), rel=1e-4)


def test_gradients_reach_the_picture_and_not_the_weights():
    x = clips().requires_grad_()
    model = LPIPS()
    model(x, clips(1)).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_finite_where_all_features_are_zero():
    x = clips().requires_grad_()
    model = LPIPS()
    for convolution in model.convs:
        torch.nn.init.constant_(convolution.bias, -1e3)
    model(x, clips(1)).sum().backward()
    assert x.grad.isfinite().all()


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no \.pth or \.safetensors file there"):
        LPIPS.load(tmp_path)
    vgg, _ = published_layout()
    save_file(vgg, tmp_path / "vgg16.safetensors")
    with pytest.raises(UserError, match=r"no lin0\.model\.1\.weight there"):
        LPIPS.load(tmp_path)
    (tmp_path / "i3d.pt").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"i3d\.pt: not a TorchScript model"):
        VideoFeatures(tmp_path / "i3d.pt")


@pytest.mark.parametrize("name", ["lpips.pth", "lpips.pt", "lpips.safetensors"])
def test_damaged_weights_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises(UserError, match=rf"LPIPS weights .*{name}: cannot be read"):
        LPIPS.load(tmp_path)


def test_frechet_distance_of_known_gaussians():
    torch.manual_seed(0)
    x = torch.randn(4000, 3)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(x, x + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25, rel=1e-3)
    assert frechet_distance(x, 2 * x) == pytest.approx(3, rel=0.05)  # three axes: (2 - 1)^2 each
    with pytest.raises(ValueError, match="two sets of at least 2 of one width"):
        frechet_distance(x[:1], x)


def test_video_features_prepare_clips_for_the_network(tmp_path):
    class Probe(torch.nn.Module):
        def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
            return torch.stack([x.mean((1, 2, 3, 4)), torch.full((x.shape[0],), float(x.shape[4]))], 1)

    torch.jit.script(Probe()).save(tmp_path / "probe.pt")
    features = VideoFeatures(tmp_path / "probe.pt")(torch.full((2, 3, 10, 16, 16), 0.25))
    assert features.flatten().tolist() == pytest.approx([0.25, 224.0] * 2)
    with pytest.raises(ValueError, match=r"^FVD of clips of 9 frames: at least 10 are needed$"):
        VideoFeatures(tmp_path / "probe.pt")(torch.zeros(2, 3, 9, 16, 16))
