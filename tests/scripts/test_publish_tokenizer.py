"""Publishing the demo's tokenizer."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from promag.data.clip_index import Clip, save_clips
from promag.data.datasets import ClipDataset, SyntheticDataset
from promag.reports.tokenizer_card import _stages, tokenizer_card
from promag.scripts import publish
from promag.tokenizer.checkpoint import is_growth, load_tokenizer
from promag.tokenizer.growth import Growth
from promag.tokenizer.levels import parameter_count
from promag.training.config import UserError, load_yaml
from tests.existing_models import small_existing


def test_publish_tokenizer_writes_bf16_weights_and_a_card_of_its_own_figures(demo_run, tmp_path):
    table, credits, out, record = (tmp_path / name for name in ("clips.csv", "credits.md", "tiny", "results.jsonl"))
    table.write_text(
        "split,source_repo,source_commit,licence\n"
        "train,one/clips,0123456789abcdef,MIT\ntrain,one/clips,0123456789abcdef,MIT\neval,two/clips,ffff,CC0-1.0\n"
    )
    credits.write_text("Thanks to all.")
    tokenizer = demo_run / "tokenizer-run" / "tokenizer"
    arguments = [str(tokenizer), "--out", str(out), "--videos", "synthetic", "--frames", "17", "--size", "32", "--count", "1"]
    publish.main(["tokenizer", *arguments, "--sources", str(table), "--credits", str(credits), "--record", str(record)])
    weights, trained = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (out, tokenizer))
    assert weights.keys() == trained.keys()
    assert all(torch.equal(value, trained[key].bfloat16()) for key, value in weights.items())
    assert "_name_or_path" not in json.loads((out / "config.json").read_text())
    card, figures = (out / "README.md").read_text(), json.loads(record.read_text())["ratios"]
    for ratio in (4, 8, 16):
        assert f"| {ratio}x | {figures[str(ratio)]['psnr']:.2f} |" in card
    assert "| one/clips | `0123456789ab` | MIT | 2 |" in card
    assert "two/clips" not in card
    assert "| 8x | frozen, frozen | 9 frames, 32x32 | 2 | 1 |" in card
    assert "Thanks to all." in card
    assert "1 clips at 32x32. Commit" in card  # generated ones, of which no index states whether they were trained on
    for change, message in (
        (["--split", "test"], "no row has the split test"),
        (["--sources", str(credits)], "columns licence, source_commit, source_repo, split are missing"),
        (["--sources", "typo.csv"], r"typo\.csv: cannot be read: No such file"),
        (["--credits", "typo.md"], r"typo\.md: cannot be read: No such file"),
        (["--frames", "64"], r"64 frames: 16x needs 1 \+ 16k; use 49 or 65"),
        (["--size", "30"], "height 30: needs a multiple of 8"),
        (["--count", "0"], "--count 0: at least 1 is needed"),
        (["--videos", "typo"], "typo: no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            publish.main(["tokenizer", *arguments, "--sources", str(table), *change])
        assert (out / "README.md").read_text() == card
    published = ["tokenizer", str(out), *arguments[1:], "--sources", str(table)]
    with pytest.raises(UserError, match=r"--out .*tiny: would overwrite .*tiny, which this command uses too"):
        publish.main(published)
    with pytest.raises(UserError, match=r"no config\.yaml there; give RUN/tokenizer"):
        publish.main([*published, "--out", str(tmp_path / "other")])


def test_the_recipe_has_the_batch_of_all_processes_and_the_buckets(demo_run, tmp_path):
    config = load_yaml(demo_run / "tokenizer-run" / "config.yaml")
    shapes = [{"frames": 9, "height": 32, "width": 48, "batch_size": None}]
    shapes += [{"frames": 17, "height": 32, "width": 32, "batch_size": 3}]
    config["stages"][1]["buckets"] = shapes
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("8x", "16x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done.json").write_text('{"seconds": 60, "steps": 2}')
    (tmp_path / "8x" / "step-00000002").mkdir()
    (tmp_path / "8x" / "step-00000002" / "state.json").write_text('{"global_batch": 24}')
    grown, last = _stages(publish.list_stages(tmp_path))
    assert (grown[2], grown[4]) == ("9 frames, 32x48; 17 frames, 32x32 (3 a process)", "24")
    assert last[4] == str(config["stages"][2]["optimization"]["batch_size"])  # without checkpoints, of one process


def test_clips_are_unseen_where_indices_show_that_their_files_were_not_trained_on(demo_run, tmp_path):
    video = tmp_path / "v.mp4"
    video.write_text("")
    clips = [Clip(str(video), 0.0, 5, 8.0, 32, 32, "", letter * 64) for letter in "abc"]
    for clip in clips:
        save_clips(tmp_path / f"{clip.sha256[0]}.jsonl", [clip])
    config = load_yaml(demo_run / "tokenizer-run" / "config.yaml")

    def trained(train, extra=(), init=None, run="run"):
        (tmp_path / run).mkdir(exist_ok=True)
        data = {**config["data"], "train": train, "extra_sources": [{"train": source, "share": 0.1} for source in extra]}
        (tmp_path / run / "config.yaml").write_text(yaml.safe_dump({**config, "data": data, "init": init}))
        return publish.trained_files(tmp_path / run)

    a, b = (str(tmp_path / f"{letter}.jsonl") for letter in "ab")
    assert trained(a, ["synthetic"]) == {"a" * 64}
    files = trained(b, init=str(tmp_path / "run" / "tokenizer"), run="further")
    assert files == {"a" * 64, "b" * 64}
    assert [publish._is_unseen(ClipDataset([clip], 5, 32), files) for clip in clips] == [False, False, True]
    assert trained(a, [str(tmp_path / "gone.jsonl")]) is None
    assert trained("shards/shard-{000..003}.tar") is None
    assert trained(a, init="Wan2.1-T2V-1.3B-Diffusers") is None
    assert not publish._is_unseen(ClipDataset(clips[2:], 5, 32), None)
    assert not publish._is_unseen(SyntheticDataset("eval", 1, 5, 32), files)


def test_the_recipe_lists_extra_training_sources(demo_run, tmp_path):
    run = demo_run / "tokenizer-run"
    config = load_yaml(run / "config.yaml")
    config["data"]["extra_sources"] = [{"train": "synthetic", "share": 0.4, "temporal_strides": [1]}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "8x").mkdir()
    (tmp_path / "8x" / "done.json").write_text((run / "8x" / "done.json").read_text())
    (stage,) = publish.list_stages(tmp_path)
    assert stage["extra_sources"] == {"synthetic": 0.4}
    (row,) = _stages([stage])
    assert row[2] == "9 frames, 32x32; 40% of the steps generated clips"
    assert row[-1] == "not written down"
    plain = stage["loss"]
    for change in ({"between_weight": 2.0}, {"change_weight": 0.5}, {"by_turns": [4, 8]}):
        config["stages"][1].update(change)
    (tmp_path / "8x").rename(tmp_path / "4x-8x")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (stage,) = publish.list_stages(tmp_path)
    assert stage["loss"] == f"{plain} + 0.5 change; frames between key frames count 2 times; 4x, 8x by turns"
    assert stage["name"] == "4x-8x"
    del config["stages"][1]["consistency_weight"]  # a run from before that setting has its default
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert publish.list_stages(tmp_path) == [stage]
    (tmp_path / "machines.txt").write_text("one GPU\na laptop\n")
    assert _stages(publish.list_stages(tmp_path))[0][-1] == "one GPU, then a laptop"


def test_the_recipe_names_an_autoencoder_that_training_started_from(demo_run, tmp_path):
    run = demo_run / "tokenizer-run"
    config = load_yaml(run / "config.yaml")

    def stages(init):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "init": init}))
        (tmp_path / "8x").mkdir(exist_ok=True)
        (tmp_path / "8x" / "done.json").write_text((run / "8x" / "done.json").read_text())
        return publish.list_stages(tmp_path)

    published, stage = stages("Wan2.1-T2V-1.3B-Diffusers")
    assert (published, stage["name"]) == ({"published": "Wan2.1-T2V-1.3B-Diffusers"}, "8x")
    assert [stage["name"] for stage in stages(str(run / "tokenizer"))] == ["4x", "8x", "16x", "8x"]
    ratio = {"clips": 1, "lift": {}, "psnr": 20.0}
    record = {"protocol": "", "ratios": {"8": ratio}, "size": 32, "commit": "", "machine": "", "versions": {"torch": ""}}
    shape = {"parameters": 1e6, "latent_channels": 4, "temporal_ratios": (8,), "spatial_ratio": 16, "dtype": "bfloat16"}
    card = tokenizer_card("name", shape, record, [published, stage], [], "")
    assert "8x temporal compression, 16x in height and width, 4 latent channels" in card
    assert "license" not in card
    assert "1 clips at 32x32. Commit" in card
    unseen = tokenizer_card("name", shape, record, [published, stage], [], "", unseen=True)
    assert "1 clips at 32x32, none of a file that it was trained on. Commit" in unseen
    assert "The first stage starts from Wan2.1-T2V-1.3B-Diffusers. Weights are moving averages." in card
    assert len([row for row in card.splitlines() if row.startswith("| 8x | frozen")]) == 1


def test_the_recipe_lists_a_stage_by_turns_beside_that_of_its_highest_ratio(demo_run, tmp_path):
    run = demo_run / "tokenizer-run"
    config = load_yaml(run / "config.yaml")
    together = {**config["stages"][1], "growth": None, "by_turns": [8, 8, 4], "trainable": "all", "latent_pretrain_steps": 0}
    grown_warm = {**config["stages"][2], "trainable": "all"}

    def rows(*stages, **done):
        run = tmp_path / "-".join(done)
        for name, seconds in done.items():
            (run / name).mkdir(parents=True)
            (run / name / "done.json").write_text(json.dumps({"seconds": seconds, "steps": 2}))
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "stages": list(stages)}))
        return [row[:2] + row[7:8] for row in _stages(publish.list_stages(run))]

    both = rows(config["stages"][1], together, **{"8x": 60, "4x-8x": 120})
    assert both == [["8x", "frozen, frozen", "1.0"], ["4x-8x", "trained, trained", "2.0"]]
    assert rows(config["stages"][1], together, **{"8x": 180}) == [["8x", "frozen, frozen", "3.0"]]
    decoders = {**together, "trainable": "decoder"}
    assert rows(decoders, **{"4x-8x": 60}) == [["4x-8x", "frozen, trained", "1.0"]]
    assert rows(grown_warm, **{"16x": 60}) == [["16x", "trained, trained", "1.0"]]


def test_what_stands_on_an_autoencoder_of_diffusers_is_published_as_it_was_given(tmp_path):
    small_existing("Wan 2.1").save_pretrained(tmp_path / "base")
    model = load_tokenizer(tmp_path / "base").bfloat16()
    kind = publish.save_weights(model, tmp_path / "alone", levels_alone=False)
    assert kind == {"class": "AutoencoderKLWan", "parameters": parameter_count([model])}
    card = card_of({**kind, "temporal_ratios": (4,)})
    assert re.search(r"An AutoencoderKLWan with [\d.]+ M parameters in bfloat16: one checkpoint for 4x temporal compres", card)
    assert 'tokenizer = promag.load_tokenizer("name")' in card
    assert "Grown level by level" not in card
    model.grow(Growth(width=16))
    model.save_growth(tmp_path / "growth")
    levels = load_tokenizer(tmp_path / "growth").bfloat16()
    kind = publish.save_weights(levels, tmp_path / "levels", levels_alone=is_growth(tmp_path / "growth"))
    assert {path.name for path in (tmp_path / "levels").iterdir()} == {"growth.json", "growth.safetensors"}
    weights = load_file(tmp_path / "levels" / "growth.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert kind == {"base": "AutoencoderKLWan", "parameters": parameter_count([levels.encoder_growth, levels.decoder_growth])}
    assert load_tokenizer(tmp_path / "levels").temporal_ratios == (4, 8)
    card = card_of({**kind, "temporal_ratios": (4, 8)})
    assert "for the AutoencoderKLWan that they were grown on, which is not in this folder: one checkpoint for 4x, 8x" in card
    assert 'promag.AutoencoderKLProMAG.load_growth("name", "BASE")  # BASE: folder of that AutoencoderKLWan' in card
    assert "promag reconstruct" not in card


def test_the_card_has_interpolation_as_a_control_and_no_empty_paragraphs():
    moving = {"interpolated": {"psnr": 26.021}, "interpolated_by_motion": {"psnr": 26.1}}
    controls = {"16": moving, "8": {"interpolated": {"psnr": 27}}}
    card = card_of({"parameters": 1e6, "temporal_ratios": (4, 8, 16)}, controls)
    text = "Control, the 4x level alone with the other frames interpolated: one frame of 2, in the place of 8x: 27.00 dB; "
    assert f"\n\n{text}one frame of 4, in the place of 16x: 26.02 dB, 26.10 dB along their motion.\n\nPSNR in dB" in card
    for quoted in (card, card_of({"parameters": 1e6, "temporal_ratios": (4,)})):
        assert "\n\n\n" not in quoted.rstrip()
    assert "Control" not in quoted


def card_of(shape, more=()):
    ratios = {str(ratio): {"clips": 1, "lift": {}, "psnr": 20.0} for ratio in shape["temporal_ratios"]}
    for ratio, figures in dict(more).items():
        ratios[ratio] |= figures
    record = {"protocol": "", "ratios": ratios, "size": 32, "commit": "", "machine": "", "versions": {"torch": ""}}
    shape = {"latent_channels": 4, "spatial_ratio": 8, "dtype": "bfloat16", **shape}
    return tokenizer_card("name", shape, record, [], [], "")
