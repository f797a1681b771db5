"""Realised sparsity: what the engine's layers counted, against the transformers model on the same tokens."""

import pytest
import torch
from test_engine import run_engine

import prunepath_vllm

PREFILL_TAU = 0.6
GROUPS = ("first", "middle", "last")


@pytest.fixture(scope="module")
def checkpoint(prunepath_checkpoint):
    return prunepath_checkpoint("llama", default_tau=0.6)


@pytest.fixture(scope="module")
def model(checkpoint):
    from transformers import AutoModelForCausalLM

    prunepath_vllm.register()
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def counted(model, row: dict, prompt_tau: float | None) -> torch.Tensor:
    """int [layers, tokens run]: active experts of the tokens of an answer; its last one was never run."""
    prompt, tokens = row["prompt"], [*row["prompt"], *row["tokens"][0][:-1]]

    def active(tau: float, cache=None, ids=tokens):
        with torch.no_grad():
            given = {} if cache is None else {"past_key_values": cache, "use_cache": True}
            output = model(torch.tensor([ids]), tau=tau, output_router_logits=True, **given)
        experts = model.config.prunepath.num_experts
        return ((1 - output.ffn_sparsity[:, 0]) * experts).round().long()

    if prompt_tau is None:
        return active(row["tau"])
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    first = active(prompt_tau, cache, prompt)
    return torch.cat([first, active(row["tau"], cache, tokens[len(prompt) :])], dim=1)


@pytest.mark.parametrize(("runner", "prefill_tau"), [("v1", PREFILL_TAU), ("v2", None)], ids=["v1-prefill", "v2"])
def test_counts_are_those_of_the_transformers_model(checkpoint, model, monkeypatch, tmp_path, runner, prefill_tau):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    policy = {} if prefill_tau is None else {"prefill_tau": prefill_tau}
    result = run_engine("counts", checkpoint, runner, policy=policy)
    config = model.config
    experts = config.prunepath.num_experts
    layers = {name: [0, 0] for name in GROUPS}
    for name, asking in {"few": (1, 3), "every": range(6), "none": ()}.items():
        for i, (row, report) in enumerate(zip(result[name]["rows"], result[name]["reports"], strict=True)):
            active = counted(model, row, prefill_tau)
            for layer, group in enumerate(GROUPS):  # the model has three layers
                layers[group][0] += int(active[layer].sum())
                layers[group][1] += active.shape[1] * experts
            if i not in asking:
                assert report is None
                continue
            parts = active[:, : len(row["prompt"])], active[:, len(row["prompt"]) :]
            assert report == [[part.sum(1).tolist(), part.shape[1] * experts] for part in parts]
            assert (row["tau"] < 1) == all(active < report[1][1] for active in report[1][0])
    metrics = result["metrics"]
    for group, (active, possible) in layers.items():
        assert metrics[f"prunepath:experts_active_total{group}"] == active
        assert metrics[f"prunepath:experts_possible_total{group}"] == possible
    assert metrics["prunepath:tokens_total"] == layers["first"][1] / experts
