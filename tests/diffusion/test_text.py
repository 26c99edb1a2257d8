import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

from promag.diffusion.text import (
    drop_captions,
    encode,
    learn_vocabulary,
    load_frozen,
    small_clip,
    text_widths,
    tokenize,
)
from promag.training.config import UserError

CAPTIONS = [f"a {c} {s} moves {d}" for c in ("red", "blue") for s in ("disc", "square") for d in ("left", "right")]


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    vocabulary = learn_vocabulary(CAPTIONS, 320, max_length=12)
    return vocabulary, small_clip(vocabulary, width=16, layers=1, heads=2).eval()


@given(st.text(max_size=20))
@settings(max_examples=50, deadline=None)
def test_any_text_can_be_written_and_read_back(small, text):
    ids = small[0](text, add_special_tokens=False)["input_ids"]
    assert small[0].unk_token_id is None or small[0].unk_token_id not in ids
    assert small[0].decode(ids, clean_up_tokenization_spaces=False).removeprefix(" ") == text.removeprefix(" ")


def test_known_words_are_single_tokens(small):
    assert len(small[0]("a red disc moves left", add_special_tokens=False)["input_ids"]) == 5


def test_padding_and_company_change_nothing(small):
    vocabulary, model = small
    with torch.no_grad():
        alone = encode(model, tokenize(vocabulary, ["a red disc"]))
        company = encode(model, tokenize(vocabulary, ["a red disc", "a blue square moves right"]))
        longer = encode(model, tokenize(vocabulary, ["a red disc"], max_length=7))
    assert torch.allclose(alone.tokens[0], company.tokens[0], atol=1e-6)
    assert torch.allclose(alone.pooled[0], company.pooled[0], atol=1e-6)
    real = int(alone.mask.sum())
    assert real == 5  # start, three words, end
    assert torch.allclose(alone.tokens[0, :real], longer.tokens[0, :real], atol=1e-6)
    assert torch.allclose(alone.pooled, longer.pooled, atol=1e-6)


def test_the_pooled_vector_is_that_of_the_end_token(small):
    vocabulary, model = small
    with torch.no_grad():
        text = encode(model, tokenize(vocabulary, ["a red disc"]))
    assert torch.equal(text.pooled[0], text.tokens[0, 4])


def test_words_tell_captions_apart_from_the_start():
    """At the scale of the layers around them: starting words at a deviation of 0.02 instead gives about 0.3 here."""
    for seed in range(3):
        torch.manual_seed(seed)
        vocabulary = learn_vocabulary(CAPTIONS, 320, max_length=12)
        model = small_clip(vocabulary, width=64, layers=2, heads=4).eval()
        with torch.no_grad():
            left, right = encode(model, tokenize(vocabulary, ["a red disc moves left", "a red disc moves right"])).tokens
        assert (left[5] - right[5]).norm() > 0.8 * left[5].norm()
        assert torch.equal(left[4], right[4])  # a word sees none that follow


def test_captions_are_dropped_at_the_stated_rate():
    dropped = drop_captions(["x"] * 5000, 0.2, [torch.Generator().manual_seed(0)] * 5000)
    assert set(dropped) == {"", "x"}
    assert dropped.count("") / 5000 == pytest.approx(0.2, abs=0.02)
    assert drop_captions(["x"] * 50, 0.0, [torch.Generator()] * 50) == ["x"] * 50


def test_frozen_encoders_by_path(small, tmp_path):
    vocabulary, clip = small
    t5 = T5EncoderModel(T5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    for name, model, pooled in (("clip", clip, 16), ("t5", t5, 0)):
        model.save_pretrained(tmp_path / name)
        vocabulary.save_pretrained(tmp_path / name)
        loaded_vocabulary, loaded = load_frozen(tmp_path / name, max_length=10)
        assert text_widths(loaded) == (16, pooled)
        assert not any(p.requires_grad for p in loaded.parameters())
        with torch.no_grad():
            a = encode(model.eval(), tokenize(vocabulary, CAPTIONS, 10))
            b = encode(loaded, tokenize(loaded_vocabulary, CAPTIONS))
        assert torch.equal(a.tokens, b.tokens)
        assert b.tokens.shape == (len(CAPTIONS), 10, 16)


def test_unsuitable_encoders_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_frozen(tmp_path / "nothing", 10)
    BertModel(BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a bert model; legal are clip, clip_text_model, t5, umt5"):
        load_frozen(tmp_path, 10)
