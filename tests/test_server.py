"""The knob over real HTTP: plain `vllm serve` in its own processes, the OpenAI client, every endpoint and refusal."""

import concurrent.futures
import json
import os
import re
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
import psutil
import pytest
import torch
import warm
from naive import load_naive, naive_generate, naive_logits, naive_sparsity
from tiny_models import build_tokenizer

BIN = Path(sys.executable).parent
VLLM_SERVE = (str(BIN / "vllm"), "serve")
MODEL = "tiny"
START_SECONDS = 600  # 15 where the machine has nothing else to do
PROMPTS = ["hello world", "the quick brown fox " * 6, "1 2 3 4 5 6 7 8", "x", "to be or not to be, " * 3]
TAUS = (1.0, 0.8, 0.6, 0.4)
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_RESPONSES_API_STORE": "1",  # responses in the background are fetched from it
}
CURVE = [[0.2, 0.9], [0.5, 0.7], [0.8, 0.3], [1.0, 0.0]]

# A connection for each request, as of a client for each. A TLS context, which none needs, takes longer than an answer.
HTTP = httpx.Client(verify=False, timeout=120, limits=httpx.Limits(max_keepalive_connections=0))


@dataclass(frozen=True)
class Server:
    """A running server and the checkpoint it serves."""

    url: str
    checkpoint: Path
    log: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=HTTP)

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(int(re.search(r"Started server process \[(\d+)\]", self.log.read_text()).group(1)))

    @property
    def engine(self) -> psutil.Process:
        family = self.process.children(recursive=True)
        return next(child for child in family if "EngineCore" in " ".join(child.cmdline()))

    def post(self, path: str, body: dict | None = None, *, raw: bytes | None = None) -> httpx.Response:
        content = json.dumps(body).encode() if raw is None else raw
        return HTTP.post(self.url + path, content=content, headers={"Content-Type": "application/json"})


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """``serve(checkpoint, *flags)``: a server in multi-process mode; stopped at the end of the module.

    With ``popen=subprocess.Popen`` every process of it starts as a user's does.
    """
    running: list[subprocess.Popen] = []

    def start(
        checkpoint: Path, *flags: str, command: tuple[str, ...] = VLLM_SERVE, popen: type[subprocess.Popen] = warm.Popen
    ) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("server") / "log.txt"
        common = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL, "--dtype", "float32"]
        common += ["--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager"]
        common += ["--num-gpu-blocks-override", "256"]  # the cache is filled with zeros, all of it
        process = popen(
            [*command, str(checkpoint), *common, *flags],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        running.append(process)
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if HTTP.get(f"{url}/health").status_code == 200:
                    return Server(url, checkpoint, log)
            except httpx.TransportError:
                pass
            time.sleep(0.1)
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
    return serve(
        checkpoint,
        "--additional-config",
        '{"prunepath": {"default_tau": 0.7}}',
        "--enable-scale-out",
        popen=subprocess.Popen,
    )


@pytest.fixture(scope="module")
def roberta(serve, prunepath_checkpoint) -> Server:
    return serve(
        prunepath_checkpoint("roberta", default_tau=0.6),
        command=(str(BIN / "prunepath"), "serve"),
    )


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


@pytest.mark.parametrize(
    ("knob", "tau"),
    [
        ({}, 0.7),
        ({"tau": 0.4}, 0.4),
        ({"vllm_xargs": {"tau": 0.4}}, 0.4),
        ({"sparsity": 0.5}, 0.65),
        ({"tau": {"min": 0.4, "max": 0.8}}, 0.8),
        ({"vllm_xargs": {"tau": {"min": 0.4, "max": 0.8}}}, 0.8),
        ({"tau": "auto", "prunepath_report": True}, 1.0),
    ],
    ids=str,
)
def test_a_rendered_request_keeps_its_knob(llama, knob, tau):
    body = {"model": MODEL, "prompt": PROMPTS[1], "max_tokens": 10, "temperature": 0, "ignore_eos": True, **knob}
    response = llama.post("/v1/completions/render", body)
    assert response.status_code == 200, response.text
    (rendered,) = response.json()
    asked = {name: value for name, value in {**knob, **knob.get("vllm_xargs", {})}.items() if name != "vllm_xargs"}
    assert (rendered["sampling_params"].get("extra_args") or {}) == asked
    answer = llama.post("/inference/v1/generate", rendered).json()
    assert answer["choices"][0]["token_ids"] == complete(llama, PROMPTS[1], tau=tau)
    assert ("prunepath" in answer) == ("prunepath_report" in knob)
    if "prunepath_report" in knob:
        assert answer["prunepath"]["tau"] == tau
        stream = llama.post("/inference/v1/generate", {**rendered, "stream": True}).text
        *_, chunk, done, _ = stream.split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(chunk.removeprefix("data: "))["prunepath"]["tau"] == tau


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_every_kind_of_body_is_rendered_with_its_knob(llama, endpoint):
    body = {"model": MODEL, "max_tokens": 2, "tau": 0.4} | {"messages": [{"role": "user", "content": "a"}]}
    if endpoint == "/v1/responses":
        body = ENDPOINTS[endpoint] | {"tau": 0.4}
    response = llama.post(endpoint + "/render", body)
    assert response.status_code == 200, response.text
    assert response.json()["sampling_params"]["extra_args"]["tau"] == 0.4
    assert llama.post(endpoint + "/render", {**body, "tau": 2}).status_code == 400


@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
def test_generate_takes_the_knob_as_others_do(llama, stream):
    prompt = build_tokenizer()(PROMPTS[1])["input_ids"]
    parameters = {"max_tokens": 10, "temperature": 0, "ignore_eos": True}
    body = {"token_ids": prompt, "sampling_params": parameters, "stream": stream}

    def with_extra(**extra):
        return {**body, "sampling_params": {**parameters, "extra_args": extra}}

    want = complete(llama, PROMPTS[1], tau=0.4)
    for asked in ({**body, "tau": 0.4}, {**body, "vllm_xargs": {"tau": 0.4}}, with_extra(tau=0.4)):
        answer = llama.post("/inference/v1/generate", asked)
        chunks = [line.removeprefix("data: ") for line in answer.text.split("\n\n")][:-2] if stream else [answer.text]
        choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
        assert [token for choice in choices for token in choice["token_ids"] or []] == want
    for bad in (True, 2, "x", 1e-300):
        refused = llama.post("/inference/v1/generate", with_extra(tau=bad))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tau")
    assert llama.post("/inference/v1/generate", {**with_extra(tau=0.4), "tau": 0.5}).status_code == 400
    assert llama.post("/inference/v1/generate", with_extra(prunepath_report="mine")).status_code == 400
    misplaced = llama.post("/inference/v1/generate", {**body, "sampling_params": {**parameters, "tau": 0.4}})
    assert "sampling_params.tau is not read" in misplaced.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"extra_body": {"tau": 0.4}}, "extra_body.tau"),
        ({"extra_body": {"sparsity": 0.4}, "tau": 0.5}, "extra_body.sparsity"),
        ({"extra_body": {"prunepath_report": True}}, "extra_body.prunepath_report"),
        ({"extra_body": {"vllm_xargs": {"tau": 0.4}}}, "extra_body.vllm_xargs.tau"),
        ({"extra_args": {"tau": 0.4}}, "extra_args.tau"),
        ({"extra_kwargs": {"tau": 0.4}}, "extra_kwargs.tau"),
        ({"sampling_params": {"extra_args": {"tau": 0.4}}}, "sampling_params.extra_args.tau"),
        ({"vllm_args": {"tau": 0.4}}, "vllm_args.tau"),
        ({"vllm_xargs": {"extra_args": {"tau": 0.4}}}, "vllm_xargs.extra_args.tau"),
        ({"chat_template_kwargs": {"tau": 0.4}}, "chat_template_kwargs.tau"),
        ({"generation_config": {"sparsity": 0.4}}, "generation_config.sparsity"),
        ({"stream_options": {"prunepath_report": True}, "stream": True}, "stream_options.prunepath_report"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_knob_in_the_wrong_place_is_http_400_saying_the_right_one(llama, body, path):
    for endpoint in ENDPOINTS:
        response = llama.post(endpoint, {**ENDPOINTS[endpoint], **body})
        assert response.status_code == 400
        error = response.json()["error"]
        name = path.split(".")[-1]
        assert error["param"] == name
        right = f"expected '{name}' at the top level of the body or under 'vllm_xargs'"
        assert error["message"].startswith(f"{path} is not read; {right}")


@pytest.mark.parametrize(("name", "value"), [("tau", "0.4"), ("sparsity", ""), ("prunepath_report", "true")])
def test_a_knob_in_the_url_is_http_400_saying_the_right_place(llama, name, value):
    for endpoint in ENDPOINTS:
        error = llama.post(f"{endpoint}?{name}={value}", ENDPOINTS[endpoint]).json()["error"]
        assert (error["code"], error["param"]) == (400, name)
        assert error["message"].startswith(f"{name} in the URL is not read; expected '{name}' at the top level")
    assert llama.post("/v1/completions?other=1", ENDPOINTS["/v1/completions"]).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"Tau": 0.4}, "Tau", "'Tau' is not read; expected 'tau'"),
        ({"vllm_xargs": {"tau_": 0.4}}, "tau_", "'tau_' is not read; expected 'tau'"),
        ({"SPARSITY": 0.4}, "SPARSITY", "'SPARSITY' is not read; expected 'sparsity'"),
        ({"prunepath-report": True}, "prunepath-report", "'prunepath-report' is not read; expected 'prunepath_report'"),
        ({"prefill_tau": 1.0, "tau": 0.4}, "prefill_tau", "prefill_tau is not read in a request: it is the operator's"),
    ],
    ids=str,
)
def test_a_knob_under_another_name_is_http_400_saying_the_right_one(llama, body, param, said):
    for endpoint in ENDPOINTS:
        response = llama.post(endpoint, {**ENDPOINTS[endpoint], **body})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert error["message"].startswith(said)


@pytest.mark.parametrize(
    "body", [{"metadata": {"tau": "0.4"}}, {"extra_body": {"a": 1}}, {"extra_body": {"tau": None}}, {"Tau": None}]
)
def test_what_is_no_knob_stays_the_users(llama, body):
    response = llama.post("/v1/chat/completions", {**ENDPOINTS["/v1/chat/completions"], **body})
    assert response.status_code == 200, response.text


BATCH = {
    "low": ({"tau": 0.4}, 0.4),
    "high": ({"tau": 1.0}, 1.0),
    "nested": ({"vllm_xargs": {"tau": 0.4}}, 0.4),
    "sparsity": ({"sparsity": 0.5}, 0.65),
    "default": ({}, 0.7),
    "named": ({"model": "coarse"}, 0.5),
    "range": ({"vllm_xargs": {"tau": {"min": 0.4, "max": 0.8}}}, 0.8),
    "bool": ({"vllm_xargs": {"tau": True}}, r"tau must be a number in (0, 1.05], got True"),
    "text": ({"tau": "0.4"}, r"tau must be a number in (0, 1.05], got '0.4'"),
    "outside": ({"tau": 0.3}, "tau must be in [0.4, 1.05] (this server's min_tau and max_tau), got 0.3"),
    "misplaced": ({"extra_body": {"tau": 0.4}}, "extra_body.tau is not read"),
    "report": ({"prunepath_report": 1}, "prunepath_report must be true or false, got 1"),
}


def test_a_batch_file_takes_the_knob_in_each_line(llama, tmp_path):
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 10, "temperature": 0}
    lines = []
    for name, (knob, _) in BATCH.items():
        body = {**chat, "return_token_ids": True, "ignore_eos": True, "prunepath_report": name != "nested", **knob}
        lines.append({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    policy = {"default_tau": 0.7, "min_tau": 0.4, "default_tau_by_model": {"coarse": 0.5}}
    command = [str(BIN / "vllm"), "run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", str(llama.checkpoint)]
    command += ["--served-model-name", MODEL, "coarse", "--dtype", "float32", "--max-model-len", "256"]
    command += ["--enforce-eager", "--additional-config", json.dumps({"prunepath": policy})]
    run = warm.run(command, cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {answer["custom_id"] for answer in answers} == set(BATCH)
    for answer in answers:
        knob, right = BATCH[answer["custom_id"]]
        if isinstance(right, str):
            assert answer["response"]["status_code"] == 400
            assert answer["error"]["error"]["message"].startswith(right)
            continue
        told = {**chat, "tau": right, "return_token_ids": True, "ignore_eos": True}
        want = llama.post("/v1/chat/completions", told).json()["choices"][0]["token_ids"]
        assert answer["response"]["body"]["choices"][0]["token_ids"] == want, answer["custom_id"]
        report = answer["response"]["body"].get("prunepath")
        assert (report is None) == (answer["custom_id"] == "nested")
        if report:
            assert report["tau"] == right
            assert report["ffn_sparsity"] == pytest.approx(0 if right == 1 else 0.5, abs=0 if right == 1 else 0.5)


BAD_TAUS = ["true", "false", '"0.8"', "NaN", "Infinity", "-Infinity", "[0.8]", '{"a": 1}', "0", "-1", "1.06", "1e999"]
TINY_TAUS = ["1e-300", "1e-40"]
BAD_SPARSITIES = ["true", '"0.5"', "NaN", "1", "1.0", "-0.1", "[]"]
ENDPOINTS = {
    "/v1/completions": {"model": MODEL, "prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/responses": {"model": MODEL, "input": "a", "max_output_tokens": 2},
}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("knob", [{"tau": None}, {"sparsity": None}, {"tau": None, "prunepath_report": None}], ids=str)
def test_null_is_no_knob(llama, endpoint, knob):
    for extra in (knob, {"vllm_xargs": knob}, {"tau": 0.4, "vllm_xargs": {**knob, "top": 1}}):
        response = llama.post(endpoint, {**ENDPOINTS[endpoint], **extra})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("nested", [False, True], ids=["top-level", "vllm_xargs"])
def test_bad_values_are_http_400_naming_parameter_and_range(llama, endpoint, nested):
    before = complete(llama, tau=0.6)
    cases = [("tau", value, "(0, 1.05]") for value in BAD_TAUS]
    cases += [("tau", value, "at least 1.1754943508222875e-38") for value in TINY_TAUS]
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
