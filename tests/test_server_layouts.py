"""Two engines behind two API servers, on CPU processes: every request is answered, counted and told as by one."""

import concurrent.futures
import json

import pytest
import test_server
from prometheus_client.parser import text_string_to_metric_families
from test_server import BIN, CURVE, HTTP, MODEL, PROMPTS, TAUS, Server, complete, expected
from test_server_policy import metrics

serve = test_server.serve


@pytest.fixture(scope="module")
def server(serve, prunepath_checkpoint) -> Server:
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6, tau_curve=CURVE)
    layout = ["--data-parallel-size", "2", "--api-server-count", "2"]
    policy = ["--additional-config", json.dumps({"prunepath": {"default_tau": 0.7, "min_tau": 0.3}})]
    return serve(checkpoint, *layout, *policy, command=(str(BIN / "prunepath"), "serve"))


def answered(server: Server) -> dict[str, float]:
    """Requests by the engine that answered them."""
    families = text_string_to_metric_families(HTTP.get(f"{server.url}/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    counts: dict[str, float] = {}
    for sample in samples:
        if sample.name == "vllm:request_success_total":
            counts[sample.labels["engine"]] = counts.get(sample.labels["engine"], 0) + sample.value
    return counts


def test_every_request_is_answered_counted_and_told_whichever_engine_ran_it(server):
    before = metrics(server)
    sent = [(f"{prompt}{tau}", tau) for prompt in PROMPTS[:4] for tau in TAUS]

    def ask(prompt: str, tau: float) -> dict:
        body = dict(model=MODEL, prompt=prompt, max_tokens=10, temperature=0, tau=tau, prunepath_report=True)
        answer = server.post("/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True})
        assert answer.status_code == 200, answer.text
        return answer.json()

    with concurrent.futures.ThreadPoolExecutor(len(sent)) as pool:
        answers = list(pool.map(ask, *zip(*sent, strict=True)))
    used = tokens = 0.0
    for (prompt, tau), answer in zip(sent, answers, strict=True):
        report, prompt_tokens = answer["prunepath"], answer["usage"]["prompt_tokens"]
        assert answer["choices"][0]["token_ids"] == expected(server, prompt, tau)
        assert report["tau"] == tau
        used += prompt_tokens * (1 - report["prompt_ffn_sparsity"]) + 9 * (1 - report["ffn_sparsity"])
        tokens += prompt_tokens + 9  # the last token of an answer is not run
    after = metrics(server)
    added = {name: value - before.get(name, 0) for name, value in after.items()}
    assert added["prunepath:request_tau_count"] == len(sent)
    assert added["prunepath:tokens_total"] == tokens
    # What the requests were told is what the workers of both engines counted.
    share = added["prunepath:experts_active_total"] / added["prunepath:experts_possible_total"]
    assert used / tokens == pytest.approx(share, rel=1e-5)
    assert 0 < share < 1
    engines = answered(server)
    assert len(engines) == 2
    assert min(engines.values()) > 0


def test_refusals_and_defaults_are_those_of_every_api_server(server):
    for _ in range(6):  # connections go to either
        refused = server.post("/v1/completions", dict(model=MODEL, prompt="x", tau=0.2))
        assert refused.status_code == 400, refused.text
        assert "min_tau" in refused.json()["error"]["message"]
    assert complete(server) == expected(server, PROMPTS[1], 0.7)


def test_an_idle_server_gives_the_highest_tau(server):
    for _ in range(6):
        body = dict(model=MODEL, prompt="x", max_tokens=2, tau="auto", prunepath_report=True)
        assert server.post("/v1/completions", body).json()["prunepath"]["tau"] == 1.0
