"""The validation loss does not depend on the division of clips into batches."""

import pytest
import torch

from promag.diffusion.flow import velocity
from promag.diffusion.latent_cache import LatentDataset
from promag.diffusion.objective import VALIDATION_TIMES, FlowObjective
from promag.diffusion.text import learn_vocabulary, small_clip
from promag.diffusion.text_cache import CaptionEncoder
from promag.diffusion.train import new_transformer
from promag.diffusion.validation import ValidationSet
from promag.training.loop import seeded
from tests.diffusion.test_buckets import VIDEO, configuration, write


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    clips = LatentDataset(write(folder, VIDEO, 16, 6))
    torch.manual_seed(0)
    vocabulary = learn_vocabulary(clips.captions(), 300, max_length=12)
    text = CaptionEncoder([None], vocabulary, small_clip(vocabulary, 16, 1, 2))
    config = configuration(folder, budgets=[{"ratio": 16, "share": 1.0}])
    transformer = new_transformer(config, [clips], text)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return clips, transformer, FlowObjective(transformer, text, config)


def expected(clips, objective, first_given):
    """All clips in one batch."""
    rows = [clips.fixed(i) for i in range(len(clips))]
    x = torch.stack([row["latents"] for row in rows])
    noise = torch.stack([torch.randn(x.shape[1:], generator=seeded(0, i)) for i in range(len(x))])
    text = objective.text({"caption": [row["caption"] for row in rows]})
    total = 0.0
    for time in VALIDATION_TIMES:
        times = torch.full((len(x), x.shape[2]), time)
        times[:, 0] *= not first_given
        t = times[:, None, :, None, None]
        predicted = objective.transformer(
            (1 - t) * x + t * noise,
            times * 1000,
            text.tokens,
            text.masks,
            text.pooled,
            temporal_ratio=16,
            fps=torch.full((len(x),), 8.0),
        ).sample
        squared = (predicted - velocity(x, noise)).square()
        total += squared[:, :, int(first_given) :].mean().item() / len(VALIDATION_TIMES)
    return total


@pytest.mark.parametrize("first_given", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_loss_is_the_mean_over_all_clips_in_batches_of_the_set_size(parts, batch_size, first_given):
    clips, transformer, objective = parts
    sizes = []
    hook = transformer.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    try:
        with torch.no_grad():
            loss = ValidationSet(clips, str(VIDEO), clips, batch_size).loss(objective, first_given)
    finally:
        hook.remove()
    with torch.no_grad():
        assert loss == pytest.approx(expected(clips, objective, first_given), rel=1e-5)
    assert max(sizes) == min(batch_size, 6)
    assert sum(sizes) == 6 * len(VALIDATION_TIMES)
