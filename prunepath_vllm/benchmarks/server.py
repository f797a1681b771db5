"""A server to measure: started and stopped here, or somebody else's, and whether its answers are the model's."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch

from prunepath_vllm.benchmarks import report
from prunepath_vllm.benchmarks.report import BenchmarkError
from prunepath_vllm.engine_environment import set_server_defaults

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea, there lived",
)
"""What a server is asked before it is timed."""

ANSWER_TOKENS = 16

TOLERANCE = 0.1
"""Nats; the mean distance, over the answers' tokens, of a token's log-probability from the transformers model's."""


@contextmanager
def running(path: str | Path, flags: Sequence[str] = ()) -> Iterator[str]:
    """Serve a model with ``vllm serve`` on a free port, its routed layer checked, until the block is left.

    Args:
        path: checkpoint directory, dense or PrunePath.
        flags: of ``vllm serve``.

    Yields:
        the server's URL.

    Raises:
        BenchmarkError: the server stopped before it was ready, or its routed layer is wrong.
    """
    set_server_defaults()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(path)]
    print(f"starting a server of {path}", file=sys.stderr, flush=True)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--worker-extension-cls", report.PROBE, *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"},  # its /collective_rpc reaches the workers
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            while not _healthy(url):
                if process.poll() is not None:
                    log.seek(0)
                    lines = log.readlines()
                    print("".join(lines[-40:]), file=sys.stderr)
                    said = [line.strip() for line in lines if "error" in line.lower()] or ["no error in its log"]
                    raise BenchmarkError(f"{path}: the server stopped with exit code {process.returncode}: {said[-1]}")
                time.sleep(0.5)
            report.judge_layer(ask(url, "/collective_rpc", {"method": report.CHECK})["results"])
            yield url
        finally:
            _stop(process)


def _healthy(url: str) -> bool:
    try:
        return urlopen(f"{url}/health", timeout=10).status == 200
    except (URLError, OSError):
        return False


def _stop(process: subprocess.Popen) -> None:
    """Ask the server and the engine's processes to end, and make them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)


def check_answers(url: str, path: str | Path, taus: Sequence[float | None]) -> dict[str, float]:
    """Compare greedy answers over HTTP with the transformers model of the same checkpoint, on the CPU.

    All taus are asked at once, so that they share batches. Every token of every answer is then scored by the
    transformers model, given the prompt and the answer's earlier tokens. Answers must be within TOLERANCE of the model
    at their tau, or at least nearer to it than to the model at tau 1: in bfloat16 rounding moves near-tied experts, and
    at a low tau two right implementations are some tenths of a nat apart, but a tau that did not arrive is farther.

    Args:
        url: the server.
        path: the checkpoint directory it serves.
        taus: those to be measured; [None] for a dense model.

    Returns:
        for every tau, or "dense", the mean absolute difference of log-probabilities, in nats a token.

    Raises:
        BenchmarkError: the answers are not the model's, or a request fails.
    """
    from transformers import AutoModelForCausalLM

    from prunepath_vllm.modeling import register_auto_classes

    name = ask(url, "/v1/models")["data"][0]["id"]
    asked = [(tau, prompt) for tau in taus for prompt in PROMPTS]
    with ThreadPoolExecutor(len(asked)) as pool:
        choices = list(pool.map(lambda pair: _complete(url, name, *pair), asked))
    register_auto_classes()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    off: dict[str, list[torch.Tensor]] = {}
    for (tau, _), choice in zip(asked, choices, strict=True):
        off.setdefault("dense" if tau is None else f"{tau:g}", []).append(_distances(model, choice, tau))
    means = {}
    for key, parts in off.items():
        mean, mean_at_1 = torch.cat(parts, dim=1).mean(dim=1).tolist()
        if not mean < TOLERANCE and not mean < mean_at_1:
            what = "the dense server's answers" if key == "dense" else f"answers at tau {key}"
            raise BenchmarkError(
                f"{what} are {mean:.2f} nats a token away from the transformers model of {path}, and {mean_at_1:.2f} "
                f"from it at tau 1; expected less than {TOLERANCE:g}, or than the latter: no speed is reported"
            )
        means[key] = mean
    return means


def _complete(url: str, name: str, tau: float | None, prompt: str) -> dict[str, Any]:
    """A greedy answer: the choice, with its log-probabilities and token ids."""
    body = {
        "model": name, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True,
        "logprobs": 1, "return_token_ids": True, **({} if tau is None else {"tau": tau}),
    }  # fmt: skip
    return ask(url, "/v1/completions", body)["choices"][0]


@torch.inference_mode()
def _distances(model: Any, choice: dict[str, Any], tau: float | None) -> torch.Tensor:
    """[2, answer tokens]: absolute differences of log-probabilities from the model at `tau`, and at tau 1."""
    start = len(choice["prompt_token_ids"])
    ids = torch.tensor([choice["prompt_token_ids"] + choice["token_ids"]] * 2)
    logits = model(ids, **({} if tau is None else {"tau": torch.tensor([tau, 1.0])})).logits[:, start - 1 : -1]
    expected = logits.float().log_softmax(-1).gather(2, ids[:, start:, None]).squeeze(2)
    return (torch.tensor(choice["logprobs"]["token_logprobs"]) - expected).abs()


def ask(url: str, endpoint: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET, or POST `body` as JSON; the answer's JSON.

    Raises:
        BenchmarkError: no connection, or a refusal.
    """
    data = None if body is None else json.dumps(body).encode()
    try:
        request = Request(url.rstrip("/") + endpoint, data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except HTTPError as error:
        raise BenchmarkError(
            f"{url}{endpoint}: HTTP {error.code}: {error.read(500).decode(errors='replace')}"
        ) from None
    except (OSError, HTTPException, ValueError) as error:  # no connection, another protocol, no URL, no JSON
        raise BenchmarkError(f"{url}{endpoint}: {error}; expected a server there") from None
