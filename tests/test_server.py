"""The knob over real HTTP: plain `vllm serve` in its own processes, the OpenAI client, every endpoint and refusal."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import torch
from naive import load_naive, naive_generate, naive_logits, naive_sparsity
from tiny_models import build_tokenizer

BIN = Path(sys.executable).parent
MODEL = "tiny"
START_SECONDS = 600  # 15 where the machine has nothing else to do
PROMPTS = ["hello world", "the quick brown fox " * 6, "1 2 3 4 5 6 7 8", "x", "to be or not to be, " * 3]
TAUS = (1.0, 0.8, 0.6, 0.4)
CURVE = [[0.2, 0.9], [0.5, 0.7], [0.8, 0.3], [1.0, 0.0]]


@dataclass(frozen=True)
class Server:
    """A running server and the checkpoint it serves."""

    url: str
    checkpoint: Path
    log: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, body: dict | None = None, *, raw: bytes | None = None) -> httpx.Response:
        content = json.dumps(body).encode() if raw is None else raw
        return httpx.post(self.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=120)


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """``serve(checkpoint, *flags)``: a server in multi-process mode; stopped at the end of the module."""
    running: list[subprocess.Popen] = []

    def start(checkpoint: Path, *flags: str, command: tuple[str, ...] = (str(BIN / "vllm"), "serve")) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("server") / "log.txt"
        common = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL, "--dtype", "float32"]
        common += ["--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager"]
        process = subprocess.Popen(
            [*command, str(checkpoint), *common, *flags],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        running.append(process)
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    return Server(url, checkpoint, log)
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(log.read_text()[-5000:])

    yield start
    for process in running:
        if process.poll() is not None:  # a test has ended it
            continue
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def llama(serve, prunepath_checkpoint) -> Server:
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6, tau_curve=CURVE)
    return serve(checkpoint, "--additional-config", '{"prunepath": {"default_tau": 0.7}}')


@pytest.fixture(scope="module")
def roberta(serve, prunepath_checkpoint) -> Server:
    return serve(prunepath_checkpoint("roberta", default_tau=0.6), command=(str(BIN / "prunepath"), "serve"))


def complete(server: Server, prompt: str = PROMPTS[1], **extra) -> list[int]:
    """The greedy completion of one prompt, as token ids (the text hides what is not UTF-8)."""
    completion = server.client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=10,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True, **extra},
    )
    return completion.choices[0].token_ids


def expected(server: Server, prompt: str, tau: float) -> list[int]:
    with torch.no_grad():
        return naive_generate(load_naive(server.checkpoint), build_tokenizer()(prompt)["input_ids"], tau, 10)


@pytest.mark.parametrize("extra", [{"tau": 0.4}, {"vllm_xargs": {"tau": 0.4}}], ids=["top-level", "vllm_xargs"])
def test_both_spellings_on_completions_equal_the_naive_model(llama, extra):
    assert complete(llama, **extra) == expected(llama, PROMPTS[1], 0.4)


def test_default_is_the_servers_over_the_checkpoints(llama):
    assert complete(llama) == complete(llama, tau=0.7) == expected(llama, PROMPTS[1], 0.7)


def test_sparsity_is_looked_up_in_the_curve(llama):
    assert complete(llama, sparsity=0.5) == complete(llama, tau=0.65) == expected(llama, PROMPTS[1], 0.65)
    assert complete(llama, vllm_xargs={"sparsity": 0}) == complete(llama, tau=1)


def test_chat_completions_streaming_and_not(llama):
    def chat(stream: bool, **extra) -> str:
        answer = llama.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=10,
            temperature=0,
            stream=stream,
            extra_body=extra,
        )
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
        return answer.choices[0].message.content

    answers = {tau: chat(False, tau=tau) for tau in TAUS}
    assert len(set(answers.values())) == len(TAUS)
    for tau, answer in answers.items():
        assert chat(True, tau=tau) == chat(True, vllm_xargs={"tau": tau}) == answer


def test_responses(llama):
    def respond(**extra) -> str:
        response = llama.client.responses.create(
            model=MODEL, input="hi", max_output_tokens=10, temperature=0, extra_body=extra
        )
        return response.output_text

    assert respond(tau=0.4) == respond(vllm_xargs={"tau": 0.4}) != respond(tau=1.0)


def test_n_greater_than_1_runs_every_choice_at_the_tau(llama):
    prompt = build_tokenizer()(PROMPTS[1])["input_ids"]
    completion = llama.client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=10,
        n=3,
        temperature=0.02,
        extra_body={"tau": 0.4, "ignore_eos": True, "return_token_ids": True},
    )
    assert len(completion.choices) == 3
    model = load_naive(llama.checkpoint)
    for choice in completion.choices:  # sampled: as good as the naive model's best, at this tau
        with torch.no_grad():
            logits = naive_logits(model, [*prompt, *choice.token_ids[:-1]], 0.4)[len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(choice.token_ids).unsqueeze(1)).squeeze(1)
        assert (logits.max(-1).values - chosen).max() < 0.3


BAD_TAUS = ["true", "false", '"0.8"', "NaN", "Infinity", "-Infinity", "[0.8]", '{"a": 1}', "0", "-1", "1.06", "1e999"]
BAD_SPARSITIES = ["true", '"0.5"', "NaN", "1", "1.0", "-0.1", "[]"]
ENDPOINTS = {
    "/v1/completions": {"model": MODEL, "prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/responses": {"model": MODEL, "input": "a", "max_output_tokens": 2},
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("nested", [False, True], ids=["top-level", "vllm_xargs"])
def test_bad_values_are_http_400_naming_parameter_and_range(llama, endpoint, nested):
    before = complete(llama, tau=0.6)
    cases = [("tau", value, "(0, 1.05]") for value in BAD_TAUS]
    cases += [("sparsity", value, "[0, 1)") for value in BAD_SPARSITIES]
    for name, value, accepted in cases:
        knob = f'"{name}": {value}'
        field = f'"vllm_xargs": {{{knob}}}' if nested else knob
        body = json.dumps(ENDPOINTS[endpoint])[:-1] + f", {field}}}"
        response = llama.post(endpoint, raw=body.encode())
        assert response.status_code == 400, (name, value, response.text)
        error = response.json()["error"]
        assert error["code"] == 400
        assert error["param"] == name
        assert name in error["message"]
        assert accepted in error["message"], error
    assert complete(llama, tau=0.6) == before


@pytest.mark.parametrize(
    "extra",
    [
        {"tau": 0.5, "sparsity": 0.5},
        {"tau": 0.5, "vllm_xargs": {"sparsity": 0.5}},
        {"tau": 0.5, "vllm_xargs": {"tau": 0.6}},
    ],
    ids=["both", "both-in-two-places", "two-values"],
)
def test_contradictions_are_http_400(llama, extra):
    response = llama.post("/v1/completions", {**ENDPOINTS["/v1/completions"], **extra})
    assert response.status_code == 400
    assert "0.5" in response.json()["error"]["message"]


def test_null_is_absent_and_broken_json_is_the_engines_business(llama):
    assert complete(llama, tau=None) == complete(llama)
    assert llama.post("/v1/completions", raw=b'{"tau": 0.5').status_code in (400, 422)
    assert llama.post("/v1/completions", raw=b"[1]").status_code in (400, 422)


def test_64_concurrent_requests_of_mixed_tau_equal_their_lone_runs(llama):
    jobs = [(PROMPTS[i % len(PROMPTS)] + str(i), TAUS[i % len(TAUS)]) for i in range(64)]
    lone = [complete(llama, prompt, tau=tau) for prompt, tau in jobs]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda job: complete(llama, job[0], tau=job[1]), jobs))
    assert together == lone
    for (prompt, tau), tokens in list(zip(jobs, lone, strict=True))[::9]:
        assert tokens == expected(llama, prompt, tau)


@pytest.mark.parametrize("extra", [{"tau": 0.4}, {"vllm_xargs": {"tau": 0.4}}], ids=["top-level", "vllm_xargs"])
def test_classify_takes_the_knob(roberta, extra):
    model = load_naive(roberta.checkpoint)
    ids = build_tokenizer()(PROMPTS[1])["input_ids"]
    response = roberta.post("/classify", {"model": MODEL, "input": PROMPTS[1], **extra})
    assert response.status_code == 200, response.text
    with torch.no_grad():
        probabilities = naive_logits(model, ids, 0.4).softmax(-1)
    torch.testing.assert_close(torch.tensor(response.json()["data"][0]["probs"]), probabilities, atol=1e-4, rtol=1e-3)


def test_a_classification_reports_what_its_tokens_left_out(roberta):
    model = load_naive(roberta.checkpoint)
    response = roberta.post("/classify", {"model": MODEL, "input": PROMPTS[1], "tau": 0.4, "prunepath_report": True})
    report = response.json()["prunepath"]
    naive_logits(model, build_tokenizer()(PROMPTS[1])["input_ids"], 0.4)
    assert report["prompt_ffn_sparsity"] == pytest.approx(naive_sparsity(model).mean().item(), abs=1e-6)
    assert (report["tau"], report["ffn_sparsity"]) == (0.4, None)


@pytest.mark.parametrize("knob", [{"tau": 2}, {"vllm_xargs": {"tau": True}}, {"sparsity": 0.5}], ids=str)
def test_classify_refuses_what_the_others_refuse(roberta, knob):
    response = roberta.post("/classify", {"model": MODEL, "input": "a", **knob})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "tau" in message or "sparsity" in message
