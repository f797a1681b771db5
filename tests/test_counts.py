"""What the engine's layers counted, against the transformers model on the same tokens: in one process, and in two."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from naive import NaiveFFN, load_naive, naive_logits
from test_engine import assert_naive, run_engine

import prunepath_vllm
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.kernels.cpu import NATIVE_TOKENS
from prunepath_vllm.model_executor import counts

PREFILL_TAU = 0.6
GROUPS = ("first", "middle", "last")
ASKING = {"few": (1, 3), "every": range(6), "sparse": ()}


@pytest.fixture(scope="module")
def checkpoint(prunepath_checkpoint):
    return prunepath_checkpoint("llama", default_tau=0.6, expert_size=8, num_key_value_heads=2)


@pytest.fixture(scope="module")
def model(checkpoint):
    from transformers import AutoModelForCausalLM

    prunepath_vllm.register()
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def active_experts(model, row: dict, prompt_tau: float | None) -> torch.Tensor:
    """bool [layers, tokens run, E]: what the tokens of an answer used; its last one was never run."""
    prompt, tokens = row["prompt"], [*row["prompt"], *row["tokens"][0][:-1]]

    def active(tau: float, cache=None, ids=tokens):
        with torch.no_grad():
            given = {} if cache is None else {"past_key_values": cache, "use_cache": True}
            output = model(torch.tensor([ids]), tau=tau, output_router_logits=True, **given)
        return torch.stack(output.active_experts)[:, 0]

    if prompt_tau is None:
        return active(row["tau"])
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    first = active(prompt_tau, cache, prompt)
    return torch.cat([first, active(row["tau"], cache, tokens[len(prompt) :])], dim=1)


def active_of_all(model, result: dict, prompt_tau: float | None = None) -> dict[str, list[torch.Tensor]]:
    """:func:`active_experts` of every request of the scenario."""
    return {
        name: [active_experts(model, row, prompt_tau) for row in requests["rows"]]
        for name, requests in result["requests"].items()
    }


@pytest.mark.parametrize(
    ("runner", "prefill_tau", "engine"),
    [
        ("v1", PREFILL_TAU, {}),
        ("v2", None, {}),
        ("v2", None, {"tensor_parallel_size": 2}),
        ("v2", None, {"pipeline_parallel_size": 2}),  # V1's eager CPU worker of vLLM 0.32.0 cannot
    ],
    ids=["v1-prefill", "v2", "v2-tensor-parallel", "v2-pipeline-parallel"],
)
def test_counts_are_those_of_the_transformers_model(
    checkpoint, model, monkeypatch, tmp_path, runner, prefill_tau, engine
):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    policy = {} if prefill_tau is None else {"prefill_tau": prefill_tau}
    result = run_engine("counts", checkpoint, runner, policy=policy, engine=engine)
    experts = model.config.prunepath.num_experts
    active = active_of_all(model, result, prefill_tau)
    if prefill_tau is None:
        assert_naive([row for requests in result["requests"].values() for row in requests["rows"]], checkpoint)
    for name, asking in ASKING.items():
        requests = result["requests"][name]
        for i, (row, report) in enumerate(zip(requests["rows"], requests["reports"], strict=True)):
            told = [one for one in report if one is not None]
            if i not in asking:
                assert not told
                continue
            assert len(told) == engine.get("pipeline_parallel_size", 1)  # of a tensor-parallel group, one speaks
            used = active[name][i].sum(-1)
            parts = used[:, : len(row["prompt"])], used[:, len(row["prompt"]) :]
            for part, (counted, possible) in zip(parts, map(merged, zip(*told, strict=True)), strict=True):
                assert counted == part.sum(1).tolist()
                assert possible == part.shape[1] * experts
            assert (row["tau"] < 1) == all(count < parts[1].shape[1] * experts for count in parts[1].sum(1))

    metrics = result["metrics"]
    tokens = torch.cat([one for many in active.values() for one in many], dim=1)  # the model has three layers
    assert metrics["prunepath:tokens_total"] == tokens.shape[1]
    for layer, group in enumerate(GROUPS):
        assert metrics[f"prunepath:experts_active_total:{group}"] == tokens[layer].sum()
        assert metrics[f"prunepath:experts_possible_total:{group}"] == tokens[layer].numel()

    read, dense_runs = reads(result, active, cpu_takes_all)
    assert 0 < dense_runs < 3 * len(result["steps"])
    kinds = [metrics.get(f"prunepath:steps_total:{kind}", 0) for kind in ("dense", "routed")]
    assert sum(kinds) == len(result["steps"])
    for layer, group in enumerate(GROUPS):
        assert metrics[f"prunepath:experts_read_total:{group}"] == read[layer]
        assert metrics[f"prunepath:experts_readable_total:{group}"] == experts * len(result["steps"])
    assert metrics["prunepath:layer_runs_total:dense"] == dense_runs
    assert metrics["prunepath:layer_runs_total:sparse"] == 3 * len(result["steps"]) - dense_runs


@pytest.mark.parametrize(
    ("runner", "eager", "options"),
    [
        ("v1", True, {}),
        ("v1", False, dict(selection="threshold", threshold=0.6, gate="sigmoid")),
        ("v2", True, dict(gate="sigmoid")),
    ],
    ids=["v1", "v1-compiled-threshold-sigmoid", "v2-sigmoid"],
)
def test_at_least_its_tau_is_every_expert_in_large_steps_alone(
    prunepath_checkpoint, monkeypatch, tmp_path, runner, eager, options
):
    """Prompts run in steps of up to 64 tokens, answers in steps of up to 6."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6, expert_size=8, **options)
    policy, engine = {"mode": "at_least"}, {"enforce_eager": eager}
    # Enough that every answer has small steps: its first tokens run beside other requests' prompts.
    result = run_engine("counts", checkpoint, runner, policy=policy, engine=engine, new_tokens=10)
    rows = {row["id"]: row for requests in result["requests"].values() for row in requests["rows"]}
    taus, sizes = taus_of_tokens(rows, result["steps"])
    naive = load_naive(checkpoint)
    layers = [module for module in naive.modules() if isinstance(module, NaiveFFN)]
    active = {}
    for name, row in rows.items():
        prompt, (tokens,) = row["prompt"], row["tokens"]
        assert len(taus[name]) == len(prompt) + len(tokens) - 1
        assert taus[name][-1] == row["tau"]
        logits = naive_logits(naive, [*prompt, *tokens[:-1]], taus[name])
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == tokens, row["tau"]
        active[name] = torch.tensor([layer.active_counts for layer in layers])

    experts = naive.config.intermediate_size // 8
    for requests in result["requests"].values():
        for row, report in zip(requests["rows"], requests["reports"], strict=True):
            for told in filter(None, report):
                parts = active[row["id"]].split([len(row["prompt"]), len(row["tokens"][0]) - 1], dim=1)
                assert told == [[part.sum(1).tolist(), part.shape[1] * experts] for part in parts]
    assert any(active[name][:, :16].min() == experts for name, row in rows.items() if row["tau"] < 1)

    metrics, steps = result["metrics"], len(result["steps"])
    for layer, group in enumerate(GROUPS):
        assert metrics[f"prunepath:experts_active_total:{group}"] == sum(
            int(one[layer].sum()) for one in active.values()
        )
    dense = sum(
        size > NATIVE_TOKENS or all(rows[name]["tau"] >= 1 for name, _, _ in step)
        for size, step in zip(sizes, result["steps"], strict=True)
    )
    assert metrics["prunepath:steps_total:dense"] == dense
    assert metrics["prunepath:steps_total:routed"] == steps - dense > 0
    assert metrics["prunepath:layer_runs_total:dense"] >= 3 * dense > 0
    assert metrics["prunepath:layer_runs_total:sparse"] > 0


def taus_of_tokens(rows: dict[str, dict], steps: list) -> tuple[dict[str, list[float]], list[int]]:
    """By request the tau that each of its tokens must have had in the scheduler's steps, and the steps' sizes."""
    taus: dict[str, list[float]] = {name: [] for name in rows}
    sizes = [sum(count for _, _, count in step) for step in steps]
    for size, step in zip(sizes, steps, strict=True):
        for name, start, count in step:
            assert start == len(taus[name])
            taus[name] += [1.0 if size > NATIVE_TOKENS else rows[name]["tau"]] * count
    return taus, sizes


def merged(stages: list) -> tuple[list[int], int]:
    """The layers of a pipeline's stages, one after the other, and what a layer could have had."""
    possible = {stage[1] for stage in stages}
    assert len(possible) == 1
    return [count for stage in stages for count in stage[0]], possible.pop()


def test_a_request_that_still_runs_is_not_forgotten_for_those_that_ended(monkeypatch):
    monkeypatch.setattr(counts, "MAX_REPORTS", 3)
    monkeypatch.setattr(counts, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(counts, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True))
    kept = counts.ExpertCounts(PrunePathConfig.model_construct(num_experts=4), num_layers=1, max_tokens=2)
    active, _ = kept.buffers(0)
    one = np.ones(1, dtype=np.int64)
    for step in range(8):  # beside the long request one of another name at each step, whose client has gone
        computed = np.array([step, 0])
        kept.begin_step(np.ones(2), computed, one.repeat(2), one.repeat(2), ["long", f"short {step}"])
        active += 3
    assert kept.take_report("long") == [([3], 4), ([21], 28)]
    assert [kept.take_report(f"short {step}") is None for step in (5, 6, 7)] == [True, False, False]


def reads(
    result: dict, active: dict[str, list[torch.Tensor]], takes_all: Callable[[torch.Tensor], bool]
) -> tuple[list[int], int]:
    """Experts that each layer must have read in the scheduler's steps, and the dense runs among them.

    Args:
        takes_all: whether a layer whose tokens use these experts, bool [tokens, E], takes every expert.
    """
    by_id = {
        row["id"]: used
        for name, requests in result["requests"].items()
        for row, used in zip(requests["rows"], active[name], strict=True)
    }
    total, dense_runs = [0] * len(GROUPS), 0
    for step in result["steps"]:
        step_used = torch.cat([by_id[request][:, start : start + count] for request, start, count in step], dim=1)
        for layer, used in enumerate(step_used):
            dense = takes_all(used)
            total[layer] += used.shape[1] if dense else int(used.any(dim=0).sum())
            dense_runs += dense
    return total, dense_runs


def cpu_takes_all(used: torch.Tensor) -> bool:
    """A CPU reads what the tokens of a step use."""
    return bool(used.any(dim=0).all())
