"""SmolLM2-135M-Instruct, converted: the dense model at tau 1, the naive one below, token for token in the engine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_engine import assert_naive, run_engine
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunepath_vllm
from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.conversion.text import read_sequences
from prunepath_vllm.training.adapter import merge_adapter

ROOT = Path(__file__).parents[1]
DENSE = ROOT / ".cache" / "SmolLM2-135M-Instruct"
TEXT = ROOT / ".cache" / "data" / "wikitext-2" / "valid.txt"
ADAPTER = ROOT / "models" / "SmolLM2-135M-Instruct-PrunePath-adapter" / "adapter.safetensors"
SUBJECTS = ["France", "the sun", "a bicycle", "bread", "the sea", "a good story", "winter", "mathematics"]
QUESTIONS = ["What is {}?", "Write one sentence about {}.", "Name three things about {}.", "Why do people like {}?"]
PROMPTS = [
    f"<|im_start|>user\n{question.format(subject)}<|im_end|>\n<|im_start|>assistant\n"
    for subject in SUBJECTS
    for question in QUESTIONS
]


@pytest.fixture(scope="module")
def dense() -> Path:
    if not DENSE.exists():
        subprocess.run([sys.executable, ROOT / "scripts" / "demo.py", "--fetch-only"], check=True)
    return DENSE


@pytest.fixture(scope="module")
def converted(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(dense, tmp_path_factory.mktemp("smollm2") / "prunepath")


def test_conversion_is_valid_to_the_last_value(converted):
    summary = validate_checkpoint(converted, check_values=True)
    assert (summary.num_layers, summary.prunepath.num_experts, summary.prunepath.expert_size) == (30, 48, 32)


def test_tau_1_has_the_dense_logits(dense, converted):
    prunepath_vllm.register()
    ids = AutoTokenizer.from_pretrained(dense)(PROMPTS[0] + "It is a country in Europe.", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
        torch.testing.assert_close(model(ids, tau=1.0).logits, expected, atol=1e-3, rtol=0)
        assert not torch.allclose(model(ids, tau=0.5).logits, expected, atol=1e-1)


def test_tau_1_gives_the_dense_engines_tokens_on_32_prompts(dense, converted):
    assert len(PROMPTS) == 32
    options = {"prompts": PROMPTS, "max_tokens": 12}
    sparse = run_engine("dense", converted, **options)["tokens"]
    assert sparse == run_engine("dense", dense, **options)["tokens"]
    text = AutoTokenizer.from_pretrained(dense).decode(sparse[0])
    assert "France" in text


@pytest.fixture(scope="module")
def trained(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo: trained, routers at the attention's input."""
    return merge_adapter(dense, ADAPTER, tmp_path_factory.mktemp("trained") / "prunepath")


@pytest.fixture(scope="module")
def calibrated(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated on little text, routers at the feed-forward layer's input."""
    folder = tmp_path_factory.mktemp("calibrated")
    text = folder / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:10_000], encoding="utf-8")
    options = dict(expert_size=16, router="calibrated", dense_positions=1, calibration_text=text)
    return convert(dense, folder / "prunepath", **options)


@pytest.mark.parametrize("kind", ["trained", "calibrated"])
def test_the_engine_computes_a_real_checkpoint_as_the_naive_model_does(kind, request):
    """Nine prompts at six taus in one batch, and alone."""
    checkpoint = request.getfixturevalue(kind)
    result = run_engine("decoder", checkpoint, new_tokens=4)
    assert_naive(result["mixed"][:6], checkpoint)  # every tau; the naive model takes its time
    assert [row["tokens"] for row in result["mixed"]] == [row["tokens"] for row in result["lone"]]


def test_the_demo_adapter_turns_quality_into_sparsity_gently(dense, trained):
    """The committed adapter on real text: its measured curve, and a model that half of the experts carry."""
    assert ADAPTER.stat().st_size < 24e6
    curve = dict(validate_checkpoint(trained, check_values=True).prunepath.tau_curve)
    tokens = read_sequences(AutoTokenizer.from_pretrained(trained), TEXT, length=1024, max_tokens=1024)
    prunepath_vllm.register()
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with torch.no_grad():
        untouched = plain(tokens, labels=tokens).loss.exp()
        for tau, limit in ((1.0, 0.75), (0.95, 0.78), (0.8, 0.95), (0.7, 1.1), (0.5, 1.5)):
            output = model(tokens, labels=tokens, tau=tau, output_router_logits=True)
            assert output.loss.exp() < limit * untouched
            assert output.ffn_sparsity.mean().item() == pytest.approx(curve[tau], abs=0.02)
