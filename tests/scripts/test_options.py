"""Options that commands share: files that cannot be written, or would overwrite an input, are refused at the start."""

import importlib
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from promag.pipelines.build import SavedLora
from promag.pipelines.sampling import trained_ratios
from promag.pipelines.stock import StockPipeline
from promag.scripts import prepare_clips
from promag.scripts._options import check_apart, check_different, check_writable, name_of
from promag.scripts._parts import load_lora
from promag.training.config import UserError
from tests.tiny_pipeline import make_pipeline
from tests.wan import make_grown, make_stock, make_transformer


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder but for a file and a folder, as the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("before")
    Path("folder.mp4").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("folder.mp4", "Is a directory"),
        ("file.txt/a.json", "Not a directory"),
        (f"{'a' * 250}.jsonl", "File name too long"),
        (f"{'a' * 249}", "File name too long"),  # of the file that is written aside
    ],
)
def test_a_file_that_cannot_be_written_is_refused(here, path, reason):
    with pytest.raises(UserError, match=f"^--out {path}: cannot be written: {reason}; name another file$"):
        check_writable("--out", path)


def test_a_check_leaves_files_and_folders_as_they_were(here):
    for path in ("new/folder/a.json", "file.txt", None):
        check_writable("--out", path)
        check_writable("--record", path, appended=True)
    assert Path("file.txt").read_text() == "before"
    assert sorted(os.listdir()) == ["file.txt", "folder.mp4"]


def test_outputs_are_told_from_inputs(here):
    Path("link.txt").symlink_to("file.txt")
    for path, other in (("file.txt", "./file.txt"), ("link.txt", "file.txt"), (".", "file.txt"), ("new.mp4", "./new.mp4")):
        with pytest.raises(UserError, match=f"^--out {path}: would overwrite {other}, which this command uses too"):
            check_apart("--out", path, [None, other])
    check_apart("--out", "folder.mp4/new.txt", ["folder.mp4", "file.txt", "synthetic"])


def test_values_that_are_given_twice_are_named():
    with pytest.raises(UserError, match=r"--ratios 8 4 8: 8 is given twice; give every value once"):
        check_different("--ratios", [8, 4, 8])
    check_different("--ratios", [4, 8])
    check_different("--ratios", None)


def test_a_name_is_that_of_the_folder_wherever_the_command_runs(here, monkeypatch):
    monkeypatch.chdir(here / "folder.mp4")
    assert [name_of(path) for path in (".", "..", "a/b/", "synthetic")] == ["folder.mp4", here.name, "b", "synthetic"]


WRITES = [  # command, its other words, options that take files
    ("sample", ["nowhere", "--prompt", "a"], {"--out": "folder.mp4"}),
    ("sample", ["nowhere", "--prompt", "a", "--out", "v.mp4"], {"--grid": "folder.mp4", "--contact-sheet": "file.txt/a.png"}),
    ("reconstruct", ["nowhere", "v.mp4"], {"--out": "folder.mp4"}),
    ("evaluate_tokenizer", ["nowhere", "--videos", "synthetic"], {"--record": "folder.mp4", "--out": "file.txt/a.json"}),
    ("evaluate_tokenizer", ["nowhere", "--videos", "synthetic"], {"--contact-sheet": "file.txt/a.png"}),
    ("evaluate_pipeline", ["nowhere"], {"--record": "folder.mp4"}),
    ("compare_budgets", ["--tokenizer", "nowhere", "--videos", "synthetic"], {"--out": "file.txt"}),
    ("compare_budgets", ["--tokenizer", "nowhere", "--videos", "synthetic", "--out", "b"], {"--record": "folder.mp4"}),
    ("publish", ["pipeline", "nowhere", "--tokenizer", "nowhere"], {"--out": "file.txt"}),
    ("publish", ["pipeline", "nowhere", "--tokenizer", "nowhere", "--out", "b"], {"--record": "folder.mp4"}),
    ("prepare_clips", ["nowhere"], {"--out": "file.txt/a.jsonl"}),
    ("prepare_clips", ["nowhere", "--out", "a.jsonl"], {"--report": "folder.mp4", "--cut": "file.txt"}),
    ("shards", ["index", "nowhere.tar"], {"--out": "file.txt/a.jsonl"}),
    ("curves", ["plot", "a=nowhere", "--keys", "loss"], {"--out": "folder.mp4"}),
    ("demo", ["--config", "demo"], {"--record": "folder.mp4"}),
    ("experiments.draft_and_refine", ["nowhere"], {"--record": "folder.mp4", "--contact-sheet": "file.txt/a.png"}),
    ("benchmarks.long_video", ["nowhere"], {"--record": "folder.mp4"}),
    ("benchmarks.speed", ["tokenizer"], {"--record": "folder.mp4"}),
    ("benchmarks.memory", ["nowhere"], {"--record": "folder.mp4"}),
    ("benchmarks.existing", ["--autoencoders"], {"--record": "folder.mp4"}),
    ("benchmarks.clip_index", [], {"--record": "folder.mp4"}),
    ("benchmarks.films", [], {"--record": "folder.mp4"}),
]


@pytest.mark.parametrize(("command", "words", "files"), WRITES, ids=lambda value: value if isinstance(value, str) else "")
def test_commands_refuse_unwritable_files_before_they_load_anything(here, command, words, files):
    main = importlib.import_module(f"promag.scripts.{command}").main
    for option, path in files.items():
        with pytest.raises(UserError, match=f"^{option} {path}.*: cannot be written: "):
            main([*words, option, path])
    assert sorted(os.listdir()) == ["file.txt", "folder.mp4"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("reconstruct", ["nowhere", "USED.mp4", "--out", "USED.mp4"]),
        ("sample", ["nowhere", "--prompt", "a", "--video", "USED.mp4", "--out", "USED.mp4"]),
        ("sample", ["nowhere", "--prompt", "a", "--image", "USED.gif", "--out", "USED.gif"]),
        ("sample", ["nowhere", "--prompt", "a", "--seed", "1", "2", "--video", "USED-01.mp4", "--out", "USED.mp4"]),
        ("sample", ["nowhere", "--prompt", "a", "--out", "USED.mp4", "--grid", "USED.mp4"]),
        ("prepare_clips", ["USED.jsonl", "--out", "USED.jsonl"]),
        ("evaluate_tokenizer", ["nowhere", "--videos", "USED.csv", "--out", "USED.csv"]),
        ("publish", ["pipeline", "USED/pipeline", "--tokenizer", "nowhere", "--out", "USED"]),
    ],
)
def test_commands_refuse_to_overwrite_their_inputs(here, command, words):
    main = importlib.import_module(f"promag.scripts.{command}").main
    with pytest.raises(UserError, match=r"^--(out|grid) USED.*: would overwrite USED.*, which this command uses too"):
        main(words)


def test_an_index_has_the_ending_that_training_reads(here):
    with pytest.raises(UserError, match=r"--out clips\.json: a file that ends in \.jsonl is needed, which training reads"):
        prepare_clips.main(["nowhere", "--out", "clips.json"])


@pytest.mark.parametrize("make", [make_pipeline, lambda: StockPipeline(make_stock())], ids=["ours", "stock"])
def test_adapters_of_a_training_change_a_pipelines_transformer(tmp_path, make):
    trained, pipe = make(), make()
    targets = ["to_q", "to_out.0"]
    trained.transformer.add_adapter(LoraConfig(r=2, lora_alpha=3.0, target_modules=targets, init_lora_weights=False))
    SavedLora(trained.transformer).save_pretrained(tmp_path / "lora")
    assert load_lora(pipe, tmp_path / "lora") == trained_ratios(pipe)
    state, loaded = (
        {name.replace(".default_0.", ".default."): value for name, value in part.transformer.state_dict().items()}
        for part in (trained, pipe)
    )
    assert state.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items() if "lora_" in name)


NAMINGS = {
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "ComfyUI, diffusers' layers": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "ComfyUI, Wan's layers": ("diffusion_model.{wan}.lora_A.weight", "diffusion_model.{wan}.lora_B.weight"),
    "kohya": ("lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.lora_up.weight"),
}


@pytest.mark.parametrize("names", NAMINGS.values(), ids=list(NAMINGS))
def test_a_wan_pipeline_takes_adapters_in_every_naming(tmp_path, names):
    pipe = StockPipeline(make_stock())
    layers = {f"blocks.{i}.attn1.to_{part}": f"blocks.{i}.self_attn.{part}" for i in range(2) for part in "qkv"}
    width = pipe.transformer.get_submodule("blocks.0.attn1.to_q").in_features
    weights, places = {}, {}
    for layer, wan in layers.items():
        for end, shape, name in zip("AB", ((2, width), (width, 2)), names, strict=True):
            value = weights[name.format(layer, wan=wan, flat=layer.replace(".", "_"))] = torch.randn(shape)
            places[f"{layer}.lora_{end}"] = value
    save_file(weights, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    load_lora(pipe, tmp_path)
    state = {name.replace(".default_0.weight", ""): value for name, value in pipe.transformer.state_dict().items()}
    assert {name for name in state if "lora_" in name} == places.keys()
    assert all(torch.equal(state[name], value) for name, value in places.items())
    scale = pipe.transformer.get_submodule("blocks.0.attn1.to_q").scaling["default_0"]
    assert scale == (2 if names == NAMINGS["peft"] else 1)


def test_adapters_for_a_wan_pipeline_of_which_a_tensor_fits_nowhere_are_refused_by_its_name(tmp_path):
    pipe = StockPipeline(make_stock())
    for names in NAMINGS.values():
        weights = {
            name.format(layer, wan=layer, flat=layer.replace(".", "_")): torch.randn(2, 2)
            for layer in ("blocks.0.attn1.to_q", "blocks.0.attn1.to_nowhere")
            for name in names
        }
        save_file(weights, tmp_path / "adapters.safetensors")
        with pytest.raises(UserError, match=r"tensors fit no layer of this transformer \(.*nowhere"):
            load_lora(pipe, tmp_path)
        assert not any("lora_" in name for name in pipe.transformer.state_dict())


@pytest.mark.parametrize("make", [make_pipeline, lambda: StockPipeline(make_stock())], ids=["ours", "stock"])
def test_folders_without_fitting_adapters_are_named(tmp_path, make):
    pipe = make()
    with pytest.raises(UserError, match=r"--lora .*run: no adapters there; give the folder `lora` of"):
        load_lora(pipe, tmp_path / "run")
    for name in ("a", "b"):
        save_file({"transformer.nothing.lora_A.weight": torch.zeros(2, 2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"--lora .*: holds a\.safetensors, b\.safetensors; name one of these files"):
        load_lora(pipe, tmp_path)
    with pytest.raises(
        UserError, match=r"--lora .*a\.safetensors: .* 1 of its 1 tensors fit no layer of this transformer"
    ) as e:
        load_lora(pipe, tmp_path / "a.safetensors")
    assert "\n" not in str(e.value)


def test_stock_adapters_of_a_larger_transformer_are_refused_whole(tmp_path):
    larger = make_transformer(num_layers=3)
    larger.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    SavedLora(larger).save_pretrained(tmp_path)
    pipe = StockPipeline(make_stock())
    with pytest.raises(
        UserError, match=r"4 of its 12 tensors fit no layer of this transformer \(transformer\.blocks\.2\.attn1"
    ):
        load_lora(pipe, tmp_path)
    assert not any("lora_" in name for name in pipe.transformer.state_dict())


def save_adapters(make, folder, ratios, **steps):
    trained = make()
    trained.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    SavedLora(trained.transformer, {"temporal_ratios": ratios, **steps}).save_pretrained(folder)


def test_a_stock_pipeline_samples_at_the_ratios_of_its_adapters(tmp_path):
    save_adapters(make_stock, tmp_path, (16, 32))
    with pytest.raises(UserError, match=r"trained at 16x, 32x; this pipeline samples at 4x; .* by --tokenizer"):
        load_lora(StockPipeline(make_stock()), tmp_path)
    pipe = StockPipeline(make_stock(vae=make_grown(4)))
    load_lora(pipe, tmp_path)
    assert (pipe.temporal_ratios, pipe.config["temporal_ratio"]) == ((16, 32), 16)
    with pytest.raises(ValueError, match="temporal ratio 4: this tokenizer has 16x, 32x"):
        pipe("a red disc", temporal_ratio=4)


def test_our_pipeline_samples_by_default_at_the_ratio_of_its_adapters(tmp_path):
    save_adapters(make_pipeline, tmp_path / "own", (4,))
    pipe = make_pipeline()
    assert pipe.config["temporal_ratio"] == 16
    assert load_lora(pipe, tmp_path / "own") == [4]
    assert pipe.config["temporal_ratio"] == 4
    save_adapters(make_pipeline, tmp_path / "other", (8,))
    with pytest.raises(UserError, match=r"trained at 8x; this pipeline samples at 4x, 16x; name the pipeline they are for"):
        load_lora(make_pipeline(), tmp_path / "other")


def test_our_pipeline_samples_by_default_in_the_few_steps_of_its_adapters(tmp_path):
    save_adapters(make_pipeline, tmp_path, (16,), num_inference_steps=3, guidance_scale=1.0)
    pipe = make_pipeline()
    load_lora(pipe, tmp_path)
    pipe("a red disc", num_frames=17, height=32, width=32)
    assert (pipe.num_timesteps, pipe.guidance_scale) == (3, 1.0)
