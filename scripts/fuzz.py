"""Fuzz a running server: hostile bodies on every endpoint that takes the knob, each answer judged, the server after it.

    .venv/bin/python scripts/fuzz.py http://127.0.0.1:8000 --count 20000 --output fuzz.json

Bodies are either plain requests or made by schemathesis from the server's own OpenAPI schema; then tau, sparsity,
prunepath_report and vllm_xargs are set to right and wrong values, twice, nested, not in UTF-8. What is known of the
knob tells whether an answer is right: :func:`judge` is written from the documentation, imports nothing of the package.
The server must have no bounds on tau, and a checkpoint with a tau_curve.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tqdm import tqdm

ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
}
REPORT = "prunepath_report"
KNOBS = ("tau", "sparsity", REPORT)
COSTS = {"n": 2, "best_of": 2, "max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4, "min_tokens": 2}
"""Numbers in generated bodies are held down to these: this asks whether answers are right, not how many fit in."""
FASTAPI_REFUSAL = '{"detail":"There was an error parsing the body"}'
DEEP = 900
"""Python's limit is near here, and FastAPI reads the body further down the stack than the plugin."""
LEAST_TAU = 2.0**-126
"""The smallest normal float32, as the documentation has it."""
MAX_LISTED = 20
PROBE_EVERY = 1000


@dataclass(frozen=True)
class Attempt:
    """One request: where to, the raw body, and whether everything but the knob is known to be right."""

    endpoint: str
    body: bytes
    plain: bool


@dataclass
class Summary:
    """What came of all requests; `failures` must be empty."""

    sent: int = 0
    schema_bodies: int = 0
    seconds: float = 0.0
    statuses: Counter = field(default_factory=Counter)
    refused_for: Counter = field(default_factory=Counter)
    """Refusals of the knob, by the field they name."""
    engine_errors: Counter = field(default_factory=Counter)
    """The engine's own, by message: a 5xx that the same body without a knob gets too, or FastAPI's refusal."""
    probes: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    failed: int = 0

    def fail(self, reason: str, attempt: Attempt | None = None, answer: str = "") -> None:
        """Note a wrong answer; the first ones with their bodies."""
        self.failed += 1
        if len(self.failures) < MAX_LISTED:
            entry = {"reason": reason, "answer": answer[:500]}
            if attempt is not None:
                entry |= {"endpoint": attempt.endpoint, "body": ascii(attempt.body)[:2000]}
            self.failures.append(entry)


def judge(body: bytes) -> set[str] | None:
    """What the documentation says of a body's knob.

    Returns:
        the fields of which one must be named in a 400; empty where the knob is right, or absent; None where only the
        engine's own schema can tell (no JSON object, or unusual vllm_xargs).
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    xargs = data.get("vllm_xargs")
    places = [data, xargs] if isinstance(xargs, dict) else [data]
    given_values = {name: [p[name] for p in places if p.get(name) is not None] for name in KNOBS}
    wrong = {"prunepath_report"} if any(not isinstance(v, bool) for v in given_values["prunepath_report"]) else set()
    for name, accepts in (("tau", _is_tau), ("sparsity", lambda v: _is_number(v) and 0 <= v < 1)):
        values = given_values[name]
        if not all(accepts(v) for v in values) or (len(values) == 2 and values[0] != values[1]):
            wrong.add(name)
    if given_values["tau"] and given_values["sparsity"]:
        wrong |= {"tau", "sparsity"}
    if wrong:
        return wrong
    usual = xargs is None or (isinstance(xargs, dict) and all(_is_number(v) or _is_tau(v) for v in xargs.values()))
    return set() if usual else None


def _is_tau(value: Any) -> bool:
    if value == "auto":
        return True
    if isinstance(value, dict):
        ends = [value.get("min"), value.get("max")]
        numbers = all(_is_number(end) and LEAST_TAU <= end <= 1.05 for end in ends)
        return numbers and len(value) == 2 and ends[0] <= ends[1]
    return _is_number(value) and LEAST_TAU <= value <= 1.05


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 if isinstance(value, int) else math.isfinite(value)


ENDS = st.sampled_from(["0.3", "0.9", "1", "1.05", "0", "1.06", "null", "true", '"0.5"', "NaN", "[]", "{}"])
"""Of a range of taus."""


def values() -> st.SearchStrategy[str]:
    """JSON texts that a knob is set to; some are right, some are not even JSON to everybody (NaN, 1e999)."""
    deep = st.sampled_from([2, 50, 900, 5000, 100_000]).flatmap(
        lambda depth: st.sampled_from(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth])
    )
    strings = st.one_of(st.text(max_size=20), st.sampled_from(["0.8", "auto", "tau", "\x00", "\ud800", "é" * 50_000]))
    return st.one_of(
        st.floats(0, 1.05, exclude_min=True).map(repr),
        st.sampled_from(["1", "0", "1.05", "1.0500000000000003", "-0.0", "5e-324", "0.99", "null", "true", "false"]),
        st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9" * 400, "9" * 5000, "0.8e0"]),
        st.floats(allow_nan=False, allow_infinity=False).map(repr),
        st.integers().map(str),
        strings.map(json.dumps),
        st.builds(lambda low, high: f'{{"min": {low}, "max": {high}}}', *[ENDS] * 2),
        st.recursive(
            st.none() | st.booleans() | st.floats(0, 1) | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=6,
        ).map(json.dumps),
        deep,
    )


@st.composite
def knobs(draw: st.DrawFn) -> str:
    """Members of a JSON object, as text so that a key may come twice; a third of them right."""
    if draw(st.integers(0, 2)) == 0:
        number = st.floats(0, 0.99, exclude_min=True).map(repr)
        name = draw(st.sampled_from(KNOBS))
        text = f'"{name}": {draw(number if name != REPORT else st.sampled_from(["true", "false"]))}'
        return text if name == REPORT or draw(st.booleans()) else f'"vllm_xargs": {{{text}}}'
    member = st.builds(lambda name, value: f'"{name}": {value}', st.sampled_from(KNOBS), values())
    members = draw(st.lists(member, min_size=1, max_size=3))
    place = draw(st.sampled_from(["top", "nested", "both", "odd"]))
    if place == "nested":
        return '"vllm_xargs": {' + ", ".join(members) + "}"
    if place == "both":
        return ", ".join([*members, '"vllm_xargs": {' + draw(member) + "}"])
    return ", ".join([*members, f'"vllm_xargs": {draw(values())}'] if place == "odd" else members)


@st.composite
def attempts(draw: st.DrawFn, model: str, corpus: list[tuple[str, dict]]) -> Attempt:
    """One request to one endpoint."""
    plain = not corpus or draw(st.booleans())
    if plain:
        endpoint = draw(st.sampled_from(list(ENDPOINTS)))
        base = {"model": model, **ENDPOINTS[endpoint], "stream": draw(st.booleans())}
    else:
        endpoint, base = draw(st.sampled_from(corpus))
    body = (json.dumps(base)[:-1] + (", " if base else "") + draw(knobs()) + "}").encode("utf-8", "surrogatepass")
    damage = draw(st.sampled_from(["none"] * 12 + ["cut", "bytes", "utf-16"]))
    if damage == "cut":
        body = body[: draw(st.integers(0, len(body) - 1))]
    elif damage == "bytes":
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(min_size=1, max_size=4)) + body[at:]
    elif damage == "utf-16":
        body = body.decode().encode("utf-16")
    return Attempt(endpoint, body, plain and damage == "none")


def schema_bodies(openapi: dict[str, Any], model: str, count: int, number: int) -> list[tuple[str, dict]]:
    """About `count` (endpoint, body) that schemathesis makes of the server's schema, right ones and wrong ones."""
    schema = schemathesis.openapi.from_dict(openapi)
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    made: list[tuple[str, dict]] = []

    def keep(endpoint: str, case: Any) -> None:
        if isinstance(case.body, dict):
            body = {name: _bounded(name, value) for name, value in case.body.items() if name not in KNOBS}
            body.pop("vllm_xargs", None)
            made.append((endpoint, {**ENDPOINTS[endpoint], **body, "model": model}))

    for endpoint in ENDPOINTS:
        for mode in modes:
            cases = schema[endpoint]["POST"].as_strategy(generation_mode=mode)
            _each(
                cases, math.ceil(count / len(ENDPOINTS) / len(modes)), number, lambda case, at=endpoint: keep(at, case)
            )

    return made


def _bounded(name: str, value: Any) -> Any:
    return min(value, COSTS[name]) if name in COSTS and isinstance(value, int) else value


def _each(strategy: st.SearchStrategy, count: int, number: int, use: Callable[[Any], None]) -> None:
    """Draw `count` values; the same ones for the same `number`."""

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(value: Any) -> None:
        use(value)

    draw()


class Fuzzer:
    """Sends attempts to one server and judges what comes back."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None) -> None:
        # A connection each: the server closes one that carried a 5xx, and a later request would take the blame.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx.Client(base_url=url, timeout=120, limits=limits, transport=transport)
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]
        self.summary = Summary()
        self.right = self.probe()

    def probe(self) -> list[str]:
        """Greedy answers at several taus."""
        body = {"model": self.model, "prompt": "the quick brown fox", "max_tokens": 8, "temperature": 0}
        answers = [self.client.post("/v1/completions", json=body | {"tau": tau}) for tau in (1.0, 0.7, 0.4)]
        return [answer.raise_for_status().json()["choices"][0]["text"] for answer in answers]

    def send(self, attempt: Attempt) -> tuple[int, str]:
        """Status and text of the answer; status 0 where there is none."""
        try:
            headers = {"Content-Type": "application/json"}
            answer = self.client.post(attempt.endpoint, content=attempt.body, headers=headers)
            return answer.status_code, answer.text
        except httpx.HTTPError as error:
            return 0, repr(error)

    def attempt(self, attempt: Attempt) -> None:
        """Send one and judge its answer."""
        status, text = self.send(attempt)
        self.summary.sent += 1
        self.summary.statuses[str(status)] += 1
        wrong = judge(attempt.body)
        if status == 0 or status >= 500:
            self._server_error(attempt, status, text)
        elif status >= 400:
            error = openai_error(text, status)
            if error is None and attempt.body.count(b"[") + attempt.body.count(b"{") > DEEP and text == FASTAPI_REFUSAL:
                self.summary.engine_errors[text] += 1
            elif error is None:
                self.summary.fail("not an OpenAI error", attempt, text)
            elif wrong and (status != 400 or _field(error) not in wrong or _field(error) not in error["message"]):
                self.summary.fail(f"expected a 400 that names {' or '.join(sorted(wrong))}", attempt, text)
            elif wrong == set() and attempt.plain:
                self.summary.fail(f"{status} for a right request", attempt, text)
            elif wrong:
                self.summary.refused_for[_field(error)] += 1
        elif wrong:
            self.summary.fail(f"{status}, expected a 400 that names {' or '.join(sorted(wrong))}", attempt, text)
        elif attempt.plain and '"error": {' in text:
            self.summary.fail("an error inside a stream", attempt, text)

    def _server_error(self, attempt: Attempt, status: int, text: str) -> None:
        try:
            data = json.loads(attempt.body)
            bare = {name: value for name, value in data.items() if name not in (*KNOBS, "vllm_xargs")}
            without = Attempt(attempt.endpoint, json.dumps(bare).encode(), False)
        except (ValueError, RecursionError, AttributeError):
            without = None
        if without is not None and not judge(attempt.body) and self.send(without)[0] == status:
            error = openai_error(text, status)
            self.summary.engine_errors[(error["message"] if error else text)[:200]] += 1
        else:
            self.summary.fail(f"HTTP {status}", attempt, text)

    def check_server(self) -> None:
        """The server must answer as it did at first."""
        self.summary.probes += 1
        try:
            if (answers := self.probe()) != self.right:
                self.summary.fail("greedy answers have changed", None, repr(answers))
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self.summary.fail("the server no longer answers", None, repr(error))


def _field(error: dict[str, Any]) -> str:
    """The request's field that an error names: "tau" for "tau.min"."""
    return (error["param"] or "").split(".")[0]


def openai_error(text: str, status: int) -> dict[str, Any] | None:
    """The error object of an answer, None where it is not of OpenAI's form."""
    try:
        error = json.loads(text)["error"]
        message, kind, code = error["message"], error["type"], error["code"]
        named = error["param"] is None or isinstance(error["param"], str)
    except (ValueError, TypeError, KeyError):
        return None
    whole = isinstance(message, str) and message and isinstance(kind, str) and code == status and named
    return error if whole else None


def fuzz(
    url: str,
    *,
    count: int,
    bodies: int,
    number: int = 0,
    threads: int = 8,
    progress: bool = True,
    transport: httpx.BaseTransport | None = None,
) -> Summary:
    """Send `count` requests, over `bodies` bodies of the schema, and judge every answer.

    Args:
        url: the server's.
        count: requests to send.
        bodies: how many bodies schemathesis makes.
        number: seed; the same one sends the same requests.
        threads: requests in flight.
        progress: show a bar.
        transport: httpx's, where the server is not behind a socket.
    """
    started = time.monotonic()
    fuzzer = Fuzzer(url, transport)
    openapi = fuzzer.client.get("/openapi.json").json() if bodies else {}
    corpus = schema_bodies(openapi, fuzzer.model, bodies, number) if bodies else []
    fuzzer.summary.schema_bodies = len(corpus)
    made: list[Attempt] = []
    with ThreadPoolExecutor(threads) as pool, tqdm(total=count, unit="req", disable=not progress) as bar:
        # In pieces: one long run of hypothesis slows down and keeps every example in memory.
        for piece, start in enumerate(range(0, count, PROBE_EVERY)):
            made.clear()
            _each(attempts(fuzzer.model, corpus), min(PROBE_EVERY, count - start), number + piece, made.append)
            for _ in pool.map(fuzzer.attempt, made):
                bar.update()
            fuzzer.check_server()
    fuzzer.summary.seconds = round(time.monotonic() - started, 1)
    return fuzzer.summary


def main() -> int:
    """Run from the command line; exit 1 where an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a server on this machine")
    parser.add_argument("--count", type=int, default=20_000, help="requests to send")
    parser.add_argument("--bodies", type=int, default=1200, help="bodies made of the server's schema")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON summary")
    args = parser.parse_args()
    summary = fuzz(args.url, count=args.count, bodies=args.bodies, number=args.seed)
    text = json.dumps(vars(summary), indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 1 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main())
