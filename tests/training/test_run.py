"""Checkpoints and JSON lines after kills, full disks and foreign folders."""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import yaml

from promag.training import files
from promag.training.command_line import continues, run_main
from promag.training.config import UserError
from promag.training.files import append_json, read_json_lines, save_tensors_atomically, write_atomically
from promag.training.run import (
    checkpoints,
    commit,
    cut_metrics,
    load_checkpoint,
    name_cpu,
    newest_checkpoint,
    open_run,
    record_data,
    recorded_data,
    save_checkpoint,
    sweep,
    thin_out,
)
from tests.conftest import optimization_config

SETTINGS = optimization_config(batch_size=2, learning_rate=0.05, warmup=2, weight_decay=0.1)


def save(folder, step, value=1.0, **meta):
    return save_checkpoint(folder, step, [(n, {"a": torch.full((2,), value)}) for n in ("weights", "ema")], meta)


@contextlib.contextmanager
def small_files(limit):
    """Limit files of this process to `limit` bytes: longer writes fail as on a full disk, in Python and in libraries."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def own_bytes():
    """Return this process's resident memory without memory-mapped files."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def test_leftovers_of_killed_saves_are_removed(tmp_path):
    for name in (".step-00000003.4711", ".step-old-00000001", ".step-00000002", ".step-00000003.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    (tmp_path / ".step-best").mkdir()  # a stranger's
    save(tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000005", ".step-best"}


def test_a_checkpoint_is_kept_until_its_replacement_is_complete(tmp_path):
    save(tmp_path, 5, 1.0)

    def groups():
        yield "weights", {"a": torch.zeros(2)}
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path, 5, groups(), {})
    assert load_checkpoint(newest_checkpoint(tmp_path))[0]["weights"]["a"].tolist() == [1, 1]
    save(tmp_path, 5, 2.0)
    assert load_checkpoint(newest_checkpoint(tmp_path))[0]["weights"]["a"].tolist() == [2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_a_group_is_let_go_of_before_the_next_one_is_gathered(tmp_path):
    """One of a sharded model may fill the memory of rank 0."""
    held = []

    def gather():
        assert all(tensor() is None for tensor in held)
        tensor = torch.zeros(2)
        held.append(weakref.ref(tensor))
        return {"a": tensor}

    save_checkpoint(tmp_path, 1, ((name, gather()) for name in ("weights", "ema", "optimizer")), {})
    assert len(held) == 3


def test_folders_with_other_names_are_not_checkpoints(tmp_path):
    for step in (1, 2, 100_000_000):
        path = save(tmp_path, step)
    for name in ("step-best", "step-00000009-copy", "step-9"):
        path.rename(tmp_path / name)
        path = save(tmp_path, 100_000_000)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001", "step-00000002", "step-100000000"]
    thin_out(tmp_path, 100_000_000, keep_last=1)
    kept = {"step-best", "step-00000009-copy", "step-9", "step-100000000"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_copy_under_another_steps_name_is_not_a_checkpoint(tmp_path):
    """Resuming from it would rewind the run, and it would outlive all later checkpoints."""
    path = save(tmp_path, 4)
    shutil.copytree(path, tmp_path / "step-00000099")
    shutil.copytree(path, tmp_path / "step-000000004")
    assert newest_checkpoint(tmp_path) == path
    new = save(tmp_path, 6)
    thin_out(tmp_path, 6, keep_last=1)
    assert {p.name for p in tmp_path.iterdir()} == {new.name, "step-00000099", "step-000000004"}


def test_a_foreign_folder_at_a_checkpoints_path_is_renamed_and_kept(tmp_path, capsys):
    copy = shutil.copytree(save(tmp_path, 4, 1.0), tmp_path / "step-00000006")
    save(tmp_path, 6, 2.0)
    assert f"{copy}: is no checkpoint of this run; renamed to step-00000006.other1" in capsys.readouterr().err
    assert json.loads((tmp_path / "step-00000006.other1" / "state.json").read_text())["step"] == 4
    assert load_checkpoint(newest_checkpoint(tmp_path))[0]["weights"]["a"].tolist() == [2, 2]


def test_a_damaged_checkpoint_does_not_displace_earlier_ones(tmp_path):
    """A run that fell back to an earlier checkpoint saves at earlier steps than the damaged one for a while."""
    save(tmp_path, 2)
    (save(tmp_path, 8) / "state.json").write_text("{")
    for step in (4, 6):
        save(tmp_path, step)
        thin_out(tmp_path, step, keep_last=1)
        assert newest_checkpoint(tmp_path).name == f"step-{step:08d}"
    save(tmp_path, 8)
    thin_out(tmp_path, 8, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_a_save_killed_between_its_renames_is_finished(tmp_path):
    save(tmp_path, 5, 1.0).rename(tmp_path / ".step-00000005.old")
    shutil.copytree(tmp_path / ".step-00000005.old", tmp_path / ".step-00000005.new")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert load_checkpoint(newest_checkpoint(tmp_path))[0]["weights"]["a"].tolist() == [1, 1]


def test_links_to_checkpoints_are_read_and_their_targets_kept(tmp_path):
    """Users make such links when they move checkpoints to another disk."""
    run, other = tmp_path / "run", tmp_path / "other"
    target = save(run, 2).rename(other)
    (run / "step-00000002").symlink_to(target)
    assert newest_checkpoint(run) == run / "step-00000002"
    save(run, 4)
    thin_out(run, 4, keep_last=1)
    assert [path.name for path in run.iterdir()] == ["step-00000004"]
    assert (other / "state.json").exists()


def test_a_full_disk_is_named_and_keeps_existing_files(tmp_path):
    tensors = {"a": torch.ones(1000)}
    good, text, line = save(tmp_path, 1), tmp_path / "a.txt", tmp_path / "m.jsonl"
    write_atomically(text, "before")
    append_json(line, {"step": 1})
    writes = {
        text: lambda: write_atomically(text, "x" * 3000),
        tmp_path / "t.safetensors": lambda: save_tensors_atomically(tmp_path / "t.safetensors", tensors),
        tmp_path / "step-00000002": lambda: save_checkpoint(tmp_path, 2, [("weights", tensors)], {}),
        line: lambda: append_json(line, {"step": 2, "text": "x" * 3000}),
    }
    for path, write in writes.items():
        with small_files(2000), pytest.raises(OSError, match="File too large") as caught:
            write()
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert {path.name for path in tmp_path.iterdir()} == {good.name, text.name, line.name}
    assert text.read_text() == "before"
    assert read_json_lines(line) == [{"step": 1}]  # and half a line, which the next line replaces
    append_json(line, {"step": 2})
    assert line.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert newest_checkpoint(tmp_path) == good


def test_a_full_disk_is_one_line_of_a_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["promag"])

    def main(arguments):
        write_atomically(tmp_path / "a.txt", "x" * 3000)

    error = f"error: {tmp_path / 'a.txt'}: File too large"
    with small_files(2000):
        assert run_main(main) == 1
        assert capsys.readouterr().err == f"{error}\n"
        assert run_main(continues(main)) == 1
    assert capsys.readouterr().err == f"{error}; the same command continues once this is mended\n"


@pytest.mark.parametrize(
    ("path", "named", "reason"),
    [
        ("folder", "folder", "Is a directory"),
        ("file/a.txt", "file", "File exists"),
        ("file/b/a.txt", "file/b", "Not a directory"),
        ("a" * 300, "a" * 300, "File name too long"),
    ],
)
def test_a_path_that_cannot_be_written_is_one_line_of_a_command(tmp_path, capsys, monkeypatch, path, named, reason):
    monkeypatch.setattr(sys, "argv", ["promag"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert run_main(lambda arguments: append_json(tmp_path / path, {"step": 1})) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / named}: {reason}\n"
    assert run_main(lambda arguments: (tmp_path / "absent").read_text()) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'absent'}: No such file or directory\n"


@pytest.mark.parametrize("damage", ["cut", "missing", "state", "no state"])
def test_damaged_checkpoints_are_skipped_and_named(tmp_path, capsys, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    if damage == "cut":
        (bad / "ema.safetensors").write_bytes((bad / "ema.safetensors").read_bytes()[:-1])
    elif damage == "missing":
        (bad / "ema.safetensors").unlink()
    else:
        (bad / "state.json").write_text('{"step": 2, "gro' if damage == "state" else "null")
    assert newest_checkpoint(tmp_path) == good
    assert f"checkpoint {bad}: damaged: " in capsys.readouterr().err
    (good / "state.json").write_text("")
    with pytest.raises(UserError, match="all checkpoints are damaged; remove them to restart this stage"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "none") is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's figures of memory")
def test_a_checkpoint_is_read_a_tensor_at_a_time(tmp_path):
    path = save_checkpoint(tmp_path, 1, [("weights", {f"{i}": torch.ones(2**20) for i in range(32)})], {})
    before = own_bytes()
    groups, _ = load_checkpoint(path)
    total = sum(groups["weights"][name].sum().item() for name in groups["weights"])
    assert total == 2**25
    assert own_bytes() - before < 2**25  # 128 MiB are on disk


@pytest.mark.parametrize("half", [b'{"step": 3, "lo', b"\xff\xfe", b"{"])
def test_a_half_written_line_does_not_end_a_run(tmp_path, capsys, half):
    path = tmp_path / "metrics.jsonl"
    append_json(path, {"step": 1}, {"step": 2})
    with open(path, "ab") as file:
        file.write(half)
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    assert f"{path}: line 3 is damaged and skipped" in capsys.readouterr().err
    append_json(path, {"step": 4})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 4}\n'
    assert f"{path}: its partial last line is dropped" in capsys.readouterr().err


@pytest.mark.parametrize("tail", [1, 8, 40, 1000])
def test_lines_are_appended_whatever_part_of_the_file_is_read(tmp_path, monkeypatch, tail):
    monkeypatch.setattr(files, "TAIL", tail)
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')  # a whole line without its end
    append_json(path, {"step": 3})
    with open(path, "a") as file:
        file.write('{"step": 4, "half')
    append_json(path, {"step": 5})
    assert [record["step"] for record in read_json_lines(path)] == [1, 2, 3, 5]


def test_a_damaged_line_in_the_middle_is_cut_with_the_metrics_after_a_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "l{"step": 3}\n{"step": 4}\n{"step": 5}\n')
    cut_metrics(path, 4)
    assert read_json_lines(path) == [{"step": 1}, {"step": 4}]


def test_a_complete_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}')
    append_json(path, {"b": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"b": 2}]


def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    order = []
    flush, replace = files.flush, os.replace
    monkeypatch.setattr(files, "flush", lambda path: (order.append(("flush", path.name)), flush(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("rename", b.name)), replace(a, b)))
    write_atomically(tmp_path / "a.txt", "one")
    save_tensors_atomically(tmp_path / "b.safetensors", {"x": torch.ones(1)})
    save(tmp_path, 1)
    for name in ("a.txt", "b.safetensors", "step-00000001"):
        place = order.index(("rename", name))
        assert order[place - 1][0] == "flush"
        assert order[place + 1] == ("flush", tmp_path.name)
    flushed = {name for kind, name in order if kind == "flush"}
    assert {"weights.safetensors", "ema.safetensors", "state.json"} <= flushed


def test_text_is_utf_8_in_every_locale(tmp_path):
    write_atomically(tmp_path / "a.txt", "é")
    assert (tmp_path / "a.txt").read_bytes() == "é".encode()


def test_an_empty_record_of_the_configuration_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"config\.yaml: is empty"):
        open_run(tmp_path, optimization_config())


def test_checkpoints_are_whole_or_absent(tmp_path):
    save_checkpoint(tmp_path, 5, [("weights", {"a": torch.ones(2)})], {"seconds": 1.5})
    (tmp_path / "step-00000006").mkdir()  # as if an interrupted copy had left it
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000005"]
    groups, meta = load_checkpoint(checkpoints(tmp_path)[0])
    assert torch.equal(groups["weights"]["a"], torch.ones(2))
    assert meta == {"step": 5, "seconds": 1.5}
    assert not list(tmp_path.glob(".*"))


def test_old_checkpoints_are_removed_except_those_to_keep(tmp_path):
    for step in range(2, 14, 2):
        save_checkpoint(tmp_path, step, [("weights", {"a": torch.ones(1)})], {})
    thin_out(tmp_path, 12, keep_last=1, keep_every=4)
    assert [int(path.name.removeprefix("step-")) for path in checkpoints(tmp_path)] == [4, 8, 12]
    thin_out(tmp_path, 12, keep_last=2)
    assert [int(path.name.removeprefix("step-")) for path in checkpoints(tmp_path)] == [8, 12]


def test_metrics_after_the_resumed_checkpoint_are_removed(tmp_path):
    for step in range(5):
        append_json(tmp_path / "m.jsonl", {"step": step})
    cut_metrics(tmp_path / "m.jsonl", 2)
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_a_run_keeps_its_settings(tmp_path):
    open_run(tmp_path / "r", SETTINGS)
    (tmp_path / "r/4x/step-00000002").mkdir(parents=True)
    open_run(tmp_path / "r", SETTINGS)
    changed = dataclasses.replace(SETTINGS, steps=9, learning_rate=1.0)
    with pytest.raises(UserError, match=r"learning_rate is 0.05 there, 1.0 now; steps is 4 there, 9 now"):
        open_run(tmp_path / "r", changed)
    open_run(tmp_path / "r", changed, may_change=("steps", "learning_rate"))


def test_a_run_that_has_trained_nothing_takes_other_settings_and_data(tmp_path):
    run = open_run(tmp_path / "r", SETTINGS)
    record_data(run, {"videos": "one"})
    for name in ("vocabulary.json", "notes.txt"):
        (run / name).write_text("kept?")
    changed = dataclasses.replace(SETTINGS, steps=9)
    open_run(run, changed, write=False)
    assert recorded_data(run) == {"videos": "one"}
    open_run(run, changed, made_from_data=("vocabulary.json",))
    record_data(run, {"videos": "another"})
    assert [name for name in ("vocabulary.json", "notes.txt") if (run / name).exists()] == ["notes.txt"]
    open_run(run, changed)  # settings may stay and clips be corrected
    record_data(run, {"videos": "a third"})
    (run / "4x").mkdir()
    (run / "4x" / "done.json").write_text("{}")
    open_run(run, changed)
    assert recorded_data(run) == {"videos": "a third"}
    with pytest.raises(UserError, match="steps is 9 there, 4 now"):
        open_run(run, SETTINGS)


def test_a_run_of_an_earlier_version_goes_on_with_the_defaults_of_newer_settings(tmp_path):
    defaults = dataclasses.replace(SETTINGS, muon_learning_rate=None)
    open_run(tmp_path / "r", defaults)
    file = tmp_path / "r" / "config.yaml"
    older = {key: value for key, value in yaml.safe_load(file.read_text()).items() if key != "muon_learning_rate"}
    file.write_text(yaml.safe_dump(older))
    open_run(tmp_path / "r", defaults)
    (tmp_path / "r/4x/step-00000002").mkdir(parents=True)
    with pytest.raises(UserError, match=r"muon_learning_rate is None there, 0\.01 now"):
        open_run(tmp_path / "r", dataclasses.replace(SETTINGS, muon_learning_rate=0.01))


def test_write_atomically_leaves_nothing_else(tmp_path):
    write_atomically(tmp_path / "a.txt", "one")
    write_atomically(tmp_path / "a.txt", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "two"


def test_a_result_names_the_commit_and_changes_but_those_of_records(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True).stdout

    code, record = tmp_path / "code" / "a.py", tmp_path / "docs" / "results" / "a.jsonl"
    for path in (code, record):
        path.parent.mkdir(parents=True)
        path.write_text("1\n", encoding="utf-8")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    plain = git("rev-parse", "--short=12", "HEAD").strip()
    append_json(record, {"a": 1})
    assert commit(code.parent) == plain
    code.write_text("2\n", encoding="utf-8")
    assert commit(code.parent) == f"{plain}+changes"
    shutil.rmtree(tmp_path / ".git")
    assert commit(code.parent) == "unknown"


@pytest.mark.parametrize(
    ("flags", "widest"),
    [
        ("fpu sse2 avx avx2", ", AVX2"),
        ("fpu avx2 avx512f avx512bw", ", AVX-512"),
        ("avx2 avx512f avx512_bf16", ", AVX-512 with bf16"),
        ("avx2 avx512f avx512_bf16 amx_bf16 amx_tile", ", AMX"),
        ("fpu", ""),
    ],
)
def test_a_cpu_is_named_with_the_instructions_that_decide_its_speed(flags, widest):
    processor = f"vendor_id\t: Any\nmodel name\t: Any: 7B12\nflags\t\t: {flags}\n"
    assert name_cpu("\n".join([processor] * 2)) == f"Any: 7B12{widest}"


def test_a_cpu_without_a_name_is_unknown():
    assert name_cpu("") == "unknown CPU"
