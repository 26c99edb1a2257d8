import pytest
import torch

from promag.tokenizer.peers import build_peer

WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}


def test_a_peer_answers_as_our_tokenizer_does():
    torch.manual_seed(0)
    peer = build_peer("AutoencoderKLWan", WAN)
    assert peer.temporal_ratios == (4,)
    assert len(peer.train_only(4)) == len(list(peer.model.parameters()))
    x = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    posterior = peer.encode(x, 4).latent_dist
    assert posterior.mode().shape == (1, 4, 2, 2, 2)
    assert torch.equal(peer(x, 4).sample, peer.model.decode(peer.model.encode(x).latent_dist.mode()).sample)
    with pytest.raises(ValueError, match="temporal ratio 8: this tokenizer has 4x"):
        peer.encode(x, 8)
    with pytest.raises(ValueError, match="6 frames: 4x needs"):
        peer.encode(torch.zeros(1, 3, 6, 16, 16))


def test_every_weight_of_a_peer_learns():
    torch.manual_seed(0)
    peer = build_peer("AutoencoderKLWan", WAN)
    peer(torch.rand(1, 3, 9, 16, 16) * 0.1).sample.square().mean().backward()
    without = [name for name, p in peer.named_parameters() if p.grad is None]
    assert without == []


def test_hidden_kernels_of_a_peer_are_all_but_those_at_pixels_and_latents():
    peer = build_peer("AutoencoderKLWan", WAN)
    hidden = {id(p) for p in peer.hidden_kernels()}
    ends = [f"{side}.conv_{end}" for side in ("encoder", "decoder") for end in ("in", "out")]
    ends += ["quant_conv", "post_quant_conv"]
    at_ends = {name for name, p in peer.model.named_parameters() if name.endswith("weight") and id(p) not in hidden}
    assert at_ends == {f"{end}.weight" for end in ends}


@pytest.mark.parametrize("name", ["AutoencoderKLNothing", "UNet2DModel"])
def test_an_unknown_peer_is_named(name):
    with pytest.raises(ValueError, match=f"peer '{name}': diffusers .* has no autoencoder of that name"):
        build_peer(name, {})
