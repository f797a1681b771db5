"""``"prunepath_report": true``: a request is told its tau and the FFN sparsity that its tokens had, in its own answer.

An ASGI middleware adds one object, ``prunepath``, to what the engine answers: to the JSON body; in a stream of chunks,
to one more chunk without choices before ``[DONE]``, as OpenAI's usage chunk is; in a stream of the responses API, to
the response of its last event; in a stream of Anthropic's messages API, to its last event, ``message_stop``. Of a
response in the background, to the answer that brings it when it is there.

The workers count under a name that the request carries among its extra arguments; at the end of the answer one
``collective_rpc`` brings the counts. vLLM's outputs have no room for them: what a model runner may return beside tokens
is the experts of its own mixture layers, a fixed number per token.
"""

import asyncio
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.logger import init_logger

from prunepath_vllm.config import expected_sparsity, sparsity_curve
from prunepath_vllm.entrypoints.server.answers import AnswerSender, dump
from prunepath_vllm.entrypoints.server.knob import body_values, json_body, refusal
from prunepath_vllm.errors import TauError
from prunepath_vllm.model_executor.counts import MAX_REPORTS, REPORT_KEY
from prunepath_vllm.model_executor.tau_resolution import TauResolver
from prunepath_vllm.tau import shown

FIELD = "prunepath"

_COUNTED = ("prompt_ffn_sparsity", "ffn_sparsity")

logger = init_logger("vllm.prunepath")


@dataclass
class Report:
    """What one HTTP request will be told.

    Attributes:
        name: what the workers count it under, all its prompts and choices together.
        content: the object in the answer; empty until a request has been admitted.
    """

    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    content: dict[str, Any] = field(default_factory=dict)
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Workers tell a count once, and a response in the background may be fetched twice at a time."""

    async def complete(self, engine: Any) -> dict[str, Any]:
        """Add what was counted, and return the whole.

        Args:
            engine: vLLM's client of the engine.
        """
        async with self.asking:
            if self.content and _COUNTED[0] not in self.content:
                await self._count(engine)
        return self.content

    async def _count(self, engine: Any) -> None:
        try:
            # Not engine.collective_rpc: of several data-parallel engines it brings the first one's answer alone.
            call = ("collective_rpc", "prunepath_report", None, (self.name,), None)
            engines = await engine.engine_core.call_utility_all_async(*call)
        except Exception as error:  # the answer itself is there, and worth more than its report
            logger.warning("No count for a report: %s", error)
            engines = []
        for name in _COUNTED:
            self.content[name] = self.content[f"{name}_by_layer"] = None
        # A pipeline's stages each speak for their layers; engines that ran none of the request's prompts say nothing.
        told = [stages for workers in engines if (stages := list(filter(None, workers)))]
        for part, name in enumerate(_COUNTED):
            layers = [layer for stage in zip(*told, strict=True) for layer in _sparsities([one[part] for one in stage])]
            if layers:
                self.content[name] = sum(layers) / len(layers)
                self.content[f"{name}_by_layer"] = [round(sparsity, 4) for sparsity in layers]


def _sparsities(counts: list[tuple[list[int], int]]) -> list[float]:
    """By layer of a stage, from what each engine counted: active experts by layer, and those there were. [] of none."""
    possible = sum(one for _, one in counts)
    return (
        [1 - sum(layer) / possible for layer in zip(*(active for active, _ in counts), strict=True)] if possible else []
    )


_report: ContextVar[Report | None] = ContextVar("prunepath_report", default=None)
"""Of the HTTP request being handled; None where it has not asked."""


def fill_report(resolver: TauResolver, tau: float, extra: dict[str, Any]) -> None:
    """Write what is known of a request when it is admitted, if it asked for a report, and have it counted."""
    report = _report.get()
    if report is None:
        return
    extra[REPORT_KEY] = report.name
    prompt_tau = resolver.prompt_tau(tau)
    curve = sparsity_curve(resolver.prunepath)
    shares = [None, None] if curve is None else expected_sparsity(np.array([tau, prompt_tau]), curve).tolist()
    report.content["tau"], report.content["prompt_tau"] = tau, prompt_tau
    report.content["expected_ffn_sparsity"], report.content["expected_prompt_ffn_sparsity"] = shares


@contextmanager
def report_to(report: Report | None) -> Iterator[None]:
    """What is admitted within, here and in tasks begun here, is told to `report`."""
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)


class ReportMiddleware:
    """Adds the report to the answers of requests that ask for it; every other request passes untouched."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        try:
            body, receive = await json_body(scope, receive)
            wanted = body is not None and asks_for_report(body)
        except TauError as error:
            await refusal(error)(scope, receive, send)
            return
        report = Report() if wanted else None
        told = report or _kept(scope)
        if told is not None:
            send = _Reporter(send, told, scope["app"].state.engine_client)
        with report_to(report):
            await self.app(scope, receive, send)


def asks_for_report(body: dict[str, Any]) -> bool:
    """Whether a JSON body has ``prunepath_report``, at the top level or under ``vllm_xargs``.

    Raises:
        TauError: it is not true, false or null.
    """
    values = body_values(body, REPORT_KEY)
    for value in values:
        if not isinstance(value, bool):
            raise TauError(f"{REPORT_KEY} must be true or false, got {shown(value)}", parameter=REPORT_KEY, value=value)
    return any(values)


class _Reporter(AnswerSender):
    """An ASGI ``send`` that adds the report."""

    def __init__(self, send: Send, report: Report, engine: Any) -> None:
        super().__init__(send)
        self.report, self.engine = report, engine
        self.chunk: dict[str, Any] = {}
        """The stream's first chunk: what an added one must agree with."""

    async def changed_body(self, body: bytes) -> bytes:
        data = json.loads(body)
        if not isinstance(data, dict):
            return body
        if data.get("object") == "response" and data.get("status") in _RUNNING:
            _keep(data["id"], self.report)
            return body
        content = await self.report.complete(self.engine)
        return dump({**data, FIELD: content}) if content else body

    async def changed_event(self, event: bytes) -> bytes:
        mark = b"data: "
        at = 0 if event.startswith(mark) else event.find(b"\n" + mark) + 1  # JSON has no raw line breaks
        head, data = event[:at], event[at:].removeprefix(mark)
        if data == event[at:]:
            return event
        if data == b"[DONE]":
            content = await self.report.complete(self.engine)
            if "choices" not in self.chunk or not content:
                return event
            same = {name: self.chunk[name] for name in _CHUNK_NAMES if name in self.chunk}
            return mark + dump({**same, "choices": [], FIELD: content}) + b"\n\n" + event
        if b'"choices"' in data and not self.chunk:
            self.chunk = json.loads(data)
        elif head.startswith(b"event: response.created"):
            response = json.loads(data)["response"]
            if response.get("background"):
                _keep(response["id"], self.report)
        elif head.startswith(b"event: response.completed"):
            completed = json.loads(data)
            completed["response"][FIELD] = await self.report.complete(self.engine)
            return head + mark + dump(completed)
        elif head.startswith(b"event: message_stop"):
            return head + mark + dump({**json.loads(data), FIELD: await self.report.complete(self.engine)})
        return event


_RUNNING = ("queued", "in_progress")
"""Status of a response in the background that is not there yet."""

_CHUNK_NAMES = ("id", "request_id", "object", "created", "model")
"""What all chunks of a stream have in common."""

_background: dict[str, Report] = {}
"""Reports of responses in the background, by the response's id: as many as the workers keep counts of."""


def _keep(response_id: str, report: Report) -> None:
    """Remember the report of a response in the background, for whoever comes back for it."""
    if response_id not in _background and len(_background) >= MAX_REPORTS:
        del _background[next(iter(_background))]
    _background[response_id] = report


def _kept(scope: Scope) -> Report | None:
    """The report of the response that a request asks for again: ``/v1/responses/{id}``, or ``.../cancel``."""
    if scope["type"] != "http" or "/v1/responses/" not in scope["path"]:
        return None
    return _background.get(scope["path"].rpartition("/v1/responses/")[2].split("/")[0])
