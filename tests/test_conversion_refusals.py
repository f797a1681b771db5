"""What conversion refuses, by name and before any work: sources, arguments, texts, destinations."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, INTERMEDIATE, edit_config, edit_tensors, save_dense, save_prunepath

import prunepath_vllm.conversion.convert as convert_module
import prunepath_vllm.conversion.splits as splits_module
from prunepath_vllm.checkpoint import WEIGHTS_FILE, read_tensor_index, validate_checkpoint
from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.entrypoints import cli
from prunepath_vllm.errors import CheckpointError, ConfigError, UsageError
from prunepath_vllm.training.run import train


def test_destination_in_use_is_refused_and_an_empty_one_taken(own_llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(own_llama, out)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    with pytest.raises(UsageError, match="out: already there"):
        convert(own_llama, out)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file: already there"):
        convert(own_llama, tmp_path / "file")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "opt", "architectures": ["OPTForCausalLM"]}, ["opt", "llama"]),
        ({"architectures": ["LlamaModel"]}, ["LlamaModel", "LlamaForCausalLM"]),
        ({"hidden_act": "relu2"}, ["hidden_act", "relu2", "silu"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
        ({"intermediate_size": 250}, ["expert_size 32", "250"]),
    ],
    ids=["family", "class", "activation", "quantised", "size"],
)
def test_models_that_cannot_be_converted(own_llama, tmp_path, fields, words):
    edit_config(own_llama, **fields)
    with pytest.raises(ConfigError) as caught:
        convert(own_llama, tmp_path / "out")
    assert all(word in str(caught.value) for word in [*words, str(own_llama)])
    assert not (tmp_path / "out").exists()


def test_converted_source_is_refused(tmp_path):
    source = save_prunepath("llama", tmp_path / "converted")
    with pytest.raises(ConfigError, match="already a PrunePath checkpoint"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(INTERMEDIATE, HIDDEN + 1), ["shape", "[256, 64]"]),
        (torch.full((INTERMEDIATE, HIDDEN), float("nan")), ["NaN", "finite"]),
        (torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.int8), ["I8"]),
    ],
    ids=["shape", "nan", "dtype"],
)
def test_sources_with_bad_tensors(own_llama, tmp_path, tensor, words):
    name = "model.layers.2.mlp.up_proj.weight"
    edit_tensors(own_llama, **{name: tensor})
    with pytest.raises(CheckpointError) as caught:
        convert(own_llama, tmp_path / "out", split="random")
    assert all(word in str(caught.value) for word in [name, *words])
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "roberta"])
def test_every_tensor_of_the_source_is_checked_before_any_work(family, tmp_path, monkeypatch):
    source = save_dense(family, tmp_path / "dense")
    name = next(name for name in read_tensor_index(source) if "norm" in name.lower() or "ln_1" in name)
    right = load_file(source / WEIGHTS_FILE)
    monkeypatch.setattr(convert_module, "neuron_orders", lambda *_, **__: pytest.fail("work began"))
    for tensors, words in (
        ({key: tensor for key, tensor in right.items() if key != name}, f"tensor {name} is missing"),
        (right | {name: torch.zeros(3)}, rf"tensor {name} has shape \[3\]; expected \[64\]"),
        (right | {"model.layers.9.x.weight": torch.zeros(3)}, r"tensor \S*model\.layers\.9\.x\.weight is unexpected"),
    ):
        save_file(tensors, source / WEIGHTS_FILE)
        with pytest.raises(CheckpointError, match=words):
            convert(source, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("change", [dict(_attn_implementation="flash_attention_2"), dict(pad_token_id=10**6)])
def test_settings_that_no_tensor_depends_on_do_not_matter(own_llama, tmp_path, change):
    edit_config(own_llama, **change)
    convert(own_llama, tmp_path / "out", split="random")
    validate_checkpoint(tmp_path / "out", check_values=True)


def test_a_configuration_of_no_model_is_named(own_llama, tmp_path):
    edit_config(own_llama, rms_norm_eps=[])
    with pytest.raises(ConfigError, match=r"dense: transformers builds no LlamaForCausalLM of config\.json \("):
        convert(own_llama, tmp_path / "out")


def test_a_source_with_an_adapter_is_refused(own_llama, tmp_path):
    (own_llama / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is there"):
        convert(own_llama, tmp_path / "out")


def test_weights_that_doubled_leave_float16_are_named(tmp_path):
    source = save_dense("llama", tmp_path / "dense", dtype=torch.float16)
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(source, **{name: torch.full((HIDDEN, INTERMEDIATE), 4e4, dtype=torch.float16)})
    with pytest.raises(CheckpointError, match=f"{name}, doubled for the sigmoid gate: 16384 of 16384 values"):
        convert(source, tmp_path / "out", split="random", gate="sigmoid")
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_pickle_only_source(own_llama, tmp_path):
    (own_llama / WEIGHTS_FILE).rename(own_llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle"):
        convert(own_llama, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "coactivation"}, "coactivation needs a calibration text"),
        ({"router": "calibrated"}, "calibrated needs a calibration text"),
        ({"calibration_text": "x.txt"}, "uses none"),
        ({"split": "coactivation", "calibration_text": "x.txt"}, r"x\.txt: no such file"),
        ({"expert_size": 0}, "expert size: 0"),
        ({"dense_positions": -1}, "dense positions: -1; expected 0 or more"),
        ({"split": "best"}, "'best'; expected one of kmeans"),
        ({"device": "cuda"}, "no CUDA GPU"),
    ],
)
def test_arguments_that_make_no_sense(own_llama, tmp_path, options, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=words):
        convert(own_llama, tmp_path / "out", **options)


@pytest.mark.parametrize("options", [dict(split="coactivation"), dict(router="calibrated")], ids=["split", "router"])
@pytest.mark.parametrize(
    ("content", "words"),
    [(b"short", "5 tokens"), (b"", "0 tokens"), (b"\xff" * 50, "readable UTF-8")],
    ids=["short", "empty", "binary"],
)
def test_bad_calibration_texts_are_refused_before_any_work(
    own_llama, tmp_path, own_text, monkeypatch, options, content, words
):
    monkeypatch.setattr(splits_module, "balanced_kmeans", None)
    own_text.write_bytes(content)
    with pytest.raises(UsageError, match=rf"calibration\.txt: .*{words}"):
        convert(own_llama, tmp_path / "out", calibration_text=own_text, **options)
    assert {file.name for file in tmp_path.iterdir()} == {"dense", own_text.name}


def test_more_dense_positions_than_a_sequence_has_are_refused_before_any_work(
    own_llama, tmp_path, own_text, monkeypatch
):
    monkeypatch.setattr(splits_module, "balanced_kmeans", None)
    own_text.write_text(own_text.read_text() * 4)
    with pytest.raises(UsageError, match=r"dense positions: 512; expected fewer than \d+, a sequence's tokens"):
        convert(own_llama, tmp_path / "out", router="calibrated", dense_positions=512, calibration_text=own_text)
    assert not (tmp_path / "out").exists()


def test_destinations_that_cannot_be_made_are_refused_before_any_work(own_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "neuron_orders", None)
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(UsageError, match=f"{place}: cannot be written"):
            convert(own_llama, place)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("llama", "lm_head.weight", "[320, 64]"),
        ("gpt2", "lm_head.weight", "[320, 64]"),
        ("roberta", "classifier.out_proj.weight", "[3, 64]"),
        ("roberta", "classifier.dense.bias", "[64]"),
    ],
)
def test_a_missing_head_is_refused_by_name(family, name, shape, tmp_path):
    """The same for a checkpoint that lost it after its conversion; `inspect` says so, too."""
    untied = dict(tie_word_embeddings=False) if family == "gpt2" else {}
    source = save_dense(family, tmp_path / "dense", **untied)
    path = convert(source, tmp_path / "whole", split="random")
    for place in (source, path):
        tensors = load_file(place / WEIGHTS_FILE)
        del tensors[name]
        save_file(tensors, place / WEIGHTS_FILE)
    said = re.escape(f"tensor {name} is missing; expected shape {shape}")
    with pytest.raises(CheckpointError, match=said):
        convert(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match=said):
        validate_checkpoint(path)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["SRC", "USED"], 2),
        (["SRC", "OUT", "--split", "coactivation"], 2),
        (["SRC", "OUT", "--router", "calibrated"], 2),
        (["SRC", "OUT", "--expert-size", "-1"], 2),
        (["SRC", "OUT", "--expert-size", "48"], 1),
        (["EMPTY", "OUT"], 1),
    ],
    ids=["used", "no-text", "no-router-text", "negative", "indivisible", "no-model"],
)
def test_command_fails_with_one_line_and_a_code(arguments, code, dense_checkpoint, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    places = {name: str(tmp_path / name.lower()) for name in ("USED", "OUT", "EMPTY")}
    places["SRC"] = str(dense_checkpoint("llama"))
    capsys.readouterr()  # making the dense checkpoint shows a progress bar
    assert cli.main(["convert", *(places.get(argument, argument) for argument in arguments)]) == code
    err = capsys.readouterr().err
    assert err.startswith("prunepath convert: ")
    assert err.count("\n") == 1


def test_a_destination_in_the_snapshot_of_a_hub_name_is_refused(own_llama, tmp_path, monkeypatch, recipe):
    folder = tmp_path / "hub" / "models--owner--tiny"
    snapshot = folder / "snapshots" / "0a1b2c"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(snapshot.name)
    shutil.copytree(own_llama, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = sorted(folder.rglob("*"))
    named = re.escape(f"lies in {folder}, the cache of owner/tiny, which it would be made from")
    with pytest.raises(UsageError, match=named):
        convert("owner/tiny", snapshot / "converted", split="random")
    with pytest.raises(UsageError, match=named):
        train(recipe(output=str(snapshot), model=dict(path="owner/tiny")))
    assert sorted(folder.rglob("*")) == before
    convert("owner/tiny", tmp_path / "apart", split="random")
