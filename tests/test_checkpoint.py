"""Validation of checkpoint directories: what is right passes, each thing that is wrong gives one clear error."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_NAMES, HIDDEN, INTERMEDIATE, LAYERS, save_prunepath

from prunepath_vllm.checkpoint import (
    INDEX_FILE,
    WEIGHTS_FILE,
    check_finite,
    load_prunepath_config,
    read_tensor_index,
    validate_checkpoint,
)
from prunepath_vllm.entrypoints import cli
from prunepath_vllm.errors import CheckpointError, ConfigError, UsageError

GATE = "model.layers.1.mlp.gate_proj.weight"
ROUTER = "model.layers.1.mlp.router.weight"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_prunepath("llama", tmp_path / "llama")


def edit_config(path: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(path / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, path / WEIGHTS_FILE)


def shard(path: Path) -> dict[str, str]:
    """Split model.safetensors in two files with an index; return the weight map."""
    tensors = load_file(path / WEIGHTS_FILE)
    (path / WEIGHTS_FILE).unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"part-{number}.safetensors"
        save_file({name: tensors[name] for name in names}, path / file)
        weight_map |= dict.fromkeys(names, file)
    write_index(path, weight_map)
    return weight_map


def write_index(path: Path, weight_map: object) -> None:
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(path: Path, *words: str, kind: type = CheckpointError, check_values: bool = False) -> None:
    with pytest.raises(kind) as caught:
        validate_checkpoint(path, check_values=check_values)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("router_bias", [False, True], ids=["no-bias", "bias"])
def test_good_checkpoint_is_described(family, router_bias, tmp_path):
    path = save_prunepath(family, tmp_path / family, router_bias=router_bias)
    summary = validate_checkpoint(path, check_values=True)
    assert (summary.family.name, summary.router_bias) == (family, router_bias)
    assert (summary.num_layers, summary.hidden_size) == (LAYERS, HIDDEN)
    saved = load_file(path / WEIGHTS_FILE)
    assert {name: list(info.shape) for name, info in summary.tensors.items()} == {
        name: list(tensor.shape) for name, tensor in saved.items()
    }
    assert summary.tensors[summary.family.embedding].dtype == "F32"


def test_sharded_is_the_same_as_single(llama):
    single = {name: info.shape for name, info in validate_checkpoint(llama).tensors.items()}
    weight_map = shard(llama)
    summary = validate_checkpoint(llama, check_values=True)
    assert {name: info.shape for name, info in summary.tensors.items()} == single
    assert {name: info.file for name, info in summary.tensors.items()} == weight_map


@pytest.mark.parametrize(
    ("name", "expected"),
    [(ROUTER, f"[8, {HIDDEN}]"), (GATE, f"[{INTERMEDIATE}, {HIDDEN}]"), ("model.embed_tokens.weight", "[320, 64]")],
    ids=["router", "ffn", "embedding"],
)
def test_missing_and_misshaped_tensors(llama, name, expected):
    edit_tensors(llama, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    refused(llama, name, expected)
    edit_tensors(llama, lambda tensors: tensors.pop(name))
    refused(llama, name, "missing", expected)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.router.scale",
        "model.layers.1.mlp.gate_proj.bias",
        "model.layers.7.mlp.router.weight",
        "model.layers.0.mlp.experts.0.weight",
    ],
)
def test_unexpected_tensors(llama, name):
    edit_tensors(llama, lambda tensors: tensors.update({name: torch.zeros(8)}))
    refused(llama, name, "unexpected")


def test_unexpected_tensor_below_roberta_second_linear(tmp_path):
    path = save_prunepath("roberta", tmp_path / "roberta")
    name = "roberta.encoder.layer.0.output.dense.scale"
    edit_tensors(path, lambda tensors: tensors.update({name: torch.zeros(8)}))
    refused(path, name, "unexpected")


def test_router_bias_in_some_layers_only(llama):
    edit_tensors(llama, lambda tensors: tensors.update({"model.layers.2.mlp.router.bias": torch.zeros(8)}))
    refused(llama, "model.layers.0.mlp.router.bias", "every layer or in none")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", [ROUTER, "model.norm.weight"], ids=["router", "norm"])
def test_values_that_are_not_finite(llama, name, value):
    edit_tensors(llama, lambda tensors: tensors[name].view(-1)[3:5].fill_(value))
    validate_checkpoint(llama)  # headers only
    refused(llama, name, "2 of", "finite", check_values=True)


def test_check_finite_passes_numbers_and_integers():
    check_finite("x", torch.ones(3, dtype=torch.bfloat16))
    check_finite("x", torch.ones(3, dtype=torch.int64))
    with pytest.raises(CheckpointError, match="tensor x: 1 of 2"):
        check_finite("x", torch.tensor([1.0, float("nan")]))


def test_integer_weights(llama):
    edit_tensors(llama, lambda tensors: tensors.update({GATE: tensors[GATE].to(torch.int8)}))
    refused(llama, GATE, "I8", "BF16")


@pytest.mark.parametrize("keep", [0, 5, 300, -10], ids=["empty", "in-length", "in-header", "in-data"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_truncated_file(llama, keep, sharded):
    if sharded:
        shard(llama)
    file = sorted(llama.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:keep])
    refused(llama, file.name, "truncated")


def test_corrupt_header(llama):
    (llama / WEIGHTS_FILE).write_bytes(b"\x10\0\0\0\0\0\0\0" + b"not json at all!" * 8)
    refused(llama, WEIGHTS_FILE, "safetensors")


def test_missing_shard(llama):
    shard(llama)
    (llama / "part-1.safetensors").unlink()
    refused(llama, "part-1.safetensors", "no such file")


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", 3])
def test_index_that_points_elsewhere(llama, file):
    weight_map = shard(llama)
    (llama.parent / "outside.safetensors").write_bytes((llama / "part-0.safetensors").read_bytes())
    write_index(llama, weight_map | {GATE: file})
    refused(llama, GATE, repr(file), "same directory")


def test_index_that_disagrees_with_the_files(llama):
    weight_map = shard(llama)
    other = {"part-0.safetensors": "part-1.safetensors", "part-1.safetensors": "part-0.safetensors"}
    write_index(llama, weight_map | {GATE: other[weight_map[GATE]]})
    refused(llama, GATE)
    write_index(llama, weight_map | {"ghost.weight": "part-0.safetensors"})
    refused(llama, "ghost.weight", "missing")
    write_index(llama, [])
    refused(llama, "weight_map")


def test_weights_that_belong_to_nothing(llama):
    save_file({"x": torch.zeros(1)}, llama / "extra.safetensors")
    refused(llama, "extra.safetensors")


def test_single_file_and_index_at_once(llama):
    weights = (llama / WEIGHTS_FILE).read_bytes()
    shard(llama)
    (llama / WEIGHTS_FILE).write_bytes(weights)
    refused(llama, WEIGHTS_FILE, INDEX_FILE)


@pytest.mark.parametrize("pickle", [None, "pytorch_model.bin"])
def test_no_safetensors(llama, pickle):
    (llama / WEIGHTS_FILE).unlink()
    words = [WEIGHTS_FILE]
    if pickle:
        (llama / pickle).write_bytes(b"never opened")
        words += [pickle, "pickle"]
    refused(llama, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config["prunepath_config"].update(format_version=3), ["format_version", "3", "1 or 2"]),
        (lambda config: config["prunepath_config"].update(colour="red"), ["colour"]),
        (lambda config: config["prunepath_config"].update(expert_size=16), ["expert_size 16", "128", "256"]),
        (lambda config: config["prunepath_config"].pop("gate"), ["gate"]),
        (lambda config: config.pop("prunepath_config"), ["prunepath_config"]),
        (lambda config: config.update(model_type="llama"), ["llama", "prunepath_llama"]),
        (lambda config: config.update(architectures=["LlamaForCausalLM"]), ["PrunePathLlamaForCausalLM"]),
        (lambda config: config.update(num_hidden_layers="3"), ["num_hidden_layers"]),
        (lambda config: config.update(vocab_size=None), ["vocab_size"]),
    ],
    ids=["version", "unknown-field", "expert-size", "no-gate", "no-block", "type", "class", "layers", "vocabulary"],
)
def test_configuration_that_does_not_hold(llama, change, words):
    edit_config(llama, change)
    refused(llama, "config.json", *words, kind=ConfigError)


def test_more_experts_than_the_routers_have(llama):
    edit_config(llama, lambda config: config["prunepath_config"].update(expert_size=16, num_experts=16))
    refused(llama, "model.layers.0.mlp.router.weight", "[8, 64]", "[16, 64]")


@pytest.mark.parametrize("content", [None, "{", "[]", b"\xff\xfe"], ids=["none", "cut", "list", "binary"])
def test_unreadable_config(llama, content):
    config = llama / "config.json"
    config.unlink()
    if content is not None:
        config.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(llama, "config.json")


def test_no_directory(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "directory", kind=UsageError)
    with pytest.raises(UsageError, match="nowhere"):
        load_prunepath_config(tmp_path / "nowhere")


def test_dense_directory_can_be_indexed(dense_checkpoint):
    assert GATE in read_tensor_index(dense_checkpoint("llama"))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_inspect_prints_a_narrow_table(family, tmp_path, capsys):
    curve = [[0.2 + 0.05 * step, 0.9 - 0.06 * step] for step in range(14)]
    path = save_prunepath(family, tmp_path / family, tau_curve=curve, router_bias=True)
    assert cli.main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    for word in (family, "8 per layer, 32 neurons", "fitted, with bias", "14 points", "90.0%", f"tiny-{family}"):
        assert word in out
    assert all(len(line) <= 80 for line in out.splitlines() if str(path) not in line)


def test_inspect_json_and_zero_routers(tmp_path, capsys):
    path = save_prunepath("gpt2", tmp_path / "gpt2", router_scale=0.0)
    assert cli.main(["inspect", str(path), "--json", "--output", str(tmp_path / "facts.json")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "facts.json").read_text()) == facts
    assert facts["routers"] == {"fitted": 0, "zero": LAYERS, "bias": False}
    assert (facts["num_experts"], facts["tau_curve"], facts["intermediate_size"]) == (8, None, INTERMEDIATE)
    assert facts["parameters"] == sum(tensor.numel() for tensor in load_file(path / WEIGHTS_FILE).values())


def test_inspect_fails_with_one_line(llama, capsys):
    edit_tensors(llama, lambda tensors: tensors[ROUTER].fill_(float("nan")))
    assert cli.main(["inspect", str(llama)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("prunepath inspect: ")
    assert ROUTER in err
    assert err.count("\n") == 1
