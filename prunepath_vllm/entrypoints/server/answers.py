"""Changing what the engine's own endpoints answer, on its way out."""

import json
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send


class AnswerSender:
    """An ASGI ``send`` through which a JSON body passes whole, and a stream of events as it comes.

    Only answers of status 200 are changed. Subclasses say how.
    """

    def __init__(self, send: Send) -> None:
        self.send = send
        self.start: Message = {}
        self.kind = ""
        self.pending = b""

    async def __call__(self, message: Message) -> None:
        """Pass one message on."""
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
            body = await self.changed_body(self.pending)
            MutableHeaders(raw=self.start["headers"])["content-length"] = str(len(body))
            await self.send(self.start)
            message = {"type": "http.response.body", "body": body}
        await self.send(message)

    async def changed_body(self, body: bytes) -> bytes:
        """What a JSON body becomes."""
        return body

    async def changed_event(self, event: bytes) -> bytes:
        """What one event of a stream becomes, without the empty line at its end."""
        return event

    async def _events(self, message: Message) -> bytes:
        """The whole events that have come so far; the rest waits."""
        *events, self.pending = (self.pending + message.get("body", b"")).split(b"\n\n")
        done = b"".join([await self.changed_event(event) + b"\n\n" for event in events])
        return done if message.get("more_body", False) else done + self.pending


def dump(data: Any) -> bytes:
    """JSON as vLLM writes it."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
