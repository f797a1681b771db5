"""What the front end tells Prometheus, and when the workers tell theirs (``model_executor/counts.py``)."""

import asyncio
import functools
import os
from typing import Any

from prometheus_client import Histogram
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.logger import init_logger

from prunepath_vllm.model_executor.tau_resolution import TauResolver

REQUEST_TAU = (
    "prunepath:request_tau",
    "Tau of admitted requests: what they asked for, what their sparsity means, what load chose, or the default.",
)
"""Name and meaning of the histogram."""
TAU_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0, 1.05)
PUBLISH_SECONDS = 5.0
"""How long a scrape waits for the workers: a step, as a rule."""

logger = init_logger("vllm.prunepath")


def count_request(resolver: TauResolver, tau: float, extra: dict[str, Any]) -> None:
    """Count an admitted request by the tau it runs at."""
    _requested_tau().observe(tau)


class MetricsMiddleware:
    """ASGI middleware: before /metrics is read, the workers bring their counters up to date."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["path"] == "/metrics" and "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            engine = scope["app"].state.engine_client
            try:
                await asyncio.wait_for(engine.collective_rpc("prunepath_publish"), PUBLISH_SECONDS)
            except Exception as error:  # the engine's own metrics matter most when it is in trouble
                logger.warning("PrunePath's counters are as of the last scrape: %r", error)
        await self.app(scope, receive, send)


@functools.cache
def _requested_tau() -> Histogram:
    return Histogram(*REQUEST_TAU, buckets=TAU_BUCKETS)
