"""What an operator has over `vllm serve`, on a real `prunepath serve`: bounds, prefill tau, info, metrics, reports."""

import concurrent.futures
import functools
import http.client
import json
import re
import time
from pathlib import Path

import anthropic
import openai
import pytest
import test_server
import torch
from naive import NaiveFFN, load_naive, naive_logits, naive_sparsity
from prometheus_client.parser import text_string_to_metric_families
from test_engine import run_engine
from test_server import BIN, ENDPOINTS, HTTP, MODEL, PROMPTS, Server, complete
from tiny_models import build_tokenizer
from torch import Tensor

serve = test_server.serve

CURVE = [[0.2, 0.9], [0.5, 0.7], [0.8, 0.3], [1.0, 0.0]]
PREFILL_TAU = 0.5
BLOCK = 32
TAUS = (0.4, 0.7, 1.0)
BOUNDS = {"default_tau": 0.7, "min_tau": 0.4, "max_tau": 1.0, "prefill_tau": PREFILL_TAU, "full_queue": 2}
COARSE = "tiny-coarse"


@pytest.fixture(scope="module")
def server(serve, prunepath_checkpoint) -> Server:
    policy = {**BOUNDS, "default_tau_by_model": {COARSE: 0.5}}
    options = ["--additional-config", json.dumps({"prunepath": policy}), "--enable-prompt-tokens-details"]
    options += ["--served-model-name", MODEL, COARSE]
    # Room for 384 tokens in all: several requests at once are preempted and resumed.
    options += ["--block-size", str(BLOCK), "--num-gpu-blocks-override", "12"]
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6, tau_curve=CURVE)
    return serve(checkpoint, *options, command=(str(BIN / "prunepath"), "serve"))


@pytest.fixture(scope="module")
def naive(prunepath_checkpoint):
    return prefilling_model(prunepath_checkpoint("llama", default_tau=0.6, tau_curve=CURVE))


def prefilling_model(checkpoint: Path):
    """The naive model; what its block calls dense positions, it computes at PREFILL_TAU."""
    model = load_naive(checkpoint)
    for module in model.modules():
        if isinstance(module, NaiveFFN):
            token = module.token
            # 1.0 stands for a position of the prompt; decode asks for 1.05 where it means every expert.
            module.token = lambda x, routed, tau, token=token: token(x, routed, PREFILL_TAU if tau == 1.0 else tau)
    return model


def greedy(model, prompt: list[int], tokens: list[int], tau: float) -> list[int]:
    """What greedy decoding has after the prompt and after each of `tokens` but the last, in one pass.

    Positions of the prompt are at PREFILL_TAU and later ones at `tau`.
    """
    for module in model.modules():
        if isinstance(module, NaiveFFN):
            module.block["dense_positions"] = len(prompt)
    logits = naive_logits(model, [*prompt, *tokens[:-1]], max(tau, 1.05) if tau >= 1 else tau)
    return logits[len(prompt) - 1 :].argmax(-1).tolist()


def expected(model, prompt: list[int], tau: float, count: int) -> list[int]:
    """`count` greedy tokens with positions of the prompt at PREFILL_TAU and later ones at `tau`."""
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(greedy(model, prompt, [*tokens, 0], tau)[-1])
    return tokens


def run(server: Server, prompt: list[int], tau: float, count: int) -> tuple[list[int], int]:
    """(new tokens, prompt tokens found in the prefix cache)."""
    answer = server.client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=count,
        temperature=0,
        extra_body={"tau": tau, "ignore_eos": True, "return_token_ids": True},
    )
    details = answer.usage.prompt_tokens_details
    return answer.choices[0].token_ids, (details and details.cached_tokens) or 0


@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    ("knob", "param"),
    [
        ({"tau": 0.39}, "tau"),
        ({"tau": 1.01}, "tau"),
        ({"vllm_xargs": {"tau": 0.2}}, "tau"),
        ({"sparsity": 0.8}, "sparsity"),
        ({"vllm_xargs": {"sparsity": 0.8}}, "sparsity"),
    ],
    ids=str,
)
def test_outside_the_bounds_is_http_400_naming_field_value_and_bounds(server, endpoint, knob, param, stream):
    response = server.post(endpoint, {**ENDPOINTS[endpoint], **knob, "stream": stream})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    asked = next(iter(knob.get("vllm_xargs", knob).values()))
    assert error["param"] == param
    assert error["code"] == 400
    assert f"{param} " in error["message"]
    assert str(asked) in error["message"]
    assert "[0.4, 1.0] (this server's min_tau and max_tau)" in error["message"]


def test_the_official_client_sees_a_bad_request(server):
    with pytest.raises(openai.BadRequestError, match="min_tau"):
        complete(server, tau=0.1)


def test_the_bounds_themselves_and_a_sparsity_within_are_served(server):
    for knob in ({"tau": 0.4}, {"tau": 1}, {"sparsity": 0.7}, {}):
        assert len(complete(server, **knob)) == 10


@pytest.mark.parametrize("nested", [False, True], ids=["top-level", "vllm_xargs"])
@pytest.mark.parametrize(
    ("tau", "said"),
    [
        ("Auto", "tau must be a number in (0, 1.05]"),
        ({}, '"auto" or {"min": a, "max": b}'),
        ({"min": 0.5}, '"auto" or {"min": a, "max": b}'),
        ({"min": 0.5, "max": "1"}, "tau.max must be a number in (0, 1.05], got '1'"),
        ({"min": 0.9, "max": 0.5}, "tau.min must be at most tau.max 0.5, got 0.9"),
        ({"min": 0.1, "max": 0.3}, "[0.1, 0.3] has nothing in common with [0.4, 1.0]"),
    ],
    ids=str,
)
def test_a_malformed_range_is_http_400_saying_what_was_expected(server, tau, said, nested):
    knob = {"vllm_xargs": {"tau": tau}} if nested else {"tau": tau}
    response = server.post("/v1/completions", {**ENDPOINTS["/v1/completions"], **knob})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "tau"
    assert said in error["message"]


@pytest.mark.parametrize(
    ("model", "knob", "tau"),
    [(MODEL, {}, 0.7), (COARSE, {}, 0.5), (COARSE, {"tau": None}, 0.5), (COARSE, {"tau": 0.9}, 0.9)],
    ids=str,
)
def test_every_served_name_has_its_default(server, model, knob, tau):
    told = {**knob, "prunepath_report": True}
    answer = server.client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "hi"}], max_tokens=2, extra_body=told
    )
    assert answer.model_extra["prunepath"]["tau"] == tau


@pytest.mark.parametrize("beams", [True, "true"], ids=repr)
def test_a_beam_search_that_would_not_get_its_tau_is_refused(server, beams):
    for endpoint in ("/v1/completions", "/v1/chat/completions"):
        body = {**ENDPOINTS[endpoint], "use_beam_search": beams, "n": 2, "max_tokens": 3}
        for knob in ({"tau": 0.8}, {}):
            response = server.post(endpoint, {**body, **knob})
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert error["param"] == "use_beam_search"
            assert f"prefill_tau {PREFILL_TAU}; expected tau {PREFILL_TAU}, or no use_beam_search" in error["message"]
        assert server.post(endpoint, {**body, "tau": PREFILL_TAU}).status_code == 200


def ask_report(server: Server, knob: dict, prompt: list[int], **options):
    """An answer of four greedy tokens that tells what it ran at."""
    told = {**knob, "ignore_eos": True, "return_token_ids": True, "prunepath_report": True}
    body = dict(model=MODEL, prompt=prompt, max_tokens=4, temperature=0)
    return server.client.completions.create(**body, **options, extra_body=told)


def test_an_idle_server_gives_the_highest_tau_of_a_range(server, naive):
    prompt = build_tokenizer()("at leisure")["input_ids"]
    for asked, tau in [("auto", 1.0), ({"min": 0.5, "max": 0.8}, 0.8), ({"min": 0.2, "max": 1.05}, 1.0)]:
        for knob in ({"tau": asked}, {"vllm_xargs": {"tau": asked}}):
            answer = ask_report(server, knob, prompt)
            assert answer.model_extra["prunepath"]["tau"] == tau
            assert answer.choices[0].token_ids == expected(naive, prompt, tau, 4)


@pytest.mark.parametrize("tau", TAUS)
def test_prompts_run_at_the_prefill_tau_and_answers_at_the_requests(server, naive, tau):
    prompt = build_tokenizer()(PROMPTS[1])["input_ids"]
    tokens, _ = run(server, prompt, tau, 10)
    assert tokens == expected(naive, prompt, tau, 10)


def test_a_prompt_is_computed_once_for_every_tau(server, naive):
    prompt = build_tokenizer()("shared by all the taus: " + PROMPTS[4])["input_ids"]
    blocks = (len(prompt) - 1) // BLOCK
    assert blocks >= 2
    assert run(server, prompt, 0.4, 2)[1] == 0
    for tau in (1.0, 0.8, 0.4):
        tokens, cached = run(server, prompt, tau, 6)
        assert cached == blocks * BLOCK
        assert tokens == expected(naive, prompt, tau, 6)


@pytest.mark.parametrize("tau", [0.4, 1.0])
def test_generated_tokens_of_another_tau_are_never_taken_for_a_prompt(server, naive, tau):
    prompt = build_tokenizer()(f"a first turn at {tau}: " + "abc " * 6)["input_ids"]
    answer, _ = run(server, prompt, tau, 80)
    second = [*prompt, *answer, *build_tokenizer()(" and the next turn")["input_ids"]]
    tokens, cached = run(server, second, tau, 6)
    assert cached == len(prompt) // BLOCK * BLOCK
    assert tokens == expected(naive, second, tau, 6)


def test_generated_tokens_at_the_prefill_tau_are_part_of_the_next_prompt(server, naive):
    prompt = build_tokenizer()("a first turn at the prefill tau: " + "abc " * 6)["input_ids"]
    answer, _ = run(server, prompt, PREFILL_TAU, 80)
    second = [*prompt, *answer]
    tokens, cached = run(server, second, 1.0, 6)
    assert cached == (len(second) - 1) // BLOCK * BLOCK
    assert tokens == expected(naive, second, 1.0, 6)


def metrics(server: Server) -> dict[str, float]:
    """Samples of /metrics by name, summed over labels other than a histogram's bound and a step's kind."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(HTTP.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            label = sample.labels.get("le") or sample.labels.get("kind")
            name = sample.name + (f":{label}" if label else "")
            values[name] = values.get(name, 0) + sample.value
    return values


def until(condition) -> None:
    """Wait for it, a minute at most, and leave the server time for its work."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_preempted_requests_keep_both_taus(server, naive):
    """Each body has four prompts, admitted as one, whose blocks do not fit: they overlap on a busy machine too."""
    before = metrics(server)["vllm:num_preemptions_total"]
    prompts = [build_tokenizer()(f"{i}: {PROMPTS[1]}")["input_ids"][:50] for i in range(4)]

    def answers(tau: float) -> list[list[int]]:
        told = {"tau": tau, "ignore_eos": True, "return_token_ids": True}
        body = dict(model=MODEL, prompt=prompts, max_tokens=100, temperature=0)
        return [choice.token_ids for choice in server.client.completions.create(**body, extra_body=told).choices]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        results = list(zip(TAUS, pool.map(answers, TAUS), strict=True))
    assert metrics(server)["vllm:num_preemptions_total"] > before
    for tau, lists in results:
        for prompt, tokens in zip(prompts, lists, strict=True):
            assert len(tokens) == 100
            assert tokens == greedy(naive, prompt, tokens, tau)


def test_a_queue_lowers_the_tau_that_requests_leave_to_the_server(server, naive):
    prompt = build_tokenizer()("under pressure")["input_ids"]
    before = metrics(server)
    admitted = before.get("prunepath:request_tau_count", 0)
    body = dict(model=MODEL, prompt=PROMPTS[:1] * 20, max_tokens=200, tau=1.0, ignore_eos=True)
    pressure = http.client.HTTPConnection(server.url.removeprefix("http://"))
    knobs = [{"tau": "auto"}, {"vllm_xargs": {"tau": {"min": 0.6, "max": 1.0}}}, {"tau": 0.9}]
    engine = server.engine

    def sent_in_all(count: int) -> bool:
        return metrics(server).get("prunepath:request_tau_count", 0) == admitted + count

    def queues() -> bool:
        """Whether the engine does, after a few steps more."""
        engine.resume()
        time.sleep(0.05)
        engine.suspend()
        return metrics(server)["vllm:num_requests_waiting"] >= 4

    pool = concurrent.futures.ThreadPoolExecutor()
    engine.suspend()  # it keeps its queue as it is then, however slowly a loaded machine answers
    try:
        pressure.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        until(lambda: sent_in_all(20))
        until(queues)
        sent = [pool.submit(ask_report, server, knob, prompt) for knob in knobs]
        stream = pool.submit(lambda: list(ask_report(server, {"tau": "auto"}, prompt, stream=True)))
        until(lambda: sent_in_all(24))
    finally:
        pressure.close()
        engine.resume()
    for answer, tau in zip(sent, (0.4, 0.6, 0.9), strict=True):
        assert answer.result().model_extra["prunepath"]["tau"] == tau
        assert answer.result().choices[0].token_ids == expected(naive, prompt, tau, 4)
    assert stream.result()[-1].model_extra["prunepath"]["tau"] == 0.4
    after = metrics(server)
    buckets = [f"prunepath:request_tau_bucket:{le}" for le in (0.4, 0.6)]
    counted = [after[name] - before.get(name, 0) for name in buckets]
    assert counted == [2, 3]
    until(lambda: not metrics(server)["vllm:num_requests_waiting"])
    assert ask_report(server, {"tau": "auto"}, prompt).model_extra["prunepath"]["tau"] == 1.0


def test_metrics_count_what_was_sent(server, naive):
    before = metrics(server)
    sent = {0.4: 0.7 + (0.9 - 0.7) / 3, 0.65: 0.5, 1.0: 0.0}  # tau, and its FFN sparsity on the curve
    prompts = {tau: build_tokenizer()(f"counted {tau}")["input_ids"] for tau in sent}
    for tau, prompt in prompts.items():
        assert run(server, prompt, tau, 10)[1] == 0
    after = metrics(server)
    added = {name: value - before.get(name, 0) for name, value in after.items()}

    assert added["prunepath:request_tau_count"] == 3
    assert added["prunepath:request_tau_sum"] == pytest.approx(0.4 + 0.65 + 1.0)
    below = [added[f"prunepath:request_tau_bucket:{le}"] for le in ("0.3", "0.4", "0.7", "0.99", "1.0")]
    assert below == [0, 1, 2, 2, 3]
    prompt_tokens = sum(len(prompt) for prompt in prompts.values())
    assert added["prunepath:tokens_total"] == prompt_tokens + 3 * 9  # the last token of an answer is not run
    assert added["prunepath:steps_total:dense"] == 9  # the third answer; its prompt ran at the prefill tau
    assert added["prunepath:steps_total:routed"] == 3 + 2 * 9
    experts = json.loads((server.checkpoint / "config.json").read_text())["prunepath_config"]["num_experts"]
    possible = added["prunepath:experts_possible_total"]
    assert possible == added["prunepath:tokens_total"] * 3 * experts  # layers
    active = 0
    for tau, prompt in prompts.items():
        expected(naive, prompt, tau, 10)
        active += round((1 - naive_sparsity(naive)).sum().item() * experts)
    assert added["prunepath:experts_active_total"] == active
    layer_runs = 3 * (3 + 3 * 9)
    assert added["prunepath:layer_runs_total"] == layer_runs
    assert added["prunepath:experts_readable_total"] == layer_runs * experts
    assert active / possible < added["prunepath:experts_read_total"] / (layer_runs * experts) <= 1
    sparsity = prompt_tokens * 0.7 + sum(9 * share for share in sent.values())
    assert added["prunepath:expected_ffn_sparsity_tokens_total"] == pytest.approx(sparsity, rel=1e-5)


def test_refused_requests_are_not_counted(server):
    before = metrics(server)["prunepath:request_tau_count"]
    assert server.post("/v1/completions", {**ENDPOINTS["/v1/completions"], "tau": 0.1}).status_code == 400
    assert metrics(server)["prunepath:request_tau_count"] == before


def test_the_playground_is_one_file_that_asks_nobody_else(server):
    answer = HTTP.get(f"{server.url}/prunepath")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; connect-src 'self';")
    called = re.findall(r'fetch\("([^"]*)"', answer.text)
    assert called == ["v1/chat/completions", "prunepath/info"]
    linked = re.findall(r"""(?:src|href)=|url\(|@import|https?://[^"]*""", answer.text)
    assert linked == ["http://www.w3.org/2000/svg"]  # a name, not an address


def test_info_says_what_is_served_and_what_may_be_asked(server):
    info = HTTP.get(f"{server.url}/prunepath/info").json()
    block = json.loads((server.checkpoint / "config.json").read_text())
    experts = {**block["prunepath_config"], "kept_share": 1.0}
    assert info["model"]["served_names"] == [MODEL, COARSE]
    assert info["model"]["num_layers"] == block["num_hidden_layers"]
    assert info["model"]["max_model_len"] == 256
    assert {name: experts[name] for name in info["experts"]} == info["experts"]
    assert info["memory"] == {"host_experts": 0.0, "gpu_expert_gib": None}
    assert info["tau_curve"] == CURVE
    assert info["defaults"] == {"tau": 0.7, "tau_by_model": {COARSE: 0.5}, "prefill_tau": PREFILL_TAU}
    limits = info["limits"]
    assert (limits["min_tau"], limits["max_tau"]) == (0.4, 1.0)
    assert (limits["auto_tau"], limits["full_queue"]) == ([0.4, 1.0], 2)
    assert str(server.checkpoint) not in json.dumps(info)


REPORT = {
    "tau": 0.8,
    "prompt_tau": PREFILL_TAU,
    "expected_ffn_sparsity": pytest.approx(0.3),
    "expected_prompt_ffn_sparsity": pytest.approx(0.7),
    "ffn_sparsity": pytest.approx(0.5, abs=0.5),
    "ffn_sparsity_by_layer": pytest.approx([0.5] * 3, abs=0.5),
    "prompt_ffn_sparsity": pytest.approx(0.5, abs=0.5),
    "prompt_ffn_sparsity_by_layer": pytest.approx([0.5] * 3, abs=0.5),
}
"""Of answers and prompts whose counts are not looked at."""
WANTED = {"sparsity": 0.3, "prunepath_report": True}


@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("tau", [0.4, 1.0])
def test_a_report_tells_the_sparsity_that_the_tokens_had(server, naive, tau, stream):
    """While requests of another tau run beside it."""
    prompt = build_tokenizer()(f"{stream} {tau}: counted for one request")["input_ids"]
    body = dict(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
    told = {"tau": tau, "ignore_eos": True, "return_token_ids": True, "prunepath_report": True}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        others = [pool.submit(complete, server, f"{i} " + PROMPTS[3], tau=0.6) for i in range(2)]
        answer = server.client.completions.create(**body, stream=stream, extra_body=told)
        report = (list(answer)[-1] if stream else answer).model_extra["prunepath"]
        assert all(len(other.result()) == 10 for other in others)
    tokens = expected(naive, prompt, tau, 8)  # which ran the model on all of them but the last
    sparsity = naive_sparsity(naive)
    assert sparsity.shape[1] == len(prompt) + len(tokens) - 1
    assert report["prompt_ffn_sparsity"] == pytest.approx(sparsity[:, : len(prompt)].mean().item(), abs=1e-6)
    assert report["ffn_sparsity"] == pytest.approx(sparsity[:, len(prompt) :].mean().item(), abs=1e-6)
    assert report["ffn_sparsity_by_layer"] == pytest.approx(sparsity[:, len(prompt) :].mean(1).tolist(), abs=1e-4)


def test_a_report_counts_all_prompts_of_a_request(server, naive):
    prompts = [build_tokenizer()(text)["input_ids"] for text in ("one of two prompts", "and the longer one of the two")]
    told = {"tau": 0.4, "ignore_eos": True, "prunepath_report": True}
    answer = server.client.completions.create(model=MODEL, prompt=prompts, max_tokens=4, temperature=0, extra_body=told)
    parts: list[list[Tensor]] = [[], []]
    for prompt in prompts:
        expected(naive, prompt, 0.4, 4)
        for part, sparsity in zip(parts, naive_sparsity(naive).split([len(prompt), 3], dim=1), strict=True):
            part.append(sparsity)
    means = [torch.cat(part, dim=1).mean().item() for part in parts]
    report = answer.model_extra["prunepath"]
    assert [report["prompt_ffn_sparsity"], report["ffn_sparsity"]] == pytest.approx(means, abs=1e-6)


def test_a_report_comes_with_the_answer_that_asked_for_it(server):
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
    plain = server.client.chat.completions.create(**chat, extra_body={"sparsity": 0.3})
    told = server.client.chat.completions.create(**chat, extra_body=WANTED)
    assert told.model_extra["prunepath"] == REPORT
    assert "prunepath" not in plain.model_extra
    assert told.choices == plain.choices
    nested = {"vllm_xargs": {"tau": 0.8, "prunepath_report": True}}
    text = server.client.completions.create(model=MODEL, prompt="a", max_tokens=2, extra_body=nested)
    assert text.model_extra["prunepath"] == REPORT
    response = server.client.responses.create(
        model=MODEL, input="a", max_output_tokens=4, extra_body={**WANTED, "ignore_eos": True}
    )
    assert response.model_extra["prunepath"] == REPORT


@pytest.mark.parametrize("usage", [False, True], ids=["", "usage"])
def test_a_stream_reports_in_a_chunk_without_choices(server, usage):
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "data: hi"}], "max_tokens": 6, "temperature": 0}
    options = {"stream": True, "stream_options": {"include_usage": usage}}
    stream = functools.partial(server.client.chat.completions.create, **chat, **options)
    for _ in range(5):
        plain = list(stream(extra_body={"sparsity": 0.3, "ignore_eos": True}))
        *told, last = stream(extra_body={**WANTED, "ignore_eos": True})
        if len(told) == len(plain):
            break  # else vLLM merged outputs of one that its busy reader had not taken yet
    assert last.model_extra["prunepath"] == REPORT
    assert (last.choices, last.object, last.model) == ([], "chat.completion.chunk", MODEL)
    assert last.id == told[0].id
    assert [chunk.choices for chunk in told] == [chunk.choices for chunk in plain]
    assert not any("prunepath" in (chunk.model_extra or {}) for chunk in told)


def test_a_stream_of_responses_reports_in_its_last_event(server):
    stream = server.client.responses.create(
        model=MODEL, input="a", max_output_tokens=4, stream=True, extra_body={**WANTED, "ignore_eos": True}
    )
    *_, last = stream
    assert last.type == "response.completed"
    assert last.response.model_extra["prunepath"] == REPORT


def there(server: Server, response_id: str) -> bool:
    return server.client.responses.retrieve(response_id).status not in ("queued", "in_progress")


def in_the_background(server: Server, **options):
    told = {**WANTED, "ignore_eos": True}
    body = dict(model=MODEL, input="later", max_output_tokens=40, background=True, store=True)
    return server.client.responses.create(**body, **options, extra_body=told)


def test_a_response_in_the_background_reports_when_it_is_there(server):
    queued = in_the_background(server)
    assert queued.status in ("queued", "in_progress")
    assert "prunepath" not in queued.model_extra
    until(lambda: there(server, queued.id))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        fetched = [pool.submit(server.client.responses.retrieve, queued.id) for _ in range(4)]
    assert [one.result().model_extra["prunepath"] for one in fetched] == [REPORT] * 4
    plain = server.client.responses.create(model=MODEL, input="later", max_output_tokens=2, background=True)
    until(lambda: there(server, plain.id))
    assert "prunepath" not in server.client.responses.retrieve(plain.id).model_extra


def test_a_streamed_response_in_the_background_reports_to_who_comes_back(server):
    *_, last = events = list(in_the_background(server, stream=True))
    assert last.response.model_extra["prunepath"] == REPORT
    again = server.client.responses.retrieve(events[0].response.id)
    assert again.model_extra["prunepath"] == last.response.model_extra["prunepath"]
    *_, last = server.client.responses.retrieve(again.id, stream=True)
    assert last.response.model_extra["prunepath"] == REPORT


def test_messages_report_in_the_body_or_the_last_event(server):
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    asked = {"temperature": 0, "sparsity": 0.3}
    told = {**asked, "prunepath_report": True}
    body = dict(model=MODEL, max_tokens=6, messages=[{"role": "user", "content": "hi"}])
    assert client.messages.create(**body, extra_body=told).model_extra["prunepath"] == REPORT
    *events, last = client.messages.create(**body, stream=True, extra_body=told)
    assert last.type == "message_stop"
    assert last.model_extra["prunepath"] == REPORT
    assert not any("prunepath" in (event.model_extra or {}) for event in events)
    with client.messages.stream(**body, extra_body=told) as stream:
        text = stream.get_final_text()
    assert text == client.messages.create(**body, extra_body=asked).content[0].text
    *_, plain = client.messages.create(**body, stream=True, extra_body=asked)
    assert "prunepath" not in (plain.model_extra or {})


@pytest.mark.parametrize("value", [1, "yes", []], ids=repr)
def test_a_report_is_asked_for_with_true(server, value):
    response = server.post("/v1/completions", {**ENDPOINTS["/v1/completions"], "prunepath_report": value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "prunepath_report"
    assert repr(value) in error["message"]


def test_a_refused_request_that_wanted_a_report_gets_the_refusal(server):
    for stream in (False, True):
        body = {**ENDPOINTS["/v1/completions"], "tau": 0.1, "prunepath_report": True, "stream": stream}
        response = server.post("/v1/completions", body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tau"


def test_the_v2_runner_keeps_both_taus_under_preemption_and_chunked_prompts(prunepath_checkpoint, naive):
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6, tau_curve=CURVE)
    result = run_engine("preemption", checkpoint, "v2", policy={"prefill_tau": PREFILL_TAU}, max_tokens=20)
    assert result["preemptions"] > 0
    for row in result["mixed"]:
        (tokens,) = row["tokens"]
        assert tokens == greedy(naive, row["prompt"], tokens, row["tau"])
