"""openPangu-Embedded as published, at reduced width: converted as the Llama that it computes, its code not run."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import build_dense, build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunepath_vllm import register
from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.errors import ConfigError, UsageError

PUBLISHED = dict(
    architectures=["PanguEmbeddedForCausalLM"],
    auto_map={
        "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
        "AutoModel": "modeling_openpangu_dense.PanguEmbeddedModel",
        "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
    },
    bias=True,
    attention_dropout=0.0,
    model_type="PanguEmbedded",
    hidden_act="silu",
    rms_norm_eps=1e-05,
    rope_theta=16000000.0,
    tie_word_embeddings=False,
    torch_dtype="float32",
    use_cache=True,
)
"""Fields of openPangu-Embedded-7B's config.json besides its sizes."""
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@pytest.fixture
def pangu(tmp_path) -> tuple[Path, torch.nn.Module]:
    """The directory, and the Llama whose weights are in it."""
    rope = {"rope_type": "default", "rope_theta": 16e6}
    model = build_dense("llama", attention_bias=True, rms_norm_eps=1e-5, rope_parameters=rope)
    folder = tmp_path / "pangu"
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    config = model.config.to_dict()
    (folder / "config.json").write_text(json.dumps(PUBLISHED | {name: config[name] for name in SIZES}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= dict(
        tokenizer_class="PanguTokenizer", auto_map={"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("configuration_openpangu_dense", "modeling_openpangu_dense", "tokenization_openpangu"):
        (folder / f"{name}.py").write_text("raise SystemExit('remote code was run')\n")
    return folder, model


def test_it_computes_what_the_llama_does(pangu, tmp_path):
    folder, dense = pangu
    assert any(name.endswith("o_proj.bias") for name in dense.state_dict())
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 100)
    checkpoint = convert(folder, tmp_path / "out", expert_size=32, router="calibrated", calibration_text=text)
    register()
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("the quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids, tau=1.0).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(ids, tau=0.3).logits, dense(ids).logits, atol=1e-2)
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["model_type"], config["attention_bias"]) == ("prunepath_llama", True)
    assert not {"bias", "auto_map"} & set(config)
    assert "auto_map" not in (checkpoint / "tokenizer_config.json").read_text()
    assert not list(checkpoint.glob("*.py"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["PanguProMoEForCausalLM"]}, "architectures"),
        ({"bias": "yes"}, "bias: 'yes'; expected true or false"),
        ({"mlp_bias": True}, "mlp.gate_proj.bias"),
    ],
)
def test_what_is_not_it_is_refused(pangu, tmp_path, change, message):
    folder, _ = pangu
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Exception, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_python_alone_is_refused(pangu, tmp_path):
    folder, _ = pangu
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json: .* expected a tokenizer\.json"):
        convert(folder, tmp_path / "out")


def test_its_dense_model_is_not_run(pangu, tmp_path):
    folder, _ = pangu
    text = tmp_path / "text.txt"
    text.write_text("a text")
    with pytest.raises(UsageError, match="split coactivation runs the dense model"):
        convert(folder, tmp_path / "out", split="coactivation", calibration_text=text)
