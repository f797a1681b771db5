"""``"prunepath_report": true``: a request is told its tau and the FFN sparsity that its tokens had, in its own answer.

An ASGI middleware adds one object, ``prunepath``, to what the engine answers: to the JSON body; in a stream of chunks,
to one more chunk without choices before ``[DONE]``, as OpenAI's usage chunk is; in a stream of the responses API, to
the response of its last event.

The workers count under a name that the request carries among its extra arguments; at the end of the answer one
``collective_rpc`` brings the counts. vLLM's outputs have no room for them: what a model runner may return beside tokens
is the experts of its own mixture layers, a fixed number per token.
"""

import json
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.logger import init_logger

from prunepath_vllm.config import expected_sparsity, sparsity_curve
from prunepath_vllm.errors import TauError
from prunepath_vllm.model_executor.engine_config import REPORT_KEY, Service
from prunepath_vllm.model_executor.requests import body_values, json_body, refusal
from prunepath_vllm.tau import shown

FIELD = "prunepath"

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

    async def complete(self, engine: Any) -> dict[str, Any]:
        """Add what was counted, and return the whole.

        Args:
            engine: vLLM's client of the engine.
        """
        names = ("prompt_ffn_sparsity", "ffn_sparsity")
        if self.content and names[0] not in self.content:
            try:
                counts = await engine.collective_rpc("prunepath_report", args=(self.name,))
            except Exception as error:  # the answer itself is there, and worth more than its report
                logger.warning("No count for a report: %s", error)
                counts = []
            for name in names:
                self.content[name] = self.content[f"{name}_by_layer"] = None
            # A pipeline's stages each speak for their layers.
            for name, stages in zip(names, zip(*filter(None, counts), strict=True), strict=False):
                if stages[0][1]:
                    layers = [1 - active / possible for counted, possible in stages for active in counted]
                    self.content[name] = sum(layers) / len(layers)
                    self.content[f"{name}_by_layer"] = [round(sparsity, 4) for sparsity in layers]
        return self.content


_report: ContextVar[Report | None] = ContextVar("prunepath_report", default=None)
"""Of the HTTP request being handled; None where it has not asked."""


def fill_report(service: Service, tau: float, extra: dict[str, Any]) -> None:
    """Write what is known of a request when it is admitted, if it asked for a report, and have it counted."""
    report = _report.get()
    if report is None:
        return
    extra[REPORT_KEY] = report.name
    prompt_tau = service.prompt_tau(tau)
    curve = sparsity_curve(service.prunepath)
    shares = [None, None] if curve is None else expected_sparsity(np.array([tau, prompt_tau]), curve).tolist()
    report.content["tau"], report.content["prompt_tau"] = tau, prompt_tau
    report.content["expected_ffn_sparsity"], report.content["expected_prompt_ffn_sparsity"] = shares


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
        if not wanted:
            await self.app(scope, receive, send)
            return
        report = Report()
        token = _report.set(report)
        try:
            await self.app(scope, receive, _Reporter(send, report, scope["app"].state.engine_client))
        finally:
            _report.reset(token)


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


class _Reporter:
    """An ASGI ``send`` that adds the report."""

    def __init__(self, send: Send, report: Report, engine: Any) -> None:
        self.send, self.report, self.engine = send, report, engine
        self.start: Message = {}
        self.kind = ""
        self.pending = b""
        self.chunk: dict[str, Any] = {}
        """The stream's first chunk: what an added one must agree with."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            content_type = MutableHeaders(raw=message["headers"]).get("content-type", "")
            if message["status"] == 200:
                self.kind = content_type.split(";")[0]
            if self.kind == "application/json":  # its length is about to change
                return
        elif message["type"] == "http.response.body" and self.kind == "text/event-stream":
            message = {**message, "body": await self._events(message)}
        elif message["type"] == "http.response.body" and self.kind == "application/json":
            self.pending += message.get("body", b"")
            if message.get("more_body", False):
                return
            body = await self._object(self.pending)
            MutableHeaders(raw=self.start["headers"])["content-length"] = str(len(body))
            await self.send(self.start)
            message = {"type": "http.response.body", "body": body}
        await self.send(message)

    async def _object(self, body: bytes) -> bytes:
        data, content = json.loads(body), await self.report.complete(self.engine)
        return _dump({**data, FIELD: content}) if isinstance(data, dict) and content else body

    async def _events(self, message: Message) -> bytes:
        """The whole events that have come so far; the rest waits."""
        *events, self.pending = (self.pending + message.get("body", b"")).split(b"\n\n")
        done = b"".join([await self._event(event) + b"\n\n" for event in events])
        return done if message.get("more_body", False) else done + self.pending

    async def _event(self, event: bytes) -> bytes:
        mark = b"data: "
        at = 0 if event.startswith(mark) else event.find(b"\n" + mark) + 1  # JSON has no raw line breaks
        head, data = event[:at], event[at:].removeprefix(mark)
        if data == event[at:]:
            return event
        if data == b"[DONE]":
            content = await self.report.complete(self.engine)
            if "choices" not in self.chunk or not content:
                return event
            same = {name: self.chunk[name] for name in ("id", "object", "created", "model") if name in self.chunk}
            return mark + _dump({**same, "choices": [], FIELD: content}) + b"\n\n" + event
        if b'"choices"' in data and not self.chunk:
            self.chunk = json.loads(data)
        elif head.startswith(b"event: response.completed"):
            completed = json.loads(data)
            completed["response"][FIELD] = await self.report.complete(self.engine)
            return head + mark + _dump(completed)
        return event


def _dump(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
