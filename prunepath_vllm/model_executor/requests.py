"""The front end: a request's tau is validated before it is admitted, and its prefix-cache blocks are its tau's own.

Offline, tau rides on the engine's parameter objects. Over HTTP, a middleware reads ``tau`` / ``sparsity`` from the
body, at the top level or under ``vllm_xargs``, before the engine's schemas drop the first and turn booleans into
numbers in the second; a context variable carries what it read to where the engine builds its own request.
"""

import functools
import json
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.v1.engine.input_processor import InputProcessor

from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import TauError
from prunepath_vllm.model_executor.compat import (
    VllmConfig,
    VLLMValidationError,
    create_error_response,
    expect_parameters,
    wrap_once,
)
from prunepath_vllm.model_executor.engine_config import server_default_tau
from prunepath_vllm.tau import DENSE_TAU, PARAMETERS, resolve_tau

_http_knob: ContextVar[dict[str, Any] | None] = ContextVar("prunepath_http_knob", default=None)
"""``tau`` / ``sparsity`` of the HTTP request being handled; inherited by the tasks that stream its answer."""

_API_SERVER = "vllm.entrypoints.launchers.app"


class TauRequestError(VLLMValidationError, ValueError):
    """A request's tau or sparsity cannot be honoured: HTTP 400, and a ValueError offline."""

    def __init__(self, error: TauError) -> None:
        VLLMValidationError.__init__(self, str(error), parameter=error.parameter, value=error.value)


def install_request_hooks() -> None:
    """Hook the engine's front end in this process. Idempotent; models other than PrunePath's pass untouched.

    Raises:
        EngineVersionError: vLLM's front end has moved.
    """
    expect_parameters(InputProcessor.process_inputs, "self", "request_id", "prompt", "params")
    wrap_once(InputProcessor, "process_inputs", _with_tau)
    # The API server imports its launcher before it reads any model's configuration; elsewhere there is no HTTP.
    if _API_SERVER in sys.modules:
        expect_parameters(sys.modules[_API_SERVER].init_entrypoints_middleware, "args", "app")
        wrap_once(sys.modules[_API_SERVER], "init_entrypoints_middleware", _with_middleware)


def tau_cache_salt(cache_salt: str | None, tau: float) -> str:
    """The prefix-cache salt of a request: the user's own, then the tau. Every dense tau shares one.

    The tau always comes last, so that no salt a user may choose passes for another request's.
    """
    return f"{cache_salt or ''}|prunepath:tau={min(tau, DENSE_TAU)!r}"


def _with_tau(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(process_inputs)
    def wrapped(self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        prunepath = _prunepath_of(self.vllm_config)
        if prunepath is None:
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        pooling = hasattr(params, "extra_kwargs")
        # The body's own values win over the copies that the engine's schema has coerced.
        requested = {**((params.extra_kwargs if pooling else params.extra_args) or {}), **(_http_knob.get() or {})}
        try:
            tau = resolve_tau(
                requested, default_tau=server_default_tau(self.vllm_config), tau_curve=prunepath.tau_curve
            )
        except TauError as error:
            raise TauRequestError(error) from None
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        # Workers read the resolved tau alone. The engine's copy is written, never the caller's parameters.
        rest = {name: value for name, value in requested.items() if name not in PARAMETERS}
        if pooling:
            request.pooling_params = params.clone() if request.pooling_params is params else request.pooling_params
            request.pooling_params.extra_kwargs = {**rest, "tau": tau}
        else:
            request.sampling_params = params.clone() if request.sampling_params is params else request.sampling_params
            request.sampling_params.extra_args = {**rest, "tau": tau}
        request.cache_salt = tau_cache_salt(request.cache_salt, tau)
        return request

    return wrapped


def _prunepath_of(vllm_config: VllmConfig) -> PrunePathConfig | None:
    return getattr(vllm_config.model_config.hf_config, "prunepath", None)


def _with_middleware(init_entrypoints_middleware: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init_entrypoints_middleware)
    def wrapped(args: Any, app: Any, *rest: Any, **kwargs: Any) -> None:
        init_entrypoints_middleware(args, app, *rest, **kwargs)
        # Innermost: authentication and request identifiers come first.
        app.user_middleware.append(Middleware(KnobMiddleware))

    return wrapped


class KnobMiddleware:
    """ASGI middleware: reads the knob from JSON bodies, refuses what is malformed, leaves the body as it came."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self.app(scope, receive, send)
            return
        messages, body = await _read_body(receive)
        try:
            knob = knob_of_body(body)
        except TauError as error:
            response = create_error_response(TauRequestError(error))
            await JSONResponse(response.model_dump(), status_code=400)(scope, receive, send)
            return
        token = _http_knob.set(knob)
        try:
            await self.app(scope, _replay(messages, receive), send)
        finally:
            _http_knob.reset(token)


def knob_of_body(body: bytes) -> dict[str, Any]:
    """``tau`` and ``sparsity`` of a JSON body, whichever spelling was used; null counts as absent.

    Raises:
        TauError: a value out of range, or one parameter with two values.
    """
    try:
        data = json.loads(body)
    except ValueError:  # the engine has its own answer to that
        return {}
    if not isinstance(data, dict):
        return {}
    xargs = data.get("vllm_xargs")
    nested = xargs if isinstance(xargs, dict) else {}
    knob: dict[str, Any] = {}
    for name in PARAMETERS:
        values = [place[name] for place in (data, nested) if place.get(name) is not None]
        for value in values:
            resolve_tau({name: value}, default_tau=DENSE_TAU, tau_curve=[(DENSE_TAU, 0.0)])
        if len(values) == 2 and values[0] != values[1]:
            raise TauError(
                f"{name} is {values[0]!r} in the body and {values[1]!r} in vllm_xargs; expected one value",
                parameter=name,
                value=values[0],
            )
        if values:
            knob[name] = values[0]
    return knob


def _is_json(scope: Scope) -> bool:
    content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return b"json" in content_type.lower()


async def _read_body(receive: Receive) -> tuple[list[Message], bytes]:
    messages: list[Message] = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages, b"".join(message.get("body", b"") for message in messages)


def _replay(messages: list[Message], receive: Receive) -> Receive:
    pending = iter(messages)

    async def replayed() -> Message:
        return next(pending, None) or await receive()

    return replayed
