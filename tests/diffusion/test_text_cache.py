import dataclasses
import multiprocessing
import os

import pytest
import torch

from promag.data.stream import TrainingStream
from promag.diffusion import text_cache
from promag.diffusion.latent_cache import LatentDataset, LatentFingerprint, write_latents
from promag.diffusion.text import encode, learn_vocabulary, small_clip, tokenize
from promag.diffusion.text_cache import CaptionEncoder, EmbeddingCache, TextFingerprint, write_embeddings
from promag.training.config import UserError

CAPTIONS = ["a red disc", "", "a blue square moves right", "a red disc", "discs", "left", "a"]
PRINT = TextFingerprint("encoder", "clips", 9, "float32", 3)
LATENTS = LatentFingerprint("tokenizer", "clips", 16, 17, 8, 8, "float32", 3)


class Clips:
    def fixed(self, index):
        return {"video": torch.full((3, 17, 8, 8), float(index)), "caption": CAPTIONS[index], "fps": 8.0}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    place = tmp_path_factory.mktemp("latents")
    return write_latents({place: LATENTS}, len(CAPTIONS), Clips(), lambda x, ratios: [x[:, :, :2, ::8, ::8]])[0]


@pytest.fixture(scope="module")
def encoders():
    """A CLIP model with pooled vectors and a T5 model without them."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    vocabulary = learn_vocabulary(CAPTIONS, 300, max_length=9)
    sizes = {"d_model": 12, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5EncoderModel(T5Config(vocab_size=len(vocabulary), **sizes)).eval()
    return {"clip": (vocabulary, small_clip(vocabulary, 16, 1, 2).eval()), "t5": (vocabulary, t5)}


def make(folder, latents, pair, fingerprint=PRINT):
    return write_embeddings(folder, fingerprint, latents, lambda: pair)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_cached_caption_equals_the_encoders_output(tmp_path, latents, encoders, kind):
    tokenizer, encoder = encoders[kind]
    cache = EmbeddingCache(make(tmp_path, latents, encoders[kind]), 1)
    with torch.no_grad():
        expected = encode(encoder, tokenize(tokenizer, [*CAPTIONS, ""]))
    rows = [{key: value[None] for key, value in cache.row(i).items()} for i in range(len(CAPTIONS))]
    encoded = [*(cache.embedded(row) for row in rows), cache.null()]
    assert (cache.width, cache.pooled_width, cache.length) == {"clip": (16, 16, 9), "t5": (12, 0, 9)}[kind]
    for i, text in enumerate(encoded):
        real = expected.masks[0][i].bool()
        assert torch.equal(text.masks[0][0], real)
        assert torch.allclose(text.tokens[0][0, real], expected.tokens[0][i, real], atol=1e-6)
        if kind == "clip":
            assert torch.allclose(text.pooled[0], expected.pooled[i], atol=1e-6)
    assert len(list(tmp_path.glob("null*"))) == 1


def test_settings_of_the_encoder_are_compared_where_they_were_recorded(tmp_path, latents, encoders):
    make(tmp_path, latents, encoders["t5"])  # as by an earlier version
    later = dataclasses.replace(PRINT, settings="gelu")
    assert len(EmbeddingCache(write_embeddings(tmp_path, later, latents, None), 1).row(0)) > 0
    make(tmp_path / "new", latents, encoders["t5"], later)
    with pytest.raises(UserError, match="was made from a text encoder of other settings"):
        make(tmp_path / "new", latents, encoders["t5"], dataclasses.replace(PRINT, settings="relu"))


def test_of_corrected_captions_only_their_shards_are_encoded_again(tmp_path, encoders, monkeypatch):
    """The cache is the one that these captions would have made."""

    def write(folder, captions):
        class Corrected(Clips):
            caption = staticmethod(lambda index: captions[index])

            def fixed(self, index):
                return super().fixed(index) | {"caption": captions[index]}

        clips = {"clips": repr(captions), "videos": "videos"}
        given = {folder / "latents": dataclasses.replace(LATENTS, **clips)}
        latents = write_latents(given, len(captions), Corrected(), lambda x, ratios: [x[:, :, :2, ::8, ::8]])[0]
        return make(folder / "texts", latents, encoders["clip"], dataclasses.replace(PRINT, **clips))

    write(tmp_path / "a", CAPTIONS)
    new = [*CAPTIONS[:4], "another disc", *CAPTIONS[5:]]
    encoded = []
    original = text_cache._encode
    monkeypatch.setattr(text_cache, "_encode", lambda t, e, texts, d: encoded.append(texts) or original(t, e, texts, d))
    corrected = write(tmp_path / "a", new)
    assert encoded == [new[3:6], [""]]  # a shard, and the null caption
    assert files(corrected) == files(write(tmp_path / "b", new))


def test_embeddings_stay_with_the_latents_of_their_clips(tmp_path, latents, encoders):
    text = EmbeddingCache(make(tmp_path, latents, encoders["clip"]), 2)
    data = LatentDataset(latents, texts=[text])
    batch = TrainingStream(data, seed=0, batch_size=4, rank=0, world_size=1).batch(3)
    assert batch["text_2_tokens"].shape == (4, 9, 16)
    for b, clip in enumerate(batch["clip"].tolist()):
        assert batch["caption"][b] == CAPTIONS[clip]
        assert torch.equal(batch["text_2_pooled"][b], text.row(clip)["text_2_pooled"])


def test_a_killed_cache_continues_bit_for_bit(tmp_path, latents, encoders):
    calls = []

    def kill_at_the_third(*_):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), 9)

    def load():
        encoders["clip"][1].register_forward_pre_hook(kill_at_the_third)
        return encoders["clip"]

    whole, parts = make(tmp_path / "whole", latents, encoders["clip"]), tmp_path / "parts"
    process = multiprocessing.get_context("fork").Process(target=write_embeddings, args=(parts, PRINT, latents, load))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert len(list(parts.glob("shard*"))) == 2
    with pytest.raises(UserError, match=r"no index\.json there"):
        EmbeddingCache(parts, 1)
    assert files(make(parts, latents, encoders["clip"])) == files(whole)


def test_a_whole_cache_needs_no_encoder(tmp_path, latents, encoders):
    make(tmp_path, latents, encoders["t5"])
    write_embeddings(tmp_path, PRINT, latents, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "x"}, "was made from another text encoder; delete it"),
        ({"clips": "x"}, "was made from other clips"),
        ({"max_length": 12}, "was made from max_length 9 instead of 12"),
        ({"dtype": "bfloat16"}, "was made from dtype float32 instead of bfloat16"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(tmp_path, latents, encoders, change, message):
    make(tmp_path, latents, encoders["t5"])
    with pytest.raises(UserError, match=message):
        make(tmp_path, latents, encoders["t5"], dataclasses.replace(PRINT, **change))


def test_embeddings_of_other_clips_are_refused(tmp_path, latents, encoders):
    other = make(tmp_path, latents, encoders["t5"], dataclasses.replace(PRINT, clips="x"))
    with pytest.raises(UserError, match="belong to other clips than the latents"):
        LatentDataset(latents, texts=[EmbeddingCache(other, 1)])


def test_dropped_captions_become_the_null_caption_by_every_encoder(tmp_path, latents, encoders):
    """There are three encoders: two are cached, the second one is trained jointly."""
    caches = [EmbeddingCache(make(tmp_path / name, latents, encoders[name]), n) for n, name in ((1, "t5"), (3, "clip"))]
    text = CaptionEncoder([caches[0], None, caches[1]], *encoders["clip"])
    assert text.widths == (12, 16, 16)
    assert text.pooled_width == 32
    assert text.lengths == (9, 9, 9)
    data = LatentDataset(latents, texts=caches)
    stream = TrainingStream(data, seed=0, batch_size=3, rank=0, world_size=1)
    batch = next(batch for batch in map(stream.batch, range(99)) if "" not in batch["caption"])
    with torch.no_grad():
        kept, dropped = text(batch), text(batch, [False, True, False])
        nulls = [encode(encoder, tokenize(tokenizer, [""])) for tokenizer, encoder in (encoders["t5"], *[encoders["clip"]] * 2)]
    for part, (a, b, null) in enumerate(zip(kept.tokens, dropped.tokens, nulls, strict=True)):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        real = null.masks[0][0].bool()
        assert torch.equal(dropped.masks[part][1].bool(), real)
        assert torch.allclose(b[1][real], null.tokens[0][0][real], atol=1e-6)
        assert not torch.allclose(a[1][real], b[1][real], atol=1e-2)
    assert torch.allclose(dropped.pooled[1], torch.cat([nulls[1].pooled[0], nulls[2].pooled[0]]), atol=1e-6)


def test_the_null_embedding_is_copied_to_a_device_once_and_not_saved(tmp_path, latents, encoders):
    cache = EmbeddingCache(make(tmp_path, latents, encoders["clip"]), 1)
    text, rows = CaptionEncoder([cache]), [cache.row(i) for i in range(2)]
    batch = {key: torch.stack([row[key] for row in rows]).to("meta") for key in rows[0]} | {"caption": CAPTIONS[:2]}
    kept = []
    for _ in range(2):
        assert text(batch, [True, False]).tokens[0].is_meta
        kept.append(text.nulls[0])
    assert all(part.is_meta for part in (*kept[0].tokens, *kept[0].masks, kept[0].pooled))
    assert kept[0].tokens[0] is kept[1].tokens[0]
    assert text.state_dict() == {}


def test_captions_that_are_cut_are_counted_with_an_example(tmp_path, latents, encoders, capsys):
    tokenizer = learn_vocabulary(CAPTIONS, 300, max_length=4)
    make(tmp_path, latents, (tokenizer, encoders["t5"][1]), dataclasses.replace(PRINT, max_length=4))
    out = capsys.readouterr().out
    assert f"{tmp_path}: 3 of 7 texts have more than 4 tokens and are cut; 'a red disc' loses 'disc'" in out
