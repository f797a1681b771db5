"""Conversion against the dense checkpoint: read as plain tensors, and through the models."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import (
    FAMILY_NAMES,
    GLU_MODELS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    edit_config,
    save_dense,
    save_prunepath,
    split_gate_up,
)
from torch import Tensor

from prunepath_vllm.checkpoint import INDEX_FILE, WEIGHTS_FILE, read_tensor_index, stream_tensors, validate_checkpoint
from prunepath_vllm.conversion import writing
from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.conversion.model_card import write_model_card
from prunepath_vllm.conversion.rewrite import rewrite_checkpoint
from prunepath_vllm.entrypoints import cli
from prunepath_vllm.errors import UsageError
from prunepath_vllm.families import FAMILIES
from prunepath_vllm.training.adapter import neuron_order

EXPERTS = INTERMEDIATE // 32

FFN = {
    **dict.fromkeys(GLU_MODELS, ("model.layers.{}.mlp", ["gate_proj", "up_proj"], "down_proj")),
    "gpt2": ("transformer.h.{}.mlp", ["c_fc"], "c_proj"),
    "roberta": ("roberta.encoder.layer.{}", ["intermediate.dense"], "output.dense"),
}
"""Spelled out here rather than taken from the package's table."""


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stream_tensors(path, read_tensor_index(path))}


def neurons(family: str, tensors: dict[str, Tensor], layer: int) -> Tensor:
    """[neurons, everything one neuron has]: input rows, biases, output column."""
    module, inputs, output = FFN[family]
    columns = []
    for name in (f"{module.format(layer)}.{linear}" for linear in inputs):
        weight = tensors[f"{name}.weight"]
        columns.append(weight.T if family == "gpt2" else weight)
        if f"{name}.bias" in tensors:
            columns.append(tensors[f"{name}.bias"][:, None])
    weight = tensors[f"{module.format(layer)}.{output}.weight"]
    columns.append(weight if family == "gpt2" else weight.T)
    return torch.cat(columns, dim=1)


def order(family: str, dense: dict[str, Tensor], converted: dict[str, Tensor], layer: int) -> Tensor:
    """The dense position of each converted neuron, by its first input weights."""
    before, after = (neurons(family, tensors, layer)[:, :HIDDEN] for tensors in (dense, converted))
    return (after[:, None] == before[None]).all(dim=2).float().argmax(dim=1)


def logits(path: Path, auto_class: str, **kwargs) -> Tensor:
    # Eager attention: the default one leaves out the cap that the dense Gemma 2 puts on scores.
    options: dict = dict(dtype=torch.float32, attn_implementation="eager")
    model = getattr(transformers, auto_class).from_pretrained(path, **options).eval()
    ids = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("split", ["kmeans", "coactivation", "random"])
def test_converted_neurons_are_the_dense_ones_permuted(family, split, dense_checkpoint, own_text, tmp_path):
    source = dense_checkpoint(family)
    path = convert(
        source, tmp_path / "out", split=split, calibration_text=own_text if split == "coactivation" else None, seed=3
    )
    dense, converted = split_gate_up(tensors_of(source)), tensors_of(path)
    row = next(row for row in FAMILIES if row.name == family)
    routers = {f"{row.router(layer)}.weight" for layer in range(LAYERS)}
    assert set(converted) == set(dense) | routers
    if split == "random":
        assert [o.tolist() for o in neuron_order(source, path)] == [
            order(family, dense, converted, layer).tolist() for layer in range(LAYERS)
        ]
    orders = []
    for layer in range(LAYERS):
        found = order(family, dense, converted, layer)
        assert torch.equal(found.sort().values, torch.arange(INTERMEDIATE))
        assert torch.equal(neurons(family, converted, layer), neurons(family, dense, layer)[found])
        assert torch.equal(converted[f"{row.router(layer)}.weight"], torch.zeros(EXPERTS, HIDDEN))
        orders.append(found)
    assert not torch.equal(orders[0], orders[1])
    module, inputs, output = FFN[family]
    moved = {f"{module.format(layer)}.{linear}" for layer in range(LAYERS) for linear in (*inputs, output)}
    for name in dense:
        linear, _, kind = name.rpartition(".")
        if linear not in moved or (linear.endswith(output) and kind == "bias"):
            assert torch.equal(converted[name], dense[name]), name


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
def test_tau_one_gives_the_dense_logits(family, gate, dense_checkpoint, tmp_path):
    from prunepath_vllm.modeling import register_auto_classes

    register_auto_classes()
    row = next(row for row in FAMILIES if row.name == family)
    path = convert(dense_checkpoint(family), tmp_path / "out", gate=gate)
    torch.testing.assert_close(
        logits(path, row.auto_class, tau=1.0), logits(dense_checkpoint(family), row.auto_class), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_sigmoid_gate_doubles_the_second_linear_exactly(dtype, tmp_path):
    source = save_dense("gpt2", tmp_path / "dense", dtype=dtype)
    plain, gated = (tensors_of(convert(source, tmp_path / gate, gate=gate)) for gate in ("none", "sigmoid"))
    doubled = {f"transformer.h.{layer}.mlp.c_proj.weight" for layer in range(LAYERS)}
    for name, tensor in plain.items():
        assert gated[name].dtype == dtype
        assert torch.equal(gated[name], 2 * tensor if name in doubled else tensor), name


def test_deterministic_for_a_seed_and_seeds_differ(dense_checkpoint, tmp_path):
    for split in ("kmeans", "random"):
        first, again, other = (
            (convert(dense_checkpoint("llama"), tmp_path / f"{split}{number}", split=split, seed=seed) / WEIGHTS_FILE)
            for number, seed in enumerate((1, 1, 2))
        )
        assert first.read_bytes() == again.read_bytes()
        assert first.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("split", ["kmeans", "coactivation"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_split_recovers_planted_experts(family, split, own_text, tmp_path):
    """Neurons copied from a few, shuffled: each expert must consist of copies of one."""
    source = save_dense(family, tmp_path / "dense")
    tensors = tensors_of(source)
    planted = torch.arange(INTERMEDIATE)[torch.randperm(INTERMEDIATE, generator=torch.Generator().manual_seed(0))] % 8
    module, inputs, _ = FFN[family]
    for layer in range(LAYERS):
        for linear in inputs:
            for name in (f"{module.format(layer)}.{linear}.weight", f"{module.format(layer)}.{linear}.bias"):
                if name in tensors:
                    tensors[name] = tensors[name][..., planted] if family == "gpt2" else tensors[name][planted]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, source / WEIGHTS_FILE)
    path = convert(
        source, tmp_path / "out", split=split, calibration_text=own_text if split == "coactivation" else None
    )
    converted = tensors_of(path)
    for layer in range(LAYERS):
        weight = converted[f"{module.format(layer)}.{inputs[0]}.weight"]
        experts = (weight.T if family == "gpt2" else weight).view(EXPERTS, 32, HIDDEN)
        assert torch.equal(experts, experts[:, :1].expand_as(experts))


def test_config_and_files_of_the_result(own_llama, tmp_path):
    edit_config(own_llama, auto_map={"AutoModel": "evil.py"}, _name_or_path="/somewhere/private", custom=[1])
    for name in ("evil.py", "pytorch_model.bin", "optimizer.pt", "model.safetensors.index.json.bak"):
        (own_llama / name).write_text("x")
    (own_llama / "merges.txt").write_text("m")
    point = dict(tau=None, ffn_sparsity=0.0, loss=1.0, perplexity=2.7, accuracy=None)
    (own_llama / "quality.json").write_text(json.dumps(dict(data="valid.txt", points=[point])))  # of a dense training
    path = convert(own_llama, tmp_path / "deep" / "out", expert_size=16)
    dense, config = (json.loads((directory / "config.json").read_text()) for directory in (own_llama, path))
    assert config.pop("prunepath_config") == {
        "format_version": 1,
        "num_experts": 16,
        "expert_size": 16,
        "selection": "cumulative_mass",
        "threshold": None,
        "gate": "none",
        "dense_positions": 0,
        "default_tau": 1.0,
        "tau_curve": None,
        "split": {"method": "kmeans", "seed": 0, "source": "weights"},
        "base_model": "dense",
    }
    del dense["auto_map"], dense["_name_or_path"]
    assert config == dense | {"architectures": ["PrunePathLlamaForCausalLM"], "model_type": "prunepath_llama"}
    names = {file.name for file in path.iterdir()}
    assert {"merges.txt", "tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"} <= names
    assert not names & {"evil.py", "pytorch_model.bin", "optimizer.pt", "quality.json"}
    assert (path / WEIGHTS_FILE).stat().st_mode == (path / "config.json").stat().st_mode


def test_gpt2_of_the_bare_backbone_is_renamed(tmp_path):
    source = save_dense("gpt2", tmp_path / "dense")
    whole = tensors_of(convert(source, tmp_path / "whole"))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(source).items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 512, 512).bool()
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, source / WEIGHTS_FILE)
    renamed = tensors_of(convert(source, tmp_path / "renamed"))
    assert set(renamed) == set(whole)
    assert all(torch.equal(renamed[name], whole[name]) for name in whole)


def test_llama_with_feed_forward_biases(tmp_path):
    from prunepath_vllm.modeling import register_auto_classes

    register_auto_classes()
    source = save_dense("llama", tmp_path / "dense", mlp_bias=True)
    path = convert(source, tmp_path / "out")
    torch.testing.assert_close(
        logits(path, "AutoModelForCausalLM", tau=1.0), logits(source, "AutoModelForCausalLM"), atol=1e-3, rtol=0
    )


def test_shards_in_and_out(dense_checkpoint, tmp_path, monkeypatch):
    """A layer's tensors lie in different source shards; the result is sharded and the same."""
    source = save_dense("qwen2", tmp_path / "dense")
    single = tensors_of(convert(source, tmp_path / "single"))
    tensors = tensors_of(source)
    (source / WEIGHTS_FILE).unlink()
    weight_map = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, source / file)
    (source / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    limit = 200_000
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", limit)
    path = convert(source, tmp_path / "sharded")
    summary = validate_checkpoint(path, check_values=True)
    files = {info.file for info in summary.tensors.values()}
    assert files == {f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)}
    assert len(files) > 2
    for file in files:
        shard = load_file(path / file)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= limit
    sharded = tensors_of(path)
    assert set(sharded) == set(single)
    assert all(torch.equal(sharded[name], single[name]) for name in single)
    total = json.loads((path / INDEX_FILE).read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in single.values())


def test_peak_memory_is_bounded_by_shards_not_by_the_model(tmp_path):
    """151 MB of weights in 8 MB shards; the peak may grow by a third of them (without streaming: by all, or twice)."""
    script = """
        import json, resource, sys
        from pathlib import Path
        import torch
        from safetensors.torch import save_file
        from prunepath_vllm.conversion import writing
        from prunepath_vllm.conversion.convert import convert
        from prunepath_vllm.conversion.dense_model import dense_tensors
        from prunepath_vllm.families import family_of

        source, layers, hidden, ffn = Path(sys.argv[1]), 24, 256, 2048
        source.mkdir()
        config = dict(
            architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=hidden, intermediate_size=ffn,
            num_hidden_layers=layers, vocab_size=64, tie_word_embeddings=True, num_attention_heads=1, head_dim=8)
        (source / "config.json").write_text(json.dumps(config))
        whole, _ = dense_tensors(family_of(config, converted=False), config)
        others = {name: torch.zeros(info.shape) for name, info in whole.items() if ".mlp." not in name}
        weight_map = dict.fromkeys(others, "e.safetensors")
        save_file(others, source / "e.safetensors")
        for layer in range(layers):
            for name, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn))):
                tensor = f"model.layers.{layer}.mlp.{name}_proj.weight"
                weight_map[tensor] = f"{name}-{layer}.safetensors"
                save_file({tensor: torch.randn(shape)}, source / weight_map[tensor])
        (source / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
        writing.MAX_SHARD_BYTES = 8_000_000
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        convert(source, sys.argv[2], split="random")
        print((peak() - before) * 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "dense"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 50_000_000
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 15


def test_result_appears_whole_or_not_at_all(own_llama, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(writing, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(own_llama, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_a_snapshot_of_the_hub_cache_has_its_models_name(own_llama, tmp_path):
    for folder, name in (("models--owner--My--Model", "owner/My--Model"), ("models--gpt2", "gpt2")):
        snapshot = tmp_path / folder / "snapshots" / "0123abcd"
        snapshot.parent.mkdir(parents=True)
        shutil.copytree(own_llama, snapshot)
        link = tmp_path / f"link to {folder}"
        link.symlink_to(snapshot)
        for number, source in enumerate((snapshot, link)):
            path = convert(source, tmp_path / f"{folder} {number}", split="random")
            assert validate_checkpoint(path).prunepath.base_model == name


def test_additional_chat_templates_are_copied(own_llama, tmp_path):
    templates = own_llama / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ tools }}")
    (templates / "evil.py").write_text("x")
    path = convert(own_llama, tmp_path / "out", split="random")
    assert [file.name for file in (path / templates.name).iterdir()] == ["tool_use.jinja"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template["tool_use"] == "{{ tools }}"


def test_a_volume_and_a_link_are_taken_as_destinations(own_llama, tmp_path):
    """An empty volume: files are written in it and it stays; here a bind mount where this user may make one."""
    volume, disk, link = (tmp_path / name for name in ("volume", "disk", "link"))
    volume.mkdir()
    disk.mkdir()
    link.symlink_to(disk)
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "none", volume], capture_output=True).returncode
    try:
        for place in (volume, link):
            convert(own_llama, place, split="random")
            summary = validate_checkpoint(place)
            rewrite_checkpoint(summary, {}, default_tau=0.7)
            assert validate_checkpoint(place, check_values=True).prunepath.default_tau == 0.7
            assert not [file.name for file in place.iterdir() if file.name.startswith(".")]
        assert link.is_symlink()
        assert volume.is_mount() == mounted
    finally:
        if mounted:
            subprocess.run(["umount", volume], check=True)


def test_hub_name(own_llama, tmp_path, monkeypatch):
    seen = {}

    def download(name, allow_patterns):
        seen[name] = allow_patterns
        return str(own_llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    path = convert("owner/Model-1.5B", tmp_path / "out", split="random")
    assert validate_checkpoint(path).prunepath.base_model == "owner/Model-1.5B"
    assert not any(pattern == "*" or "bin" in pattern or ".pt" in pattern for pattern in seen["owner/Model-1.5B"])

    def unreachable(name, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UsageError, match=r"owner/x: no such directory.*no network"):
        convert("owner/x", tmp_path / "other")
    with pytest.raises(UsageError, match="no such directory"):
        convert("./typo/in/path", tmp_path / "other")


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
def test_calibrated_routers(gate, dense_checkpoint, own_text, tmp_path):
    from prunepath_vllm.modeling import register_auto_classes

    register_auto_classes()
    own_text.write_text(own_text.read_text() * 4)
    options = dict(router="calibrated", gate=gate, dense_positions=1, calibration_text=own_text)
    path = convert(dense_checkpoint("llama"), tmp_path / "out", **options)
    summary = validate_checkpoint(path, check_values=True)
    assert summary.prunepath.tau_curve
    assert summary.prunepath.dense_positions == 1
    routers = [f"model.layers.{layer}.mlp.router.weight" for layer in range(LAYERS)]
    assert all(tensor.any() for _, tensor in stream_tensors(path, summary.tensors, routers))
    assert {file.name for file in tmp_path.iterdir()} == {"out", own_text.name}
    torch.testing.assert_close(
        logits(path, "AutoModelForCausalLM", tau=1.0),
        logits(dense_checkpoint("llama"), "AutoModelForCausalLM"),
        atol=1e-3,
        rtol=0,
    )


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_model_card(family, tmp_path):
    path = save_prunepath(family, tmp_path / family)
    card = write_model_card(path).read_text()
    assert card.startswith(f'---\nlibrary_name: prunepath-vllm\nbase_model: "tiny-{family}"\n')
    for word in ("8 of 32 neurons", "Not measured", "prunepath serve", "tau", "## Limits"):
        assert word in card
    edit_config(path, prunepath_config=validate_checkpoint(path).prunepath.to_json() | {"tau_curve": [[0.5, 0.75]]})
    card = write_model_card(path).read_text()
    assert "| 0.5 | 75.0% |" in card
    assert "Not measured" not in card


def test_command_converts(dense_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["convert", str(dense_checkpoint("gpt2")), str(out), "--expert-size", "16", "--seed", "4"]) == 0
    assert str(out) in capsys.readouterr().out
    prunepath = validate_checkpoint(out).prunepath
    assert (prunepath.expert_size, prunepath.split.seed, prunepath.gate) == (16, 4, "none")
