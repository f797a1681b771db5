"""Loading and saving: round trips, and checkpoints that must be refused."""

import copy
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_NAMES, build_dense
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Tokenizer,
)

from prunepath_vllm.errors import CheckpointError, ConfigError
from prunepath_vllm.families import FAMILIES
from prunepath_vllm.modeling import modeling_glu, prunepath_config_of, register_auto_classes
from prunepath_vllm.modeling.configuration_glu import PrunePathLlamaConfig
from prunepath_vllm.modeling.modeling_glu import PrunePathLlamaForCausalLM
from prunepath_vllm.modeling.modeling_utils import checkpoint_directory

FAMILY = {family.name: family for family in FAMILIES}
CURVE = [[0.5, 0.7], [1.0, 0.0]]


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_auto_classes()


def load(path, family="llama", **kwargs):
    auto = AutoModelForSequenceClassification if family == "roberta" else AutoModelForCausalLM
    return auto.from_pretrained(path, **kwargs)


@pytest.fixture
def damaged(prunepath_checkpoint, tmp_path):
    """``damaged(change_tensors, change_config)``: a copy of the Llama checkpoint with its contents changed."""

    def make(change_tensors=None, change_config=None, family="llama"):
        path = tmp_path / "damaged"
        shutil.copytree(prunepath_checkpoint(family), path)
        if change_tensors:
            tensors = load_file(path / "model.safetensors")
            change_tensors(tensors)
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
        if change_config:
            config = json.loads((path / "config.json").read_text())
            change_config(config)
            (path / "config.json").write_text(json.dumps(config))
        return path

    return make


@pytest.mark.parametrize("router_bias", [False, True], ids=["", "router bias"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_save_and_load_again(prunepath_checkpoint, tmp_path, family, router_bias):
    source = prunepath_checkpoint(family, router_bias=router_bias, tau_curve=CURVE)
    model = load(source, family)
    assert type(model).__name__ == FAMILY[family].architecture
    model.save_pretrained(tmp_path / "once")
    saved, expected = load_file(tmp_path / "once/model.safetensors"), load_file(source / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert any(name.endswith("router.bias") for name in saved) == router_bias

    load(tmp_path / "once", family).save_pretrained(tmp_path / "twice")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    config = json.loads((tmp_path / "once/config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    for field in ("architectures", "model_type", "prunepath_config"):
        assert config[field] == original[field]
    generation_config = tmp_path / "once/generation_config.json"
    assert not generation_config.exists() or "router_bias" not in generation_config.read_text()


def test_sharded_checkpoints_load(prunepath_checkpoint, tmp_path):
    model = load(prunepath_checkpoint("llama", router_bias=True))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = load(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_config_keeps_the_dense_fields(prunepath_checkpoint, family):
    config = AutoConfig.from_pretrained(prunepath_checkpoint(family, tau_curve=CURVE))
    dense = build_dense(family).config
    assert type(config).__name__ == FAMILY[family].config_class.split(":")[1]
    assert config.model_type == FAMILY[family].model_type
    assert isinstance(config, type(dense))
    ours = config.to_dict()
    for field, value in dense.to_dict().items():
        if field not in ("architectures", "model_type", "_name_or_path"):
            assert ours[field] == value, field
    assert config.prunepath.num_experts == 8
    assert config.prunepath.tau_curve == [(0.5, 0.7), (1.0, 0.0)]
    assert prunepath_config_of(config) == config.prunepath
    assert config.base_model_tp_plan is None
    json.dumps(ours)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_config_survives_copies(prunepath_checkpoint, family, tmp_path):
    config = AutoConfig.from_pretrained(prunepath_checkpoint(family))
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(twin) is type(config)
        assert twin.to_dict() == config.to_dict()
        assert twin.prunepath == config.prunepath
    config.save_pretrained(tmp_path)
    once = (tmp_path / "config.json").read_bytes()
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == once


def test_a_model_can_be_built_from_a_config(prunepath_checkpoint):
    config = AutoConfig.from_pretrained(prunepath_checkpoint("gpt2"))
    model = AutoModelForCausalLM.from_config(config)
    assert all(block.mlp.router.weight.eq(0).all() for block in model.transformer.h)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_tokenizer_config_without_a_class_gets_the_dense_familys(prunepath_checkpoint, tmp_path):
    shutil.copytree(prunepath_checkpoint("gpt2"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), GPT2Tokenizer)


def test_another_number_of_labels_on_request(prunepath_checkpoint):
    path = prunepath_checkpoint("roberta")
    with pytest.raises(CheckpointError, match=r"classifier.out_proj.\w+: shape .*; expected \[5"):
        load(path, "roberta", num_labels=5)
    model = load(path, "roberta", num_labels=5, ignore_mismatched_sizes=True)
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 5)


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def poison(name, value):
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value)


ROUTER = "model.layers.1.mlp.router.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (remove(ROUTER), ROUTER),
        (remove("model.layers.2.mlp.down_proj.weight"), "model.layers.2.mlp.down_proj.weight"),
        (remove("model.norm.weight"), "model.norm.weight"),
        (remove("lm_head.weight"), "lm_head.weight"),
        (put("model.layers.0.mlp.router.scale", torch.ones(8)), "model.layers.0.mlp.router.scale"),
        (put("model.layers.0.mlp.router.bias", torch.ones(8)), "router.bias"),
        (put("model.extra.weight", torch.ones(2)), "model.extra.weight"),
        (put(ROUTER, torch.ones(4, 64)), ROUTER),
        (put("model.layers.1.mlp.up_proj.weight", torch.ones(128, 64)), "model.layers.1.mlp.up_proj.weight"),
        (put("model.layers.1.self_attn.q_proj.weight", torch.ones(64, 32)), "model.layers.1.self_attn.q_proj.weight"),
        (poison(ROUTER, float("nan")), ROUTER),
        (poison("model.layers.0.self_attn.o_proj.weight", float("inf")), "model.layers.0.self_attn.o_proj.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_tensor_is_named(damaged, change, named):
    with pytest.raises(CheckpointError) as caught:
        load(damaged(change))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickles_and_truncated_files_are_refused(damaged):
    path = damaged()
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(path)
    weights.unlink()
    torch.save({}, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(path)


def test_a_hub_name_is_checked_in_the_hubs_cache(monkeypatch, tmp_path):
    calls = []

    def download(name, **options):
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr("prunepath_vllm.modeling.modeling_utils.snapshot_download", download)
    assert checkpoint_directory("someone/model", dict(revision="v1", dtype="auto", token=None)) == tmp_path
    assert checkpoint_directory("someone/model", dict(subfolder="sub")) == tmp_path / "sub"
    patterns = ["*.json", "*.safetensors"]
    assert calls == [
        ("someone/model", dict(allow_patterns=patterns, revision="v1")),
        ("someone/model", dict(allow_patterns=patterns)),
    ]
    assert checkpoint_directory(tmp_path, {}) == tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("prunepath_config"), "prunepath_config: expected an object, got NoneType"),
        (lambda c: c.update(prunepath_config=[1]), "prunepath_config: expected an object, got list"),
        (lambda c: c["prunepath_config"].update(num_experts=7), "num_experts 7 .* 256"),
        (lambda c: c["prunepath_config"].update(format_version=3), "format_version: 3"),
        (lambda c: c["prunepath_config"].update(gate="relu"), "gate"),
        (lambda c: c["prunepath_config"].pop("split"), "split"),
        (lambda c: c["prunepath_config"].update(top_k=2), "top_k"),
    ],
    ids=["absent", "a list", "experts", "format", "gate", "no split", "unknown field"],
)
def test_a_bad_config_is_named(damaged, change, message):
    path = damaged(change_config=change)
    with pytest.raises(ConfigError, match=message):
        AutoConfig.from_pretrained(path)
    with pytest.raises(ConfigError, match=message):
        PrunePathLlamaForCausalLM.from_pretrained(path)


def test_cross_attention_is_refused(damaged):
    path = damaged(change_config=lambda c: c.update(add_cross_attention=True), family="gpt2")
    with pytest.raises(ConfigError, match="add_cross_attention: True; expected False"):
        load(path, "gpt2")


def test_a_config_without_the_block_builds_no_model():
    with pytest.raises(ConfigError, match="prunepath_config"):
        PrunePathLlamaForCausalLM(PrunePathLlamaConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64))


def test_registration_is_lazy_and_classes_made_from_rows_are_found_in_another_process():
    made = [modeling_glu.PrunePathGemma3TextModel, PrunePathLlamaForCausalLM, PrunePathLlamaConfig]
    code = f"""
import sys
import pickle
import prunepath_vllm.modeling as modeling
assert not {{"torch", "transformers"}} & set(sys.modules)
modeling.register_configs()
assert not any(name.startswith("prunepath_vllm.modeling.modeling_") for name in sys.modules)
assert "transformers.models.llama.modeling_llama" not in sys.modules
for made, name in zip(pickle.loads({pickle.dumps(made)!r}), {[one.__name__ for one in made]!r}, strict=True):
    assert made.__name__ == made.__qualname__ == name
    assert getattr(sys.modules[made.__module__], name) is made
    assert made.__doc__
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="PrunePathFalconForCausalLM"):
        _ = modeling_glu.PrunePathFalconForCausalLM
