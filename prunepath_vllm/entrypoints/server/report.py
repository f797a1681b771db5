"""``"prunepath_report": true``: a request is told its tau and the FFN sparsity to expect of it, in its own answer.

An ASGI middleware adds one object, ``prunepath``, to what the engine answers: to the JSON body; in a stream of chunks,
to one more chunk without choices before ``[DONE]``, as OpenAI's usage chunk is; in a stream of the responses API, to
the response of its last event.
"""

import json
from contextvars import ContextVar
from typing import Any

import numpy as np
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.entrypoints.server.policy import refusal
from prunepath_vllm.errors import TauError
from prunepath_vllm.model_executor.engine_config import ServerOptions, expected_sparsity, sparsity_curve

PARAMETER = "prunepath_report"
FIELD = "prunepath"

_report: ContextVar[dict[str, Any] | None] = ContextVar("prunepath_report", default=None)
"""What the HTTP request being handled will be told; None where it has not asked."""


def fill_report(tau: float, options: ServerOptions, prunepath: PrunePathConfig) -> None:
    """Write the report of a request that has been admitted, if it asked for one."""
    report = _report.get()
    if report is None:
        return
    prompt_tau = tau if options.prefill_tau is None else options.prefill_tau
    curve = sparsity_curve(prunepath)
    shares = [None, None] if curve is None else expected_sparsity(np.array([tau, prompt_tau]), curve).tolist()
    report["tau"], report["prompt_tau"] = tau, prompt_tau
    report["expected_ffn_sparsity"], report["expected_prompt_ffn_sparsity"] = shares


class ReportMiddleware:
    """Adds the report to the answers of requests that ask for it; every other request passes untouched."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        from prunepath_vllm.model_executor import requests

        if scope["type"] != "http" or scope["method"] != "POST" or not requests._is_json(scope):
            await self.app(scope, receive, send)
            return
        messages, body = await requests._read_body(receive)
        receive = requests._replay(messages, receive)
        try:
            wanted = asks_for_report(body)
        except TauError as error:
            await refusal(error)(scope, receive, send)
            return
        if not wanted:
            await self.app(scope, receive, send)
            return
        report: dict[str, Any] = {}
        token = _report.set(report)
        try:
            await self.app(scope, receive, _Reporter(send, report))
        finally:
            _report.reset(token)


def asks_for_report(body: bytes) -> bool:
    """Whether a JSON body has ``prunepath_report``, at the top level or under ``vllm_xargs``.

    Raises:
        TauError: it is not true, false or null.
    """
    if PARAMETER.encode() not in body:
        return False
    try:
        data = json.loads(body)
    except ValueError:  # the engine has its own answer to that
        return False
    if not isinstance(data, dict):
        return False
    places = [place for place in (data, data.get("vllm_xargs")) if isinstance(place, dict)]
    values = [place[PARAMETER] for place in places if place.get(PARAMETER) is not None]
    for value in values:
        if not isinstance(value, bool):
            raise TauError(f"{PARAMETER} must be true or false, got {value!r:.80}", parameter=PARAMETER, value=value)
    return any(values)


class _Reporter:
    """An ASGI ``send`` that adds the report."""

    def __init__(self, send: Send, report: dict[str, Any]) -> None:
        self.send, self.report = send, report
        self.start: Message = {}
        self.kind = ""
        self.pending = b""
        self.chunk: dict[str, Any] = {}
        """The stream's last chunk: what an added one must agree with."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            content_type = MutableHeaders(raw=message["headers"]).get("content-type", "")
            if message["status"] == 200:
                self.kind = content_type.split(";")[0]
            if self.kind == "application/json":  # its length is about to change
                return
        elif message["type"] == "http.response.body" and self.kind == "text/event-stream":
            message = {**message, "body": self._events(message)}
        elif message["type"] == "http.response.body" and self.kind == "application/json":
            self.pending += message.get("body", b"")
            if message.get("more_body", False):
                return
            body = self._object(self.pending)
            MutableHeaders(raw=self.start["headers"])["content-length"] = str(len(body))
            await self.send(self.start)
            message = {"type": "http.response.body", "body": body}
        await self.send(message)

    def _object(self, body: bytes) -> bytes:
        data = json.loads(body)
        return _dump({**data, FIELD: self.report}) if isinstance(data, dict) and self.report else body

    def _events(self, message: Message) -> bytes:
        """The whole events that have come so far; the rest waits."""
        *events, self.pending = (self.pending + message.get("body", b"")).split(b"\n\n")
        done = b"".join(self._event(event) + b"\n\n" for event in events)
        return done if message.get("more_body", False) else done + self.pending

    def _event(self, event: bytes) -> bytes:
        mark = b"data: "
        at = 0 if event.startswith(mark) else event.find(b"\n" + mark) + 1  # JSON has no raw line breaks
        head, data = event[:at], event[at:].removeprefix(mark)
        if data == event[at:] or not self.report:
            return event
        if data == b"[DONE]":
            if "choices" not in self.chunk:
                return event
            same = {name: self.chunk[name] for name in ("id", "object", "created", "model") if name in self.chunk}
            return mark + _dump({**same, "choices": [], FIELD: self.report}) + b"\n\n" + event
        if b'"choices"' in data and not self.chunk:
            self.chunk = json.loads(data)
        elif head.startswith(b"event: response.completed"):
            content = json.loads(data)
            content["response"][FIELD] = self.report
            return head + mark + _dump(content)
        return event


def _dump(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
