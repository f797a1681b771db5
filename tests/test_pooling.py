"""Decoders as embedding models and rerankers, by vLLM's own conversion: the naive model's values,
and at tau 1 the dense engine's."""

import json
from functools import cache
from pathlib import Path

import pytest
import test_server
import torch
import torch.nn.functional as F
from naive import load_naive, naive_logits
from test_engine import run_engine
from test_server import MODEL, PROMPTS
from tiny_models import build_tokenizer

serve = test_server.serve

SCRIPT = Path(__file__).with_name("lora_pooling_scenarios.py")

PAIR = dict(method="from_2_way_softmax", classifier_from_token=["a", "b"])
CLASSES = dict(method="no_post_processing", classifier_from_token=["a", "b", "c"])
CASES = {
    "llama embed": ("llama", "embed", None),
    "qwen2 embed": ("qwen2", "embed", None),
    "llama rerank": ("llama", "classify", PAIR),
    "qwen2 rerank": ("qwen2", "classify", PAIR),  # its head is the embedding
    "qwen2 classify": ("qwen2", "classify", CLASSES),
}
ON_V2 = ("llama embed", "llama rerank")


def expected(path: Path, prompt: list[int], tau: float, overrides: dict | None) -> torch.Tensor:
    """The values of one prompt, by the naive model."""
    model, head = naive(path)
    hidden = naive_logits(model, prompt, tau)[-1]
    if overrides is None:
        return F.normalize(hidden, dim=0)
    logits = head[build_tokenizer().convert_tokens_to_ids(overrides["classifier_from_token"])] @ hidden
    return (logits[1:] - logits[:1]).sigmoid() if overrides is PAIR else logits.softmax(-1)


@cache
def naive(path: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """A naive model that gives what enters its head, and the head's weight."""
    model = load_naive(path)
    head = model.lm_head.weight.detach()
    model.lm_head = torch.nn.Identity()
    return model, head


@pytest.fixture(scope="module")
def pooled(prunepath_checkpoint, dense_checkpoint):
    """``pooled(runner)``: what the engines gave; one process for all."""
    made = {}

    def get(runner: str) -> dict:
        if runner not in made:
            cases = {}
            for name, (family, *how) in CASES.items():
                if runner == "v1" or name in ON_V2:
                    cases[name] = [str(prunepath_checkpoint(family, default_tau=0.6)), *how]
                if runner == "v1":
                    cases[f"dense {name}"] = [str(dense_checkpoint(family)), *how]
            cases["no head"] = [str(prunepath_checkpoint("llama", default_tau=0.6)), "classify", None]
            made[runner] = run_engine("pooling", Path(), runner, SCRIPT, cases=cases)
        return made[runner]

    return get


@pytest.mark.parametrize(("name", "runner"), [*((name, "v1") for name in CASES), *((name, "v2") for name in ON_V2)])
def test_values_at_mixed_taus_are_the_naive_models_and_at_tau_1_the_dense_engines(
    pooled, prunepath_checkpoint, name, runner
):
    family, _, overrides = CASES[name]
    result = pooled(runner)
    assert "error" not in result[name], result[name]
    rows = [*result[name]["mixed"], *result[name]["default"]]
    for row in rows:
        values = expected(prunepath_checkpoint(family, default_tau=0.6), row["prompt"], row["tau"] or 0.6, overrides)
        torch.testing.assert_close(torch.tensor(row["values"]), values, atol=1e-5, rtol=1e-4)
    assert len({tuple(round(value, 3) for value in row["values"]) for row in rows}) == len(rows)
    if runner == "v1":
        for row, dense in zip(result[name]["tau 1"], result[f"dense {name}"]["tau 1"], strict=True):
            torch.testing.assert_close(*(torch.tensor(one["values"]) for one in (row, dense)), atol=1e-5, rtol=1e-4)


def test_a_head_that_nothing_makes_is_missing(pooled):
    assert "score.weight: not in the checkpoint" in pooled("v1")["no head"]["error"]


def test_embeddings_over_http_take_tau(serve, prunepath_checkpoint):
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    server = serve(checkpoint, "--runner", "pooling")
    prompt = build_tokenizer()(PROMPTS[1])["input_ids"]
    for extra, tau in (({"tau": 0.4}, 0.4), ({}, 0.6), ({"tau": 1.0}, 1.0)):
        answer = server.post("/v1/embeddings", dict(model=MODEL, input=PROMPTS[1], **extra))
        assert answer.status_code == 200, answer.text
        values = torch.tensor(answer.json()["data"][0]["embedding"])
        torch.testing.assert_close(values, expected(checkpoint, prompt, tau, None), atol=1e-5, rtol=1e-4)
    refused = server.post("/v1/embeddings", dict(model=MODEL, input="x", tau=3))
    assert refused.status_code == 400
    assert "tau must be a number in (0, 1.05], got 3" in refused.json()["error"]["message"]


def test_a_reranker_over_http_takes_tau(serve, prunepath_checkpoint):
    checkpoint = prunepath_checkpoint("qwen2", default_tau=0.6)
    server = serve(checkpoint, "--runner", "pooling", "--convert", "classify", "--hf-overrides", json.dumps(PAIR))
    prompts = build_tokenizer()([f"query{text}" for text in PROMPTS[:3]])["input_ids"]
    for tau in (0.4, 1.0):
        answer = server.post("/rerank", dict(model=MODEL, query="query", documents=PROMPTS[:3], tau=tau))
        assert answer.status_code == 200, answer.text
        for one in answer.json()["results"]:
            (value,) = expected(checkpoint, prompts[one["index"]], tau, PAIR)
            assert one["relevance_score"] == pytest.approx(value.item(), rel=1e-3)
        scored = server.post(
            "/score", dict(model=MODEL, text_1="query", text_2=PROMPTS[0], tau=tau, prunepath_report=True)
        )
        assert scored.status_code == 200, scored.text
        assert scored.json()["prunepath"]["tau"] == tau
