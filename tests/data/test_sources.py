"""Several sources of clips: their shares, batches from one source, and refused settings."""

import pytest
import torch

from promag.data.buckets import Bucket
from promag.data.clip_index import save_clips
from promag.data.datasets import SyntheticDataset
from promag.data.shards.stream import Sharding
from promag.data.shards.writer import write_shards
from promag.data.sources import Source, open_sources, open_training
from promag.data.stream import TrainingStream
from promag.training.config import UserError

BUCKETS = [Bucket(3, 32, 32), Bucket(5, 32, 32, 1)]
REST = {"count": 8, "batch_size": 2, "batches_per_step": 1, "temporal_strides": (1,), "sharding": Sharding(1, 1)}


@pytest.fixture(scope="module")
def index(clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "clips.jsonl"
    save_clips(path, clips)
    return path


def test_one_source_gives_the_same_clips_as_alone():
    opened, plan = open_sources("synthetic", [], BUCKETS, **REST)
    alone, plan_alone = open_training("synthetic", BUCKETS, 8, 2, 1, (1,), Sharding(1, 1))
    assert plan == plan_alone
    for step in range(5):
        one, other = (TrainingStream(clips, 3, 2, 0, 1).batch(step) for clips in (opened, alone))
        assert torch.equal(one["video"], other["video"])


def test_shares_are_those_of_the_steps(index):
    opened, plan = open_sources(
        str(index), [Source("synthetic", 0.3, (1,))], [BUCKETS[0]], **{**REST, "temporal_strides": (1, 2)}
    )
    names = [line.partition(",")[0] for line in plan.splitlines() if "of the steps" in line]
    assert names == [str(index), "synthetic"]
    assert "70.0% of the steps" in plan
    assert "30.0% of the steps" in plan
    drawn = [isinstance(opened.datasets[opened.choose(0, step)], SyntheticDataset) for step in range(2000)]
    assert abs(sum(drawn) - 600) <= 2
    assert drawn[:50] == [isinstance(opened.datasets[opened.choose(0, step)], SyntheticDataset) for step in range(50)]


def test_buckets_keep_their_proportions_and_batch_sizes():
    opened, _ = open_sources("synthetic", [Source("synthetic", 0.25, (1,))], BUCKETS, **REST)
    assert opened.shares == pytest.approx([0.75 / 3, 0.75 * 2 / 3, 0.25 / 3, 0.25 * 2 / 3])
    assert opened.batch_sizes == [None, 1, None, 1]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(ValueError, match=f"share {share} of synthetic: must be above 0 and below 1"):
        Source("synthetic", share, (1,))


def test_invalid_sources_are_refused(index):
    half = Source("synthetic", 0.5, (1,))
    with pytest.raises(UserError, match=r"shares 0.5, 0.5 of other sources: together they must stay below 1"):
        open_sources("synthetic", [half, half], BUCKETS, **REST)
    with pytest.raises(UserError, match=r"temporal_strides \[2\]"):
        open_sources("synthetic", [Source("synthetic", 0.5, (2,))], BUCKETS, **REST)


def test_shards_cannot_be_mixed_with_other_sources(index, tmp_path):
    write_shards(index, tmp_path, 2, progress=False)
    with pytest.raises(UserError, match="name all shards in one pattern"):
        open_sources(str(tmp_path / "*.tar"), [Source("synthetic", 0.5, (1,))], [BUCKETS[0]], **REST)
