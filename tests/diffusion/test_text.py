import json
import shutil

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from promag import ProMAGTransformer3DModel
from promag.diffusion.text import (
    draw_dropped,
    encode,
    encoder_files,
    encoder_settings,
    hash_text_encoder,
    learn_vocabulary,
    load_frozen,
    side_by_side,
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
@settings(max_examples=50)
def test_any_text_is_encoded_and_decoded_unchanged(small, text):
    ids = small[0](text, add_special_tokens=False)["input_ids"]
    assert small[0].unk_token_id is None or small[0].unk_token_id not in ids
    assert small[0].decode(ids, clean_up_tokenization_spaces=False).removeprefix(" ") == text.removeprefix(" ")


def test_known_words_are_single_tokens(small):
    assert len(small[0]("a red disc moves left", add_special_tokens=False)["input_ids"]) == 5


def test_padding_and_other_prompts_change_nothing(small):
    vocabulary, model = small
    with torch.no_grad():
        alone = encode(model, tokenize(vocabulary, ["a red disc"]))
        company = encode(model, tokenize(vocabulary, ["a red disc", "a blue square moves right"]))
        longer = encode(model, tokenize(vocabulary, ["a red disc"], max_length=7))
    assert torch.allclose(alone.tokens[0][0], company.tokens[0][0], atol=1e-6)
    assert torch.allclose(alone.pooled[0], company.pooled[0], atol=1e-6)
    real = int(alone.masks[0].sum())
    assert real == 5  # start, three words, end
    assert torch.allclose(alone.tokens[0][0, :real], longer.tokens[0][0, :real], atol=1e-6)
    assert torch.allclose(alone.pooled, longer.pooled, atol=1e-6)


def test_the_pooled_vector_is_that_of_the_end_token(small):
    vocabulary, model = small
    with torch.no_grad():
        text = encode(model, tokenize(vocabulary, ["a red disc"]))
    assert torch.equal(text.pooled[0], text.tokens[0][0, 4])


def test_untrained_embeddings_distinguish_captions():
    """With an initial standard deviation of 0.02 for the embeddings this value is about 0.3."""
    for seed in range(3):
        torch.manual_seed(seed)
        vocabulary = learn_vocabulary(CAPTIONS, 320, max_length=12)
        model = small_clip(vocabulary, width=64, layers=2, heads=4).eval()
        with torch.no_grad():
            left, right = encode(model, tokenize(vocabulary, ["a red disc moves left", "a red disc moves right"])).tokens[0]
        assert (left[5] - right[5]).norm() > 0.8 * left[5].norm()
        assert torch.equal(left[4], right[4])  # the attention is causal


def test_captions_are_dropped_at_the_stated_rate():
    dropped = draw_dropped(0.2, [torch.Generator().manual_seed(0)] * 5000)
    assert sum(dropped) / 5000 == pytest.approx(0.2, abs=0.02)
    assert not any(draw_dropped(0.0, [torch.Generator()] * 50))


# -- frozen encoders -------------------------------------------------------------------------------------------------

TINY_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
TINY_PICTURES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 14, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    """One tiny model of each kind, by the name that load_frozen takes."""
    place, (vocabulary, clip) = tmp_path_factory.mktemp("encoders"), small
    torch.manual_seed(1)
    models = {
        "t5": T5EncoderModel(T5Config(vocab_size=len(vocabulary), **TINY_T5)),
        "umt5": UMT5EncoderModel(UMT5Config(vocab_size=len(vocabulary), **TINY_T5)),
        "byt5": T5EncoderModel(T5Config(vocab_size=384, **TINY_T5)),
        "clip": clip,
        "whole_clip": CLIPModel(CLIPConfig(text_config=clip.config, vision_config=TINY_PICTURES, projection_dim=16)),
    }
    for name, model in models.items():
        model.save_pretrained(place / name)
        (ByT5Tokenizer() if name == "byt5" else vocabulary).save_pretrained(place / name)
    names = {name: str(place / name) for name in models}
    for name, change in {"open_clip": {}, "bidirectional": {"no_causal_mask": True, "pool_type": "last"}}.items():
        config = {**OPEN_CLIP, "text_cfg": {**OPEN_CLIP["text_cfg"], **change}}
        names[name] = f"open_clip:local-dir:{write_openclip(place / name, config)}"
    return names


def write_openclip(folder, config):
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


KINDS = ["t5", "umt5", "clip", "whole_clip", "open_clip", "bidirectional"]
WIDTHS = dict.fromkeys(KINDS[:2], (16, 0)) | dict.fromkeys(KINDS[2:4], (16, 16)) | dict.fromkeys(KINDS[4:], (16, 24))


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_encoders_by_path(folders, kind):
    vocabulary, loaded = load_frozen(folders[kind], None, max_length=10)
    assert text_widths(loaded) == WIDTHS[kind]
    assert not any(p.requires_grad for p in loaded.parameters())
    text = encode(loaded, tokenize(vocabulary, CAPTIONS))
    assert text.tokens[0].shape == (len(CAPTIONS), 10, 16)
    assert len(text.tokens[0].unique(dim=0)) == len(CAPTIONS)
    assert (text.pooled is None) == (WIDTHS[kind][1] == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_padding_nor_other_prompts_change_the_prediction(folders, kind):
    """The batch has a longer prompt or a longer max_length, with one encoder and with two."""
    first, second = (load_frozen(folders[name], None, max_length=9) for name in (kind, "t5"))
    torch.manual_seed(0)
    widths = [text_widths(encoder) for _, encoder in (first, second)]
    transformer = ProMAGTransformer3DModel(
        in_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        text_dim=[tokens for tokens, _ in widths],
        pooled_dim=sum(pooled for _, pooled in widths),
    ).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    x = torch.randn(1, 4, 2, 4, 4)

    def predict(prompts, lengths=(None, None)):
        text = side_by_side([encode(e, tokenize(t, prompts, n)) for (t, e), n in zip((first, second), lengths, strict=True)])
        video = x.expand(len(prompts), -1, -1, -1, -1)
        with torch.no_grad():
            return transformer(video, torch.tensor([500.0]), text.tokens, text.masks, text.pooled, return_dict=False)[0]

    alone = predict(["a red disc"])
    assert not torch.allclose(alone, predict(["a blue disc"]), atol=1e-4)
    assert torch.allclose(alone[0], predict(["a red disc", "a blue square moves right"])[0], atol=1e-5)
    for lengths in ((12, None), (None, 12), (12, 7)):
        assert torch.allclose(alone, predict(["a red disc"], lengths), atol=1e-5)


@pytest.mark.parametrize("kind", ["open_clip", "bidirectional"])
def test_an_openclip_tower_equals_open_clip(folders, kind, tmp_path):
    from promag import OpenCLIPTextModel

    name = folders[kind].removeprefix("open_clip:")
    vocabulary, ours = load_frozen(folders[kind], None, max_length=14)
    reference, tokens = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    prompts = [*CAPTIONS, "", "It's 3 dogs! " * 9]
    with torch.no_grad():
        expected = reference.encode_text(tokens(prompts))
        for model in (ours, _saved_and_loaded(OpenCLIPTextModel, ours, tmp_path)):
            assert torch.allclose(encode(model, tokenize(vocabulary, prompts)).pooled, expected, atol=1e-6)


def _saved_and_loaded(cls, model, folder):
    model.save_pretrained(folder)
    return cls.from_pretrained(folder).eval()


def test_a_named_openclip_model_with_weights_in_a_file(folders, tmp_path):
    open_clip.add_model_config(str(_named_config(tmp_path)))
    weights = folders["open_clip"].removeprefix("open_clip:local-dir:") + "/open_clip_pytorch_model.bin"
    _, named = load_frozen("open_clip:tiny-for-tests", weights, max_length=10)
    _, by_folder = load_frozen(folders["open_clip"], None, max_length=10)
    assert all(torch.equal(a, b) for a, b in zip(named.state_dict().values(), by_folder.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="weights must name a tag or a file"):
        load_frozen("open_clip:tiny-for-tests", None, 10)
    with pytest.raises(UserError, match="not a known tag or valid file"):
        load_frozen("open_clip:tiny-for-tests", "nowhere", 10)


@pytest.mark.parametrize("name", ["/no/such/t5", "models/t5/small", "open_clip:local-dir:/no/such"])
def test_a_folder_that_does_not_exist_has_no_files_and_is_named_when_loaded(name):
    assert encoder_files(name, None) is None
    with pytest.raises(UserError, match=name.rpartition(":")[2]):
        load_frozen(name, None, 10)


def _named_config(folder):
    path = folder / "tiny-for-tests.json"
    path.write_text(json.dumps(OPEN_CLIP))
    return path


def test_a_hash_distinguishes_encoders_and_tokenizers_and_survives_calls(folders, small):
    kinds = ["t5", "umt5", "byt5", "clip", "open_clip", "bidirectional"]  # byt5: a tokenizer without a vocabulary
    hashes = [hash_text_encoder(*load_frozen(folders[kind], None, 10)) for kind in kinds]
    assert len(set(hashes)) == len(kinds)
    vocabulary, model = load_frozen(folders["t5"], None, 10)
    tokenize(vocabulary, CAPTIONS, 7)
    assert hash_text_encoder(vocabulary, model) == hashes[0]
    assert hash_text_encoder(learn_vocabulary(CAPTIONS[:2], 310), model) != hashes[0]
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert hash_text_encoder(vocabulary, model) != hashes[0]


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_settings_that_weights_do_not_show_are_stated(folders, kind):
    _, model = load_frozen(folders[kind], None, 10)
    before = encoder_settings(model)
    if kind == "clip":
        model.config.hidden_act = "relu"
    else:
        model.register_to_config(quick_gelu=True)
    assert encoder_settings(model) != before


def test_unsuitable_encoders_are_named(folders, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_frozen(str(tmp_path / "nothing"), None, 10)
    with pytest.raises(UserError, match="open_clip:nothing: cannot be loaded"):
        load_frozen("open_clip:nothing", "openai", 10)
    with pytest.raises(UserError, match="weights are named for open_clip: models alone"):
        load_frozen(folders["t5"], "openai", 10)
    with pytest.raises(UserError, match="max_length: 15 text tokens: this encoder takes 1 to 14"):
        load_frozen(folders["open_clip"], None, 15)
    with pytest.raises(UserError, match="13 text tokens: this encoder takes 1 to 12"):
        load_frozen(folders["clip"], None, 13)
    assert load_frozen(folders["t5"], None, 500)[0].model_max_length == 500
    BertModel(BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a bert model; legal are clip, clip_text_model, t5, umt5"):
        load_frozen(str(tmp_path), None, 10)


def test_an_encoder_is_loaded_only_from_whole_safetensors(folders, tmp_path):
    place = tmp_path / "t5"
    shutil.copytree(folders["t5"], place)
    torch.save({}, place / "pytorch_model.bin")  # beside safetensors it is not read
    load_frozen(str(place), None, 8)
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"t5/model\.safetensors: is no whole safetensors file"):
        load_frozen(str(place), None, 8)
    file.unlink()
    with pytest.raises(UserError, match=r"text encoder .*t5: cannot be loaded: .*safetensors"):
        load_frozen(str(place), None, 8)
