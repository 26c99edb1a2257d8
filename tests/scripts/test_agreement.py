"""The commands that read videos, asked for the same files."""

import os
import signal
from pathlib import Path

from promag.data.video import write_video
from promag.scripts.reliability import agreement
from promag.scripts.reliability.corpus import picture


def test_all_commands_read_a_whole_file_and_refuse_a_cut_one(tmp_path):
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    write_video(whole, picture(9, 32, 48), 12)
    cut.write_bytes(whole.read_bytes()[:-200])
    read, refused = agreement.ask([whole, cut], Path("checkpoints/tiny").resolve())
    assert read == dict.fromkeys(("prepare-clips", "reconstruct", "sample --video", "page"), "read")
    assert {name: answer.split(":")[0] for name, answer in refused.items()} == dict.fromkeys(read, "refused")
    assert agreement.agree(read)
    assert agreement.agree(refused)
    assert not agreement.agree({**read, "page": refused["page"]})


def test_a_command_that_ends_its_process_costs_its_own_answer_alone(monkeypatch, tmp_path):
    def die_on_b(path, checkpoint):
        if path.name == "b":
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setitem(agreement.COMMANDS, "dies on b", die_on_b)
    monkeypatch.setitem(agreement.COMMANDS, "reads", lambda path, checkpoint: None)
    answers = agreement.ask([tmp_path / name for name in "abc"], tmp_path, ("dies on b", "reads"))
    read = {"dies on b": "read", "reads": "read"}
    assert answers == [read, {"dies on b": "crash: killed by SIGKILL", "reads": "read"}, read]


def test_no_file_is_asked_for_when_the_time_is_over(tmp_path):
    assert agreement.ask_until([tmp_path / "a"], tmp_path, ended=0) == []
