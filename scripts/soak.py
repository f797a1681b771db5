"""Soak a running server: many streaming clients of mixed tau that connect, abort and come back; then count and compare.

    .venv/bin/python scripts/soak.py http://127.0.0.1:8000 --pid PID --clients 64 --minutes 10 --output soak.json

Every request opens its own connection; a fifth is dropped in mid-answer. Afterwards a sample of the finished ones is
asked again, alone: the answers must be the same, token by token, which needs a float32 server. /metrics must agree with
what was sent, and the memory of the server's processes (PID and its children) must stay level after the warm-up.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

TAUS = (1.05, 1.0, 0.9, 0.8, 0.6, 0.4, 0.25)
WORDS = ("a", "router", "keeps", "the", "experts", "that", "hold", "most", "of", "its", "probability", "éà", "专家")
WARM_UP = 0.2
"""Share of the time after which memory must stay level."""
LEVEL = 0.03


@dataclass(frozen=True)
class Job:
    """One request and what came back."""

    prompt: str
    knob: dict[str, Any]
    max_tokens: int
    tokens: tuple[int, ...] = ()


@dataclass
class Soak:
    """What all clients did."""

    url: str
    model: str
    abort: float
    deadline: float
    sent: int = 0
    aborted: int = 0
    errors: list[str] = field(default_factory=list)
    finished: list[Job] = field(default_factory=list)
    least_tokens: int = 0
    """Tokens the model must have run for what was received; the last one of an answer is not run."""
    most_tokens: int = 0
    """Had every dropped request gone on to its end."""

    async def client(self, number: int, http: httpx.AsyncClient) -> None:
        """Send one request after another until the time is up."""
        draw = random.Random(number)
        while time.monotonic() < self.deadline:
            words = draw.choices(WORDS, k=draw.randint(1, 12))
            # A prompt of its own, so that none is found in the prefix cache and metrics can be counted.
            prompt = f"{number}.{self.sent}: " + " ".join(words)
            knob = {"tau": draw.choice(TAUS)} if draw.random() < 0.9 else {"sparsity": draw.choice((0.0, 0.3, 0.6))}
            if draw.random() < 0.1:
                knob["prunepath_report"] = True
            job = Job(prompt, knob, draw.randint(4, 40))
            stop_after = draw.randint(1, job.max_tokens) if draw.random() < self.abort else None
            self.sent += 1
            try:
                await self.request(job, http, stop_after)
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self.errors.append(repr(error)[:300])

    async def request(self, job: Job, http: httpx.AsyncClient, stop_after: int | None) -> None:
        """Stream one answer, or drop the connection after `stop_after` chunks of it."""
        tokens: list[int] = []
        reported, prompt_tokens = False, 0
        async with http.stream("POST", "/v1/completions", json=body(self.model, job, stream=True)) as answer:
            if answer.status_code != 200:
                raise ValueError(f"HTTP {answer.status_code}: {(await answer.aread())[:200]!r}")
            async for data in events(answer):
                chunk = json.loads(data)
                if "error" in chunk:
                    raise ValueError(data)
                reported |= "prunepath" in chunk
                for choice in chunk["choices"]:
                    tokens += choice["token_ids"]
                    prompt_tokens = prompt_tokens or len(choice.get("prompt_token_ids") or ())
                if stop_after is not None and len(tokens) >= stop_after:
                    break
        self.least_tokens += prompt_tokens + len(tokens) - 1
        self.most_tokens += prompt_tokens + job.max_tokens - 1
        if stop_after is not None:
            self.aborted += 1
            return
        if len(tokens) != job.max_tokens:
            raise ValueError(f"{len(tokens)} of {job.max_tokens} tokens: {job}")
        if reported != job.knob.get("prunepath_report", False):
            raise ValueError(f"report: {reported}: {job}")
        self.finished.append(Job(job.prompt, job.knob, job.max_tokens, tuple(tokens)))


async def events(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The data of a stream's events up to [DONE]; httpx's lines end at U+2028 too, which answers may hold."""
    pending = b""
    async for part in answer.aiter_bytes():
        *lines, pending = (pending + part).split(b"\n")
        for line in lines:
            if line == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ")


def body(model: str, job: Job, **more: Any) -> dict[str, Any]:
    """The body of a greedy completion."""
    fixed = {"model": model, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {**fixed, "prompt": job.prompt, "max_tokens": job.max_tokens, **job.knob, **more}


def memory(pid: int) -> int:
    """Resident bytes of a server and all its child processes."""
    total = 0
    for process in _family(pid):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def _family(pid: int) -> Iterator[psutil.Process]:
    parent = psutil.Process(pid)
    yield parent
    yield from parent.children(recursive=True)


def scrape(url: str) -> Counter[str]:
    """Samples of /metrics, summed over labels; requests by how they finished."""
    samples: Counter[str] = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text):
        for sample in family.samples:
            reason = sample.labels.get("finished_reason")
            samples[f"{sample.name}:{reason}" if reason else sample.name] += sample.value
    return samples


async def run(soak: Soak, clients: int, pid: int, seconds: float, progress: bool) -> list[tuple[float, int]]:
    """Let the clients go until the deadline; (seconds, resident bytes) sampled meanwhile."""
    rss: list[tuple[float, int]] = []
    start = time.monotonic()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=soak.url, limits=limits, timeout=120) as http:
        tasks = [asyncio.create_task(soak.client(number, http)) for number in range(clients)]
        with tqdm(total=round(seconds), unit="s", disable=not progress) as bar:
            while time.monotonic() < soak.deadline:
                await asyncio.sleep(min(seconds / 60, 5))
                rss.append((round(time.monotonic() - start, 1), memory(pid)))
                bar.update(min(round(rss[-1][0]), bar.total) - bar.n)
        await asyncio.gather(*tasks)
    return rss


def drift(rss: list[tuple[float, int]], seconds: float) -> float:
    """Change of the median memory from the first fifth after the warm-up to the last fifth, as a share."""
    first = [size for at, size in rss if WARM_UP * seconds <= at < 2 * WARM_UP * seconds]
    last = [size for at, size in rss if at >= (1 - WARM_UP) * seconds]
    return statistics.median(last) / statistics.median(first) - 1


def replay(soak: Soak, samples: int, progress: bool) -> tuple[int, list[dict[str, Any]]]:
    """Ask a sample of the finished requests again, one at a time: how many, and those with another answer."""
    jobs = random.Random(0).sample(soak.finished, min(samples, len(soak.finished)))
    wrong = []
    with httpx.Client(base_url=soak.url, timeout=120) as http:
        for job in tqdm(jobs, unit="req", disable=not progress):
            answer = http.post("/v1/completions", json=body(soak.model, job)).raise_for_status().json()
            alone = answer["choices"][0]["token_ids"]
            if tuple(alone) != job.tokens:
                wrong.append({**vars(job), "alone": alone})
    return len(jobs), wrong


def compare_metrics(soak: Soak, before: Counter[str], after: Counter[str]) -> list[str]:
    """What /metrics says otherwise than what was sent; empty where they agree."""
    added = {name: value - before[name] for name, value in after.items()}
    finished = added.get("vllm:request_success_total:length", 0)  # the engine does not count every abort
    waiting = after["vllm:num_requests_running"] + after["vllm:num_requests_waiting"]
    checks = {
        f"{added['prunepath:request_tau_count']:.0f} taus for {soak.sent} requests": (
            added["prunepath:request_tau_count"] == soak.sent
        ),
        # A request may finish before the server sees that its client has gone.
        f"{finished:.0f} finished, for {len(soak.finished)} answers and {soak.aborted} aborts": (
            len(soak.finished) <= finished <= soak.sent
        ),
        f"{added['prunepath:tokens_total']:.0f} tokens, expected {soak.least_tokens} to {soak.most_tokens}": (
            soak.least_tokens <= added["prunepath:tokens_total"] <= soak.most_tokens
        ),
        f"{waiting:.0f} requests still in the engine": waiting == 0,
    }
    return [what for what, right in checks.items() if not right]


def soak_server(
    url: str, pid: int, *, clients: int, seconds: float, abort: float = 0.2, samples: int = 1000, progress: bool = True
) -> dict[str, Any]:
    """Soak the server at `url` and return the summary; ``wrong``, ``errors`` and ``metrics`` must be empty.

    Args:
        url: the server's.
        pid: of its first process.
        clients: streams in flight.
        seconds: for how long.
        abort: share of requests that are dropped.
        samples: finished requests that are asked again afterwards.
        progress: show bars.
    """
    model = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    before = scrape(url)
    soak = Soak(url, model, abort, time.monotonic() + seconds)
    rss = asyncio.run(run(soak, clients, pid, seconds, progress))
    time.sleep(2)  # the last abort reaches the engine
    after = scrape(url)
    replayed, wrong = replay(soak, samples, progress)
    level = drift(rss, seconds)
    return {
        "clients": clients,
        "seconds": seconds,
        "sent": soak.sent,
        "finished": len(soak.finished),
        "aborted": soak.aborted,
        "tokens_received": sum(len(job.tokens) for job in soak.finished),
        "replayed": replayed,
        "wrong": wrong,
        "errors": soak.errors,
        "metrics": compare_metrics(soak, before, after),
        "rss_change_after_warm_up": round(level, 4),
        "rss_mib": [[at, round(size / 2**20, 1)] for at, size in rss],
    }


def main() -> int:
    """Run from the command line; exit 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a server on this machine")
    parser.add_argument("--pid", type=int, required=True, help="the server's process")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--abort", type=float, default=0.2, help="share of requests that are dropped")
    parser.add_argument("--samples", type=int, default=1000, help="finished requests that are asked again, alone")
    parser.add_argument("--output", type=Path, help="JSON summary")
    args = parser.parse_args()
    options = dict(clients=args.clients, seconds=args.minutes * 60, abort=args.abort, samples=args.samples)
    summary = soak_server(args.url, args.pid, **options)
    if args.output:
        args.output.write_text(json.dumps(summary) + "\n")
    del summary["rss_mib"]
    print(json.dumps(summary, indent=2))
    level = abs(summary["rss_change_after_warm_up"]) <= LEVEL
    return 0 if level and not (summary["wrong"] or summary["errors"] or summary["metrics"]) else 1


if __name__ == "__main__":
    sys.exit(main())
