"""Damaged parts of saved pipelines and caches are refused in a line that names them. The script has the long version."""

import json
import logging
import shutil
import struct

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from promag import ProMAGPipeline, load_pipeline
from promag.diffusion.text import load_frozen, tokenize
from promag.scripts.reliability import damaged_parts as damage
from promag.scripts.reliability.outcomes import ANSWERED, REFUSED, Case, outcome
from promag.training.config import UserError
from promag.training.safetensors_only import check_files
from tests.tiny_pipeline import make_pipeline

FAST = settings(max_examples=40)
LOADS = ("answered", "refused")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_damage_of_every_kind_is_answered_or_refused_by_name(pipe, tmp_path):
    cases = list(damage.damaged_parts(pipe, tmp_path))[::24]
    outcomes = {case.what: outcome(case) for case in cases}
    assert {what: result for what, result in outcomes.items() if result not in (ANSWERED, REFUSED)} == {}
    assert sum(result == REFUSED for result in outcomes.values()) > 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pipe = make_pipeline()
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder / "pipeline")
    damage.write_caches(folder / "caches", pipe)
    return folder


def tried(saved, source, change, load):
    """Return the outcome of a load of a damaged copy; a refusal must name the copy or the damaged value."""
    copy = saved / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(saved / source, copy)
    change(copy)
    return outcome(Case("load", lambda: load(copy), (str(copy), *damage.NAMED_BY_CALLS)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=5),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=3), parts, max_size=2),
    max_leaves=4,
)
FILES = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")


@FAST
@given(st.sampled_from(FILES), st.integers(0, 30), JSON)
def test_any_value_of_any_key_of_a_configuration(saved, file, place, value):
    keys = sorted(json.loads((saved / "pipeline" / file).read_text()))
    key = keys[place % len(keys)]
    assert tried(saved, "pipeline", lambda f: damage.replace_key(f / file, key, value), damage.sample) in LOADS


@FAST
@given(st.sampled_from(FILES), st.binary(max_size=12) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_content_of_a_configuration(saved, file, content):
    assert tried(saved, "pipeline", lambda f: damage.replace_text(f / file, content), load_only) in LOADS


def load_only(folder):
    load_pipeline(folder)


WEIGHTS = ("transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")
HEADER = st.binary(max_size=20) | st.dictionaries(st.text(max_size=3), JSON, max_size=2).map(lambda v: json.dumps(v).encode())


@FAST
@given(st.sampled_from((*WEIGHTS, "text_encoder/model.safetensors")), HEADER, st.integers(-4, 4))
def test_any_header_of_safetensors_is_refused_with_its_path(saved, file, header, lie):
    def change(folder):
        size = max(0, len(header) + lie)
        (folder / file).write_bytes(struct.pack("<Q", size) + header + b"\0" * 8)

    assert tried(saved, "pipeline", change, load_only) == REFUSED


@FAST
@given(st.sampled_from(WEIGHTS), st.floats(0, 1, exclude_max=True))
def test_any_truncation_of_safetensors_is_refused_with_its_path(saved, file, share):
    def change(folder):
        damage.cut(folder / file, int(share * (folder / file).stat().st_size))

    assert tried(saved, "pipeline", change, load_only) == REFUSED


@FAST
@example("z/index.json", 3, [0, 0, 3.4028235677973366e38])
@given(st.sampled_from(["z/index.json", "t/index.json", "z/fingerprint.json", "t/fingerprint.json"]), st.integers(0, 9), JSON)
def test_any_value_of_any_key_of_a_caches_index(saved, file, place, value):
    keys = sorted(json.loads((saved / "caches" / file).read_text()))
    key = keys[place % len(keys)]
    read = lambda folder: damage.read_caches(folder, None)  # noqa: E731 (nothing is missing, so nothing is encoded)
    assert tried(saved, "caches", lambda f: damage.replace_key(f / file, key, value), read) in LOADS


@pytest.mark.parametrize("shard", ["../../evil.bin", "../vae/x.safetensors", "x.bin", 5, "", "x.safetensors"])
def test_an_index_of_shards_names_only_safetensors_beside_it(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: names the shard"):
        check_files(tmp_path)


def test_a_pickle_behind_a_linked_part_folder_is_refused(saved, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(saved / "pipeline", folder)
    (folder / "text_encoder").rename(tmp_path / "elsewhere")
    (folder / "text_encoder").symlink_to(tmp_path / "elsewhere")
    assert ProMAGPipeline.from_pretrained(folder).text_encoder is not None
    (tmp_path / "elsewhere" / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"text_encoder/pytorch_model\.bin\.index\.json: may be pickles"):
        ProMAGPipeline.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_refused(saved, tmp_path, part, value):
    folder = tmp_path / "pipeline"
    shutil.copytree(saved / "pipeline", folder)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors)
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{part}: \w+ has NaN or infinite values in {name}; the file is damaged"):
        ProMAGPipeline.from_pretrained(folder)
    if part == "text_encoder":
        with pytest.raises(UserError, match="has NaN or infinite values"):
            load_frozen(str(folder), None, 8)


@pytest.mark.parametrize("length", [0, 1, 10**9, 10**30, 1.5, True, "8", None])
def test_a_length_to_which_no_text_can_be_padded_is_refused_before_it_is(pipe, length):
    if length is None:
        length = pipe.tokenizer.model_max_length
        assert tokenize(pipe.tokenizer, ["a"], length)["input_ids"].shape == (1, 10)
        return
    with pytest.raises(ValueError, match="text tokens"):
        tokenize(pipe.tokenizer, ["a"], length)


def test_a_configuration_of_millions_of_layers_is_refused_before_they_are_built(saved, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(saved / "pipeline", folder)
    damage.replace_key(folder / "text_encoder/config.json", "num_hidden_layers", 10**9)
    with pytest.raises(UserError, match=r"text_encoder/config\.json: num_hidden_layers 1000000000: at most 1000"):
        ProMAGPipeline.from_pretrained(folder)


def test_a_caches_damaged_latents_are_named_with_their_clip(saved, tmp_path):
    folder = tmp_path / "caches"
    shutil.copytree(saved / "caches", folder)
    file = folder / "z/shard-00001.safetensors"
    tensors = load_file(file)
    tensors["latents"][1, 0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: clip 3: its latents are not finite"):
        damage.read_caches(folder, None)
