"""``/render`` endpoints (``--enable-scale-out``): what they answer is a request for ``/inference/v1/generate``, and
carries the knob of the body that they rendered."""

import json
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from prunepath_vllm.entrypoints.server.answers import AnswerSender, dump
from prunepath_vllm.entrypoints.server.knob import KNOBS, body_values, json_body


class RenderMiddleware:
    """Writes the knob of a body that is rendered into the sampling parameters that come back.

    As it was asked: a choice left to the server is made by the one that generates, with its own queue.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["path"].endswith("/render"):
            body, receive = await json_body(scope, receive)
            knob = {name: values[0] for name in KNOBS if (values := body_values(body or {}, name))}
            if knob:
                send = _Renderer(send, knob)
        await self.app(scope, receive, send)


class _Renderer(AnswerSender):
    def __init__(self, send: Send, knob: dict[str, Any]) -> None:
        super().__init__(send)
        self.knob = knob

    async def changed_body(self, body: bytes) -> bytes:
        rendered = json.loads(body)
        for request in rendered if isinstance(rendered, list) else [rendered]:
            parameters = request["sampling_params"]
            parameters["extra_args"] = {**(parameters.get("extra_args") or {}), **self.knob}
        return dump(rendered)
