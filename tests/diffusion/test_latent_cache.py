import dataclasses
import json
import multiprocessing
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from promag.data.stream import TrainingStream
from promag.diffusion.cache_store import Shards, _identity, shard_path
from promag.diffusion.latent_cache import LatentDataset, LatentFingerprint, write_latents
from promag.training.config import UserError
from tests.processes import context

PRINT = LatentFingerprint("tokenizer", "clips", 16, 17, 8, 8, "float32", 3)
CAPTIONS = ["a", "", "čtyři — four", "clip\n3", "x" * 300, "5", "6", "7", "8", "9"]


def read(index):
    generator = torch.Generator().manual_seed(index)
    return {"video": torch.randn(3, 17, 8, 8, generator=generator), "caption": CAPTIONS[index], "fps": 8.0 + index}


class Clips:
    fixed = staticmethod(read)


class DiesAt:
    """Clips one of which ends its process without any clean-up, like a kill from outside."""

    def __init__(self, index):
        self.index = index

    def fixed(self, index):
        if index == self.index:
            os.kill(os.getpid(), 9)
        return read(index)


def encode(x, ratios=(16,)):
    return [latent(x, 2 + (r != 16)) for r in ratios]


def latent(x, frames=2):
    return torch.cat([x, x[:, :1] * 3 + 1], 1)[:, :, :frames, ::8, ::8]


def make(folder, count=7, fingerprint=PRINT, encode=encode, **options):
    return write_latents({folder: fingerprint}, count, Clips(), encode, batch_size=2, **options)[0]


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_put_batches_together_so_that_the_encoder_waits_for_no_copies(tmp_path, workers):
    seen = []

    def watching(x, ratios):
        seen.append((len(x), x.is_shared()))
        return encode(x, ratios)

    make(tmp_path / "watched", encode=watching, workers=workers)
    assert seen == [(2, workers > 0), (1, workers > 0)] * 2 + [(1, workers > 0)]
    assert files(tmp_path / "watched") == files(make(tmp_path / "alone"))


def test_every_clip_is_cached_once_in_order(tmp_path):
    data = LatentDataset(make(tmp_path))
    assert len(data) == 7
    for i in range(7):
        item = data.fixed(i)
        assert item["caption"] == CAPTIONS[i]
        assert item["fps"] == 8.0 + i
        raw = item["latents"] * data.std + data.mean
        assert torch.allclose(raw, latent(read(i)["video"][None])[0], atol=1e-5)
    assert list(data.captions()) == CAPTIONS[:7]
    assert data.fps == 8.0 + 3  # the median
    with pytest.raises(IndexError, match="clip 7: legal are 0 to 6"):
        data.fixed(7)


def test_workers_change_nothing(tmp_path):
    assert files(make(tmp_path / "a", workers=2)) == files(make(tmp_path / "b"))


def test_a_cache_of_many_shards_is_read_through_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("promag.diffusion.cache_store.OPEN_FILES", 2)
    data = LatentDataset(make(tmp_path, 10))
    rows = [data.fixed(i)["latents"] for i in range(10)]
    assert all(torch.equal(data.fixed(i)["latents"], rows[i]) for i in reversed(range(10)))
    assert len(data.shards._open) == 2


@given(st.integers(2, 9))
@settings(max_examples=5)
def test_latents_are_normalised_per_channel(tmp_path_factory, count):
    data = LatentDataset(make(tmp_path_factory.mktemp("cache"), count))
    x = torch.stack([data.fixed(i)["latents"] for i in range(count)])
    assert x.mean((0, 2, 3, 4)).abs().max() < 1e-5
    assert torch.allclose(x.std((0, 2, 3, 4), correction=0), torch.ones(4), atol=1e-4)


def test_one_scale_for_all_channels_keeps_their_proportions(tmp_path):
    data = LatentDataset(make(tmp_path), scale="global")
    x = torch.stack([data.fixed(i)["latents"] for i in range(7)])
    assert x.mean((0, 2, 3, 4)).abs().max() < 1e-5
    deviations = x.std((0, 2, 3, 4), correction=0)
    assert deviations.square().mean().item() == pytest.approx(1, abs=1e-4)
    assert (deviations[3] / deviations[0]).item() == pytest.approx(3, rel=1e-3)  # the fourth channel is three times the first
    raw = x[0] * data.std + data.mean
    assert torch.allclose(raw, latent(read(0)["video"][None])[0], atol=1e-5)


@pytest.mark.parametrize("dies_at", [0, 4, 6])
def test_a_killed_cache_continues_bit_for_bit(tmp_path, dies_at):
    arguments = ({tmp_path / "a": PRINT}, 7, DiesAt(dies_at), encode, 2)
    process = multiprocessing.get_context("fork").Process(target=write_latents, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -9
    assert len(list((tmp_path / "a").glob("shard-*"))) == dies_at // 3
    (tmp_path / "a" / ".shard-00002.safetensors.1").write_bytes(b"half a shard")  # killed while writing
    assert files(make(tmp_path / "a")) == files(make(tmp_path / "b"))


def test_what_another_live_process_is_writing_stays(tmp_path, capsys):
    """Two trainings that fill one cache must not take each other's shards away before these are renamed."""
    live, killed = (f".shard-00001.safetensors.{number}.part" for number in (os.getppid(), 2**22 + 1))
    for name in (live, killed):
        (tmp_path / name).write_bytes(b"half a shard")
    data = LatentDataset(make(tmp_path))
    assert [path.name for path in tmp_path.glob(".shard*")] == [live]
    assert f"{tmp_path}: process {os.getppid()} fills it too; each encodes" in capsys.readouterr().out
    assert len(data) == 7


def test_statistics_are_those_of_all_values(tmp_path):
    data = LatentDataset(make(tmp_path))
    x = torch.stack([latent(read(i)["video"][None])[0] for i in range(7)]).double()
    assert torch.allclose(torch.tensor(data.index["mean"], dtype=torch.float64), x.mean((0, 2, 3, 4)), rtol=1e-12)
    assert torch.allclose(torch.tensor(data.index["std"], dtype=torch.float64), x.std((0, 2, 3, 4), correction=0), rtol=1e-9)


def test_an_interrupted_cache_continues_without_losing_or_doubling(tmp_path):
    calls = []

    def dies(x, ratios):
        calls.append(len(x))
        if sum(calls) > 4:
            raise KeyboardInterrupt
        return encode(x, ratios)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", encode=dies)
    assert [p.name for p in (tmp_path / "a").glob("shard*")] == ["shard-00000.safetensors"]
    with pytest.raises(UserError, match=r"no index\.json"):
        LatentDataset(tmp_path / "a")
    encoded = []
    make(tmp_path / "a", encode=lambda x, ratios: encoded.append(len(x)) or encode(x, ratios))
    assert sum(encoded) == 4  # the first three were kept
    make(tmp_path / "b")
    a, b = LatentDataset(tmp_path / "a"), LatentDataset(tmp_path / "b")
    assert a.index == b.index
    assert all(torch.equal(a.fixed(i)["latents"], b.fixed(i)["latents"]) for i in range(7))


def test_several_ratios_are_cached_in_one_pass_and_equal_separate_caches(tmp_path):
    """Missing clips are encoded only at the missing ratios, and each cache equals one made alone."""
    low = dataclasses.replace(PRINT, ratio=8)
    alone = {16: make(tmp_path / "16-alone"), 8: make(tmp_path / "8-alone", fingerprint=low)}
    calls = []

    def counting(x, ratios):
        calls.append((len(x), tuple(ratios)))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(x, ratios)

    both = {tmp_path / "16": PRINT, tmp_path / "8": low}
    with pytest.raises(KeyboardInterrupt):
        write_latents(both, 7, Clips(), counting, batch_size=2)
    (tmp_path / "8" / "shard-00000.safetensors").unlink()
    assert write_latents(both, 7, Clips(), counting, batch_size=2) == [tmp_path / "16", tmp_path / "8"]
    # Two batches and the one that was cut off; then shard 0 of 8x alone, the other two of both.
    assert calls[3:] == [(2, (8,)), (1, (8,)), (2, (16, 8)), (1, (16, 8)), (1, (16, 8))]
    for ratio, place in alone.items():
        a, b = LatentDataset(place), LatentDataset(tmp_path / str(ratio))
        assert a.index == b.index
        assert all(torch.equal(a.fixed(i)["latents"], b.fixed(i)["latents"]) for i in range(7))


def test_a_whole_cache_is_not_written_again(tmp_path):
    make(tmp_path)
    make(tmp_path, encode=None)  # would fail if called


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "x"}, "was made from another tokenizer; delete it"),
        ({"clips": "x"}, "was made from other clips"),
        ({"ratio": 8}, "was made from ratio 16 instead of 8"),
        ({"dtype": "bfloat16", "frames": 33}, "was made from frames 17 instead of 33, dtype float32 instead of bfloat16"),
        ({"shard_size": 5}, "was made from shard_size 3 instead of 5"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(tmp_path, change, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        make(tmp_path, fingerprint=dataclasses.replace(PRINT, **change))


def corrected(folder, captions, **options):
    """Write the cache again for the same videos with these captions."""

    class Corrected(Clips):
        caption = staticmethod(lambda index: captions[index])

        def fixed(self, index):
            return read(index) | {"caption": captions[index]}

    fingerprint = dataclasses.replace(PRINT, clips=repr(captions), videos="videos")
    return write_latents({folder: fingerprint}, 7, Corrected(), options.pop("encode", encode), batch_size=2)[0]


NEW = [*CAPTIONS[:4], "a corrected caption", *CAPTIONS[5:7]]


def test_a_corrected_caption_keeps_all_latents(tmp_path, capsys):
    """No video is read or encoded; the cache is the one that these captions would have made."""
    folder = corrected(tmp_path / "a", CAPTIONS[:7])
    before = files(folder)
    corrected(folder, NEW, encode=None)  # would fail if called
    assert "a: captions have changed since; its latents are kept" in capsys.readouterr().out
    assert list(LatentDataset(folder).captions()) == NEW
    after = files(folder)
    assert {name for name in before if before[name] != after[name]} == {
        "shard-00001.safetensors",
        "fingerprint.json",
        "index.json",
    }
    assert after == files(corrected(tmp_path / "b", NEW))


def test_an_interrupted_correction_may_be_taken_back(tmp_path, monkeypatch):
    folder = corrected(tmp_path, CAPTIONS[:7])
    before = files(folder)

    def interrupted(*arguments, **facts):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("promag.diffusion.latent_cache.finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            corrected(folder, NEW)
    with pytest.raises(UserError, match=r"no index\.json"):
        LatentDataset(folder)
    corrected(folder, CAPTIONS[:7], encode=None)
    assert files(folder) == before


def test_a_correction_of_an_unfinished_cache_encodes_only_what_is_missing(tmp_path):
    folder = corrected(tmp_path / "a", CAPTIONS[:7])
    for name in ("index.json", "shard-00002.safetensors"):
        (folder / name).unlink()
    encoded = []
    corrected(folder, NEW, encode=lambda x, ratios: encoded.append(len(x)) or encode(x, ratios))
    assert encoded == [1]
    assert files(folder) == files(corrected(tmp_path / "b", NEW))


def test_caches_of_earlier_versions_serve_with_their_captions_alone(tmp_path):
    """They know no hash of their videos alone."""
    folder = corrected(tmp_path, CAPTIONS[:7])
    for name in ("index.json", "fingerprint.json"):
        values = json.loads((folder / name).read_text())
        (values.get("fingerprint") or values).pop("videos")
        (folder / name).write_text(json.dumps(values))
    for number in range(3):
        path = shard_path(folder, number)
        identity = _identity(json.loads((folder / "fingerprint.json").read_text()), number)
        save_file(load_file(path) | {"identity": identity}, path)
    before = files(folder)
    corrected(folder, CAPTIONS[:7], encode=None)
    assert list(LatentDataset(folder).captions()) == CAPTIONS[:7]
    assert files(folder) == before
    with pytest.raises(UserError, match="was made from other clips"):
        corrected(folder, NEW)


def test_other_videos_are_refused_with_or_without_other_captions(tmp_path):
    corrected(tmp_path, CAPTIONS[:7])
    for captions in (CAPTIONS[:7], NEW):
        other = dataclasses.replace(PRINT, clips=f"other {captions}", videos="other")
        with pytest.raises(UserError, match="was made from other clips"):
            make(tmp_path, fingerprint=other)


def test_another_ratio_is_refused_when_read(tmp_path):
    with pytest.raises(UserError, match="holds 16x latents, 8x is asked for"):
        LatentDataset(make(tmp_path), ratio=8)
    assert json.loads((tmp_path / "fingerprint.json").read_text())["ratio"] == 16


def test_all_captions_are_read_a_shard_at_a_time(tmp_path):
    shards = Shards(make(tmp_path, 10))
    read = []

    class Counting:
        def __init__(self, number):
            self.number, self.file = number, safe_open(shard_path(tmp_path, number), "pt")

        def get_tensor(self, name):
            read.append((self.number, name))
            return self.file.get_tensor(name)

    shards._open = {number: Counting(number) for number in range(4)}
    assert list(shards.captions()) == CAPTIONS
    assert sorted(read) == [(number, name) for number in range(4) for name in ("caption_ends", "captions")]
    assert [Shards(tmp_path).caption(clip) for clip in range(10)] == CAPTIONS


def test_an_opened_cache_can_be_sent_to_a_spawned_process(tmp_path):
    """The small text model needs this: its vocabulary is learned from the captions before the loader starts."""
    data = LatentDataset(make(tmp_path))
    assert list(data.captions()) == CAPTIONS[:7]
    stream = TrainingStream(data, 0, 2, 0, 1)
    expected = [stream.batch(number) for number in range(2)]
    loader = iter(DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context=context))
    for batch in expected:
        other = next(loader)
        assert torch.equal(batch["latents"], other["latents"])
        assert batch["caption"] == other["caption"]
    loader._shutdown_workers()


@pytest.mark.parametrize("damage", ["swapped", "from another cache", "cut", "gone"])
def test_swapped_and_damaged_shards_are_refused_by_name(tmp_path, damage):
    folder = make(tmp_path / "cache")
    first, second = (folder / f"shard-{number:05d}.safetensors" for number in (0, 1))
    if damage == "swapped":
        first.rename(tmp_path / "aside")
        second.rename(first)
        (tmp_path / "aside").rename(second)
    elif damage == "from another cache":
        other = make(tmp_path / "other", fingerprint=dataclasses.replace(PRINT, tokenizer="another"))
        shutil.copy(other / second.name, second)
    elif damage == "cut":
        second.write_bytes(second.read_bytes()[:20])
    else:
        second.unlink()
    data = LatentDataset(folder)
    with pytest.raises(
        UserError, match=r"shard-00001\.safetensors: (is another shard|cannot be read).*again by the command that wrote it"
    ):
        data.fixed(data.shards.size)


STATISTICS = [("mean", float("nan")), ("mean", -3.4e38), ("std", float("inf")), ("std", 0.0), ("std", 1e-45), ("std", 1e38)]


@pytest.mark.parametrize(("key", "value"), STATISTICS)
def test_statistics_that_are_not_finite_or_overflow_are_refused(tmp_path, key, value):
    folder = make(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    index[key][0] = value
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json needs a mean up to 1e\+09 and a deviation from 1e-07 to 1e\+09 for"):
        LatentDataset(folder)


def test_latents_that_are_not_finite_are_not_cached(tmp_path):
    with pytest.raises(UserError, match=r"latents of clips .* are not finite"):
        write_latents({tmp_path: PRINT}, 2, Clips(), lambda x, ratios: [encode(x, ratios)[0] * float("nan")])
