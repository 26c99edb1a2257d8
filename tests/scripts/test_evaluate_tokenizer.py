"""`promag evaluate-tokenizer`: the ratios that are measured, and options without effect."""

import json

import pytest

from promag.scripts import evaluate_tokenizer
from promag.training.config import UserError
from tests.conftest import make_tokenizer

SMALL = ["--videos", "synthetic", "--count", "1", "--size", "32", "--precision", "fp32", "--perceptual"]  # no metrics


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "tokenizer"
    make_tokenizer(settle=0.05).save_pretrained(folder)
    return folder


def test_chosen_ratios_are_measured_at_lengths_that_suit_them(tokenizer, tmp_path, capsys):
    record = tmp_path / "results.jsonl"
    sheet = ["--contact-sheet", str(tmp_path / "sheet.png")]
    against = ["--against", str(tokenizer), "--rounds", "1"]
    call = [str(tokenizer), *SMALL, "--frames", "9", "--record", str(record)]
    evaluate_tokenizer.main([*call, "--ratios", "4", "8", *sheet, *against])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    line = json.loads(record.read_text())
    assert list(line["ratios"]) == list(line["against"]["ratios"]) == ["4", "8"]
    assert [words[2] for words in printed if words[-1] == "dB"] == ["4x", "8x"]
    with pytest.raises(UserError, match=r"9 frames: 16x needs 1 \+ 16k"):
        evaluate_tokenizer.main(call)
    make_tokenizer(levels=1).save_pretrained(tmp_path / "low")
    with pytest.raises(UserError, match=r"low: has 4x, .*tokenizer is measured at 8x: no ratio in both"):
        evaluate_tokenizer.main([*call, "--ratios", "8", "--against", str(tmp_path / "low")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratios", "12"], "--ratios: temporal ratio 12: this tokenizer has 4x, 8x, 16x"),
        (["--ratios", "8", "8"], "--ratios 8 8: 8 is given twice; give every value once"),
        (["--frames", "9", "--fvd", "i3d.pt"], "--fvd i3d.pt: clips of 9 frames; at least 10 are needed; use longer ones"),
        (["--rounds", "3"], "--rounds 3: nothing is timed without --against or --tiny-decoder; leave it out"),
        (["--also", "a=b:4"], "--also: is of the contact sheet; give --contact-sheet FILE.png, or leave it out"),
        (["--clips", "0"], "--clips: is of the contact sheet"),
        (["--across", "3"], "--across: is of the contact sheet"),
        (["--scale", "2"], "--scale: is of the contact sheet"),
        (["--contact-sheet", "a.png", "--clips", "0", "0"], "--clips 0 0: 0 is given twice"),
        (["--contact-sheet", "a.png", "--also", "a=b:4", "a=c:4"], "--also a a: a is given twice"),
        (["--contact-sheet", "a.png", "--also", "8x=b:4"], "--also 8x: names a level of .*tokenizer already"),
    ],
)
def test_options_without_effect_and_repeated_values_are_refused(tokenizer, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        evaluate_tokenizer.main([str(tokenizer), *SMALL, "--frames", "17", *options])
    assert list(tmp_path.iterdir()) == []


def test_the_training_of_a_checkpoint_does_not_depend_on_the_working_directory(tokenizer, monkeypatch):
    (tokenizer.parent / "config.yaml").write_text("seed: 3\nstages: []\n")
    monkeypatch.chdir(tokenizer)
    assert evaluate_tokenizer.trained_by(".") == evaluate_tokenizer.trained_by(str(tokenizer)) == {"seed": 3, "stages": {}}
