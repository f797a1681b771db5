"""LoRA adapters of attention: with any tau, they give what a checkpoint gives into which they were merged."""

import concurrent.futures
import json
import shutil
from pathlib import Path

import pytest
import test_server
import torch
from naive import load_naive, naive_generate
from safetensors.torch import load_file, save_file
from test_engine import RUNNERS, assert_naive, run_engine
from test_server import MODEL, PROMPTS, TAUS
from tiny_models import build_tokenizer
from transformers import AutoConfig

from prunepath_vllm import register
from prunepath_vllm.errors import CheckpointError, UnsupportedFeatureError
from prunepath_vllm.model_executor.adapters import refuse_adapter

serve = test_server.serve

SCRIPT = Path(__file__).with_name("lora_pooling_scenarios.py")

RANK, SCALE = 4, 2.0
PREFIX = "base_model.model."
REFUSED = (
    ("gate", ".self_attn.", ".gate_proj."),
    ("down", ".down_proj."),
    ("router", ".self_attn.", ".router."),
    ("embedding", ".self_attn.", ".embed_tokens."),
)
"""Name of an adapter, and of which linears it is; the last part is named."""


def save_adapter(checkpoint: Path, path: Path, *parts: str, seed: int = 3) -> Path:
    """A random adapter, as PEFT writes it, of the checkpoint's linears whose names hold one of `parts`."""
    weights = load_file(checkpoint / "model.safetensors")
    names = [name for name in weights if weights[name].dim() == 2 and any(part in name for part in parts)]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        rows, columns = weights[name].shape
        stem = PREFIX + name.removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.2
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.2
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in names})
    config = dict(peft_type="LORA", r=RANK, lora_alpha=RANK * SCALE, target_modules=targets)
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def merged(checkpoint: Path, adapter: Path, path: Path) -> Path:
    """The checkpoint with an adapter's products added to its weights."""
    shutil.copytree(checkpoint, path)
    weights, parts = load_file(checkpoint / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in weights:
        stem = PREFIX + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in parts:
            weights[name] += SCALE * parts[f"{stem}.lora_B.weight"] @ parts[f"{stem}.lora_A.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("family", "runner", "options"),
    [
        ("llama", "v1", {"router_input": "attention"}),
        ("llama", "v2", {"prompts": 4}),
        ("phi3", "v1", {"engine": {"tensor_parallel_size": 2}}),
        ("gemma3_text", "v1", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapters_and_taus_in_one_batch_give_what_merged_checkpoints_give(
    prunepath_checkpoint, tmp_path, family, runner, options
):
    assert runner in RUNNERS
    router_input = options.get("router_input", "ffn")
    checkpoint = prunepath_checkpoint(family, default_tau=0.6, router_input=router_input)
    adapters = [save_adapter(checkpoint, tmp_path / f"{seed}", ".self_attn.", seed=seed) for seed in (3, 4)]
    result = run_engine(
        "lora",
        checkpoint,
        runner,
        SCRIPT,
        adapters=[str(path) for path in adapters],
        refused=[str(save_adapter(checkpoint, tmp_path / name, *parts)) for name, *parts in REFUSED],
        **options,
    )
    models = {None: checkpoint} | {str(path): merged(checkpoint, path, tmp_path / f"m{path.name}") for path in adapters}
    rows = [*result["mixed"], *result["shared_prefix"], *result["after"]]
    assert {row["adapter"] for row in rows} == set(models)
    for adapter, model in models.items():
        assert_naive([row for row in rows if row["adapter"] == adapter], model)
    assert [row["tokens"] for row in result["mixed"]] == [row["tokens"] for row in result["lone"]]
    seen = set()
    for row in result["shared_prefix"]:
        key = (row["adapter"], min(row["tau"], 1.0))
        assert (row["cached"] > 0) == (key in seen), result["shared_prefix"]
        seen.add(key)
    assert len(result["said"]) == 2 * len(REFUSED)
    for said, (_, *parts) in zip(result["said"], [one for one in REFUSED for _ in range(2)], strict=True):
        assert parts[-1] in (said or ""), said
        assert "PrunePath models take adapters of attention alone" in said


def test_an_adapter_that_the_engine_would_take_in_part_is_refused(prunepath_checkpoint, tmp_path):
    register()
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    config = AutoConfig.from_pretrained(checkpoint)
    good = save_adapter(checkpoint, tmp_path / "good", ".self_attn.")
    refuse_adapter(good, config)
    tensors = load_file(good / "adapter_model.safetensors")
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(changed: dict[str, torch.Tensor]) -> str:
        save_file(tensors | changed, good / "adapter_model.safetensors")
        with pytest.raises((CheckpointError, UnsupportedFeatureError)) as error:
            refuse_adapter(good, config)
        return str(error.value)

    for other in (
        name.replace("layers.0", "layers.3"),  # the model has three
        name.replace("self_attn", "mlp"),  # the engine goes by the last part of a name
        name.replace("q_proj", "qkv_proj"),
        name.replace("lora_A.weight", "lora_magnitude_vector"),
        f"{PREFIX}lm_head.lora_A.weight",
    ):
        assert f"changes {other} (1 such tensors)" in refused({other: tensors[name].clone()})
    assert name in refused({name: tensors[name] * float("nan")})
    (good / "adapter_model.safetensors").rename(good / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="LoRA adapters in pickles are never loaded"):
        refuse_adapter(good, config)


@torch.no_grad()
def test_a_server_takes_adapters_at_start_and_later_and_refuses_others(
    serve, prunepath_checkpoint, tmp_path, monkeypatch
):
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    adapters = {name: save_adapter(checkpoint, tmp_path / name, ".self_attn.", seed=i) for i, name in enumerate("ab")}
    bad = save_adapter(checkpoint, tmp_path / "bad", ".self_attn.", ".up_proj.")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    flags = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules", f"a={adapters['a']}"]
    policy = {"prunepath": {"default_tau_by_model": {"a": 0.3}}}
    server = serve(checkpoint, *flags, "--additional-config", json.dumps(policy))
    assert server.post("/v1/load_lora_adapter", dict(lora_name="b", lora_path=str(adapters["b"]))).status_code == 200
    refused = server.post("/v1/load_lora_adapter", dict(lora_name="bad", lora_path=str(bad)))
    assert refused.status_code >= 400
    assert "model.layers.0.mlp.up_proj.lora_A.weight" in refused.json()["error"]["message"]
    assert "PrunePath models take adapters of attention alone" in refused.json()["error"]["message"]

    def complete(name: str, tau: float | None) -> list[int]:
        body = dict(model=name, prompt=PROMPTS[1], max_tokens=10, temperature=0)
        if tau is not None:
            body["tau"] = tau
        answer = server.post("/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    asked = [(name, tau) for name in (MODEL, "a", "b") for tau in TAUS[:3]]
    asked += [("a", None), ("b", None)]
    defaults = {"a": 0.3, "b": 0.6}
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(complete, *zip(*asked, strict=True)))
    paths = {name: merged(checkpoint, path, tmp_path / f"merged-{name}") for name, path in adapters.items()}
    prompt = build_tokenizer()(PROMPTS[1])["input_ids"]
    models = {name: load_naive(path) for name, path in {MODEL: checkpoint, **paths}.items()}
    for (name, tau), answer in zip(asked, answers, strict=True):
        assert answer == naive_generate(models[name], prompt, tau or defaults[name], 10), (name, tau)
