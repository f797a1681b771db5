"""Adapters of whole trainings on tiny models: low rank, changes in few bits, training that goes on from one."""

import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import LENGTH, assert_same, logs, tensors
from transformers import AutoModelForCausalLM

from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.errors import PrunePathError, UsageError
from prunepath_vllm.modeling import register_auto_classes
from prunepath_vllm.training import run
from prunepath_vllm.training.adapter import merge_adapter, neuron_order, read_adapter, save_delta
from prunepath_vllm.training.run import train


def test_low_rank_adapter_makes_the_trained_checkpoint(recipe, tmp_path, dense_checkpoint):
    plan = recipe(model=dict(rank=4), optimizer=dict(lr=2e-2))
    result = train(plan)
    merged = merge_adapter(dense_checkpoint("llama"), Path(plan.output) / "adapter.safetensors", tmp_path / "merged")
    assert_same(tensors(merged), tensors(result))
    assert validate_checkpoint(merged).prunepath == validate_checkpoint(result).prunepath
    start, end = tensors(Path(plan.output) / "start"), tensors(result)
    assert torch.equal(start["model.embed_tokens.weight"], end["model.embed_tokens.weight"])
    change = end["model.layers.1.mlp.down_proj.weight"] - start["model.layers.1.mlp.down_proj.weight"]
    assert torch.linalg.matrix_rank(change.float(), rtol=1e-4) == 4
    assert logs(plan.output)[-1] < logs(plan.output)[0] - 0.3


def test_full_fine_tuning_leaves_its_change_in_few_bits(recipe, tmp_path, dense_checkpoint):
    plan = recipe(model=dict(embeddings="frozen", adapter_bits=4, adapter_sequences=0))
    result = train(plan)
    adapter = Path(plan.output) / "adapter.safetensors"
    merged = merge_adapter(dense_checkpoint("llama"), adapter, tmp_path / "merged")
    start, end, near = tensors(Path(plan.output) / "start"), tensors(result), tensors(merged)
    assert validate_checkpoint(merged).prunepath == validate_checkpoint(result).prunepath
    for name in start:
        if "embed" in name or "lm_head" in name:
            assert torch.equal(start[name], end[name]), "frozen"
            assert torch.equal(start[name], near[name])
            continue
        change, error = (end[name] - start[name]).float(), (near[name] - end[name]).float()
        assert change.any(), name
        # 4 bits leave 1% of what changed, be it large or small; vectors are kept in bfloat16, routers in float8.
        limit = 0.02 * change.square().sum()
        if ".router." in name or change.dim() == 1:
            limit = (2e-5 if change.dim() == 1 else 1e-3) * end[name].float().square().sum()
        assert error.square().sum() <= limit, name

    order = neuron_order(dense_checkpoint("llama"), Path(plan.output) / "start")
    fewer = save_delta(dense_checkpoint("llama"), result, order, bits=1.5, destination=tmp_path / "fewer.safetensors")
    held, *_ = read_adapter(fewer)
    near = tensors(merge_adapter(dense_checkpoint("llama"), fewer, tmp_path / "merged_fewer"))
    entries, taken, lost, all_changes = 0, 0, 0.0, 0.0
    for name in start:
        change, error = (end[name] - start[name]).float(), (near[name] - end[name]).float()
        if change.dim() == 2 and change.any() and ".router." not in name:
            entries += change.numel()
            taken += 8 * held[f"{name}.numbers"].numel() if f"{name}.numbers" in held else 0
            lost, all_changes = lost + error.square().sum().item(), all_changes + change.square().sum().item()
    assert 1.3 * entries < taken <= 1.5 * entries
    assert lost < 0.25 * all_changes


def test_an_adapter_of_the_release_before_is_read(recipe, tmp_path, dense_checkpoint):
    plan = recipe(model=dict(embeddings="frozen", adapter_bits=4, adapter_sequences=0), schedule=dict(max_steps=1))
    train(plan)
    adapter = Path(plan.output) / "adapter.safetensors"
    held, block, digest = read_adapter(adapter)
    held = {name: tensor for name, tensor in held.items() if not name.endswith((".numbers", ".step"))}
    name = "model.layers.1.mlp.up_proj.weight"
    rows, columns = tensors(Path(plan.output) / "start")[name].shape
    held[f"{name}.delta"] = torch.full((rows, columns // 8), 0b01010101, dtype=torch.uint8)
    held[f"{name}.delta_scale"] = torch.full((rows,), 0.5)
    metadata = {"format": "pt", "prunepath": json.dumps(block.to_json()), "dense_sha256": digest}
    save_file(held, tmp_path / "old.safetensors", metadata=metadata)
    merged = tensors(merge_adapter(dense_checkpoint("llama"), tmp_path / "old.safetensors", tmp_path / "merged"))
    signs = torch.tensor([1.0, -1.0]).repeat(columns // 2)
    want = tensors(Path(plan.output) / "start")[name].float() + 0.5 * (2 / torch.pi) ** 0.5 * signs
    torch.testing.assert_close(merged[name].float(), want, atol=4e-3, rtol=4e-3)


def test_training_goes_on_from_an_adapter(recipe, tmp_path, dense_checkpoint):
    plan = recipe(model=dict(embeddings="frozen", adapter_bits=2, adapter_sequences=0))
    train(plan)
    adapter, dense = Path(plan.output) / "adapter.safetensors", str(dense_checkpoint("llama"))
    model = dict(
        path=dense, convert=None, adapter=str(adapter), embeddings="frozen", adapter_bits=6, adapter_sequences=0
    )
    further = recipe(model=model, output=str(tmp_path / "further"))
    result = train(further)
    assert_same(tensors(tmp_path / "further" / "start"), tensors(merge_adapter(dense, adapter, tmp_path / "merged")))
    assert logs(further.output)[0] < logs(plan.output)[0] - 0.1
    # The second adapter holds both trainings, of the dense model's own neurons.
    again, end = (
        tensors(merge_adapter(dense, tmp_path / "further" / "adapter.safetensors", tmp_path / "again")),
        tensors(result),
    )
    for name in end:
        if ".router." not in name:
            error = (again[name].float() - end[name].float()).square().sum()
            assert error <= 1e-3 * end[name].float().square().sum(), name


def test_an_adapter_to_go_on_from_is_read_once(recipe, monkeypatch, tmp_path, dense_checkpoint):
    model = dict(embeddings="frozen", adapter_bits=2, adapter_sequences=0)
    plan = recipe(model=model, schedule=dict(max_steps=1))
    train(plan)
    path = Path(plan.output) / "adapter.safetensors"
    reads = Counter()

    @contextmanager
    def watched(opened, **options):
        with safe_open(opened, **options) as handle:
            spy = Mock(wraps=handle)
            yield spy
        if Path(opened) == path:
            reads.update(call.args[0] for call in spy.get_tensor.call_args_list)

    monkeypatch.setattr("prunepath_vllm.training.adapter.safe_open", watched)
    model |= dict(path=str(dense_checkpoint("llama")), convert=None, adapter=str(path))
    train(recipe(model=model, output=str(tmp_path / "further"), schedule=dict(max_steps=1)))
    assert set(reads) == set(load_file(path))
    assert {name for name, count in reads.items() if count > 1} == {name for name in reads if "neuron_order" in name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(convert={}), "model.adapter goes without model.convert"),
        (dict(convert=None, rank=4), "model.adapter goes without model.rank"),
        (dict(convert=None), "no-such.safetensors: no such file"),
    ],
    ids=str,
)
def test_an_adapter_to_go_on_from_is_checked_first(recipe, dense_checkpoint, changes, message):
    model = dict(path=str(dense_checkpoint("llama")), adapter="no-such.safetensors", adapter_bits=None) | changes
    with pytest.raises(PrunePathError, match=message):
        train(recipe(model=model))


def test_rounding_fitted_to_sequences_keeps_more_of_the_training(recipe, texts, tmp_path, dense_checkpoint):
    plan = recipe(model=dict(embeddings="frozen", adapter_bits=1, adapter_sequences=8), optimizer=dict(lr=1e-2))
    result, dense = train(plan), dense_checkpoint("llama")
    order = neuron_order(dense, Path(plan.output) / "start")
    nearest = save_delta(dense, result, order, bits=1, destination=tmp_path / "nearest.safetensors")
    tokens = torch.randint(3, 60, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    logits = {}
    for name, adapter in (("fitted", Path(plan.output) / "adapter.safetensors"), ("nearest", nearest)):
        logits[name] = causal_logits(merge_adapter(dense, adapter, tmp_path / name), tokens)
    want = causal_logits(result, tokens)
    fitted, plain = ((logits[name] - want).square().mean() for name in ("fitted", "nearest"))
    assert fitted < 0.8 * plain


@pytest.mark.parametrize(
    ("stage", "lowest"),
    [
        (dict(tau="fixed", tau_start=0.8), 0.8),
        (dict(tau="fixed", tau_start=1.05), 1.0),
        (dict(tau="uniform", tau_start=1.0, tau_end=0.3), 0.3),
        (dict(tau="path", tau_start=1.0, tau_end=0.4), 0.4),
    ],
    ids=str,
)
def test_rounding_is_fitted_at_the_taus_of_the_last_stage(recipe, monkeypatch, stage, lowest):
    seen = []

    def watch(*args, lowest_tau, **kwargs):
        seen.append(lowest_tau)
        return save_delta(*args, lowest_tau=lowest_tau, **kwargs)

    monkeypatch.setattr(run, "save_delta", watch)
    model = dict(embeddings="frozen", adapter_bits=1, adapter_sequences=1)
    train(recipe(model=model, stages=[stage], schedule=dict(max_steps=1)))
    assert seen == [lowest]


def causal_logits(path, tokens):
    register_auto_classes()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens, tau=0.7).logits


def test_an_adapter_needs_its_own_dense_model(recipe, dense_checkpoint):
    plan = recipe(model=dict(rank=4, dense=str(dense_checkpoint("qwen2"))))
    with pytest.raises(UsageError, match="neurons that"):
        train(plan)
