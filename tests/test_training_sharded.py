"""Sharded training on two CPU processes: the losses of DDP, exact resume, float32 routers, whole exports."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import warm
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prunepath_vllm.checkpoint import read_tensor_index, stream_tensors, validate_checkpoint
from prunepath_vllm.errors import CheckpointError, UsageError
from prunepath_vllm.modeling import register_auto_classes
from prunepath_vllm.training.recipe import parse_recipe
from prunepath_vllm.training.run import train

ROOT = Path(__file__).parent.parent
STEPS = 6


def content(folder, dense, name, **changes):
    """A recipe whose second stage gives the routers no gradient; sections are replaced key by key."""
    recipe = dict(
        output=str(folder / name),
        model=dict(path=str(dense), convert=dict(router="random", split="random", expert_size=16)),
        data=dict(train=[dict(path=str(folder / "t.txt"))], sequence_length=32),
        stages=[dict(gate="sigmoid", losses=dict(contribution=0.1, balance=0.01)), dict(gate="none")],
        optimizer=dict(lr=1e-3, weight_decay=0.1),
        schedule=dict(max_steps=STEPS),
        batch=dict(sequences=2, accumulation=2),
        runtime=dict(device="cpu", bf16=False, log_steps=1, tensorboard=False, sharding="full"),
    )
    for key, value in changes.items():
        recipe[key] = recipe[key] | value if isinstance(value, dict) and key in recipe else value
    return recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dense_checkpoint):
    """The folder of all runs, made by two processes that run them one after the other."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "t.txt").write_text((ROOT / "docs" / "architecture.md").read_text())
    llama, gpt2 = dense_checkpoint("llama"), dense_checkpoint("gpt2")
    teacher = dict(distillation=dict(teacher=str(llama), share=0.5, hidden=0.1))
    plans = {
        "ddp": (llama, dict(runtime=dict(sharding="none"), **teacher)),
        "full-gathered": (llama, dict(runtime=dict(save_steps=3, keep=9), **teacher)),
        "full-killed": (llama, dict(runtime=dict(save_steps=3, keep=9), **teacher)),
        "full-recomputed": (llama, dict(runtime=dict(gradient_checkpointing=True), **teacher)),
        "full-dtypes": (llama, dict(runtime=dict(bf16=True), schedule=dict(max_steps=1))),
        "gpt2-ddp": (gpt2, dict(runtime=dict(sharding="none"), model=dict(rank=4))),
        "gpt2-full-killed": (gpt2, dict(runtime=dict(save_steps=3), model=dict(rank=4))),
    }
    for name, (dense, changes) in plans.items():
        recipe = content(folder, dense, name, **changes)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [*launch, str(ROOT / "tests" / "sharded_runs.py"), str(folder)]
    done = warm.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def losses(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if "loss" in row}


def tensors(path):
    return dict(stream_tensors(path, read_tensor_index(path)))


@pytest.mark.parametrize(
    ("whole", "sharded"),
    [("ddp", "full-gathered"), ("ddp", "full-recomputed"), ("gpt2-ddp", "gpt2-full-killed")],
)
def test_losses_and_gradients_are_those_of_unsharded_training(runs, whole, sharded):
    expected, got = losses(runs / whole), losses(runs / sharded)
    assert list(got) == list(expected) == list(range(1, STEPS + 1))
    for step, pair in expected.items():
        assert got[step] == pytest.approx(pair, rel=2e-5), step
    got_tensors = tensors(runs / sharded / "model")
    for name, tensor in tensors(runs / whole / "model").items():
        # Low rank is exported from factors rounded to bfloat16.
        torch.testing.assert_close(got_tensors[name], tensor, rtol=1e-3, atol=2e-3 if "gpt2" in whole else 2e-4)


def test_every_process_holds_half(runs):
    held, moments = json.loads((runs / "full-gathered" / "held.json").read_text())
    total = sum(tensor.numel() for tensor in load_file(runs / "full-gathered" / "gathered.safetensors").values())
    assert total / 2 <= held < 0.51 * total
    assert moments == 2 * held


def test_a_resumed_run_ends_with_the_same_bits(runs):
    straight, resumed = runs / "full-gathered", runs / "full-killed"
    for name in ("model", "checkpoint-6"):
        first, second = tensors(straight / name), tensors(resumed / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert losses(straight) == losses(resumed)


def test_routers_stay_float32_beside_bfloat16_layers(runs):
    seen = json.loads((runs / "full-dtypes" / "dtypes.json").read_text())
    assert seen == dict(
        router=["torch.float32"], linear=["torch.bfloat16"], parameter=["torch.float32"], gradient=["torch.float32"]
    )


def test_the_export_is_the_gathered_model(runs):
    run = runs / "full-gathered"
    gathered, exported = load_file(run / "gathered.safetensors"), tensors(run / "model")
    assert gathered.keys() == exported.keys() == tensors(runs / "ddp" / "model").keys()
    for name, tensor in gathered.items():
        assert torch.equal(exported[name], tensor.to(exported[name].dtype)), name
    assert all(torch.equal(tensor, gathered[name]) for name, tensor in tensors(run / "checkpoint-6").items())
    assert not [path for path in (run / "model").iterdir() if path.suffix in (".bin", ".pt", ".pth", ".distcp")]
    validate_checkpoint(run / "model", check_values=True)
    register_auto_classes()
    loaded, known = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not known["missing_keys"]
    assert loaded(torch.randint(4, 300, (1, 8)), tau=0.5).logits.isfinite().all()


def test_checkpoints_are_resumed_as_they_were_written(runs):
    sharded = yaml.safe_load((runs / "full-gathered.yaml").read_text())
    sharded["runtime"]["sharding"] = "none"
    with pytest.raises(CheckpointError, match=r"checkpoint-6: written with runtime\.sharding 'full'; expected"):
        train(parse_recipe(sharded), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(), r"runtime\.sharding: 'full' with 1 process; expected several"),
        (dict(evaluation=dict(points=2)), r"evaluation\.points: 2; expected 0 with runtime\.sharding 'full'"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused(tmp_path, dense_checkpoint, changes, message):
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(UsageError, match=message):
        train(parse_recipe(content(tmp_path, dense_checkpoint("llama"), "run", **changes)))
    assert not (tmp_path / "run").exists()


def test_accelerates_own_sharding_is_refused(tmp_path, dense_checkpoint, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"ACCELERATE_USE_FSDP: true; expected a launch without FSDP"):
        train(parse_recipe(content(tmp_path, dense_checkpoint("llama"), "run")))
