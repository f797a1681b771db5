"""The knob over HTTP: ``tau`` / ``sparsity`` of JSON bodies, at the top level or under ``vllm_xargs``.

Read before the engine's schemas drop the first and turn booleans into numbers in the second. What was read goes on to
where the engine admits the request (model_executor/admission.py).
"""

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prunepath_vllm.entrypoints.server.queue_length import waiting_requests
from prunepath_vllm.errors import ConfigError, TauError
from prunepath_vllm.model_executor.admission import (
    KNOBS,
    TauRequestError,
    refuse_misnamed,
    refuse_misplaced,
    request_knob,
)
from prunepath_vllm.model_executor.compat import create_error_response
from prunepath_vllm.model_executor.operator_policy import refuse_unread_tau
from prunepath_vllm.model_executor.tau_resolution import TauResolver
from prunepath_vllm.tau import DENSE_TAU, PARAMETERS, is_adaptive, parse_tau_range, resolve_tau

_BODY = "prunepath.body"
"""Key of an ASGI scope: its JSON body, parsed."""


class KnobMiddleware:
    """ASGI middleware: reads the knob from JSON bodies and refuses what the engine would.

    Here, and not only where the engine builds its request: a stream's status would have been sent by then.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        try:
            body, receive = await json_body(scope, receive)
            knob: dict[str, Any] = {}
            if body is not None and (resolver := app_resolver(scope["app"])) is not None:
                _refuse_in_url(scope)
                knob = settled_knob(body, resolver, scope["app"].state.engine_client)
                receive = _as_schemas_take_it(body, knob, receive)
        except TauError as error:
            await refusal(error)(scope, receive, send)
            return
        with request_knob(knob):
            await self.app(scope, receive, send)


def settled_knob(body: dict[str, Any], resolver: TauResolver, engine: Any) -> dict[str, Any]:
    """``tau`` or ``sparsity`` of a JSON body, with what it leaves to the server chosen; empty where nothing is asked.

    Args:
        body: a request's.
        resolver: the engine's.
        engine: vLLM's client of it, whose queue is listened to from the first body on.

    Raises:
        TauError: see :func:`knob_of_body`; a tau outside the operator's bounds; or a beam search that would not get it.
    """
    knob = knob_of_body(body)
    by_model = resolver.policy.default_tau_by_model
    # A body without a name is answered under the first one.
    if not knob and by_model:
        name = body.get("model") or engine.vllm_config.model_config.served_model_name
        knob = {"tau": by_model[name]} if isinstance(name, str) and name in by_model else knob
    tau = resolver.tau_of(knob, waiting_requests(engine))
    _refuse_beams(body, tau, resolver.prompt_tau(tau))
    # Chosen once, for all prompts and choices of the body.
    return {"tau": tau} if is_adaptive(knob.get("tau")) else knob


def _refuse_beams(body: dict[str, Any], tau: float, prompt_tau: float) -> None:
    """Refuse a beam search that would run at the prefill tau: at each step vLLM sends its beams as prompts."""
    beams = str(body.get("use_beam_search")).lower() in _TRUE
    if beams and min(tau, DENSE_TAU) != min(prompt_tau, DENSE_TAU):
        raise TauError(
            f"use_beam_search at tau {tau} is not possible on this server: every token of a beam would be computed at "
            f"its prefill_tau {prompt_tau}; expected tau {prompt_tau}, or no use_beam_search",
            parameter="use_beam_search",
            value=tau,
        )


_TRUE = ("true", "1", "1.0", "t", "y", "yes", "on")
"""What the engine's schemas take for true."""


def check_options(args: Any) -> None:
    """Refuse defaults on a server's command line that nobody would read: they would go unnoticed.

    Args:
        args: the command line of a server or a batch; :func:`operator_policy` has checked its ``additional_config``.

    Raises:
        ConfigError: names a tau among the defaults of the chat template, or a name that is not served.
    """
    if isinstance(template := getattr(args, "default_chat_template_kwargs", None), Mapping):
        refuse_unread_tau(template, "--default-chat-template-kwargs")
    options = (args.additional_config or {}).get("prunepath", {})
    adapters = [module.name for module in getattr(args, "lora_modules", None) or ()]
    served = [*(args.served_model_name or [args.model]), *adapters]
    if unknown := set(options.get("default_tau_by_model", {})) - set(served):
        raise ConfigError(
            f"additional_config.prunepath.default_tau_by_model: {min(unknown)!r} is not served; "
            f"expected one of {', '.join(served)}"
        )


def app_resolver(app: Any) -> TauResolver | None:
    """The resolver of the engine behind vLLM's FastAPI `app`; None where its model is not a PrunePath one."""
    if not hasattr(app.state, "prunepath"):
        app.state.prunepath = TauResolver.of(app.state.vllm_config)
    return app.state.prunepath


def refusal(error: TauError) -> JSONResponse:
    """An OpenAI error: HTTP 400 that names the parameter."""
    return JSONResponse(create_error_response(TauRequestError(error)).model_dump(), status_code=400)


async def json_body(scope: Scope, receive: Receive) -> tuple[dict[str, Any] | None, Receive]:
    """The JSON object that a POST request carries, read once however many middlewares ask.

    Returns:
        The object, None where the request has none (the engine has its own answer to a broken one), and what the next
        application is to receive from.

    Raises:
        TauError: what neither Python nor FastAPI can decode; FastAPI's own answer would not be an OpenAI error.
    """
    if _BODY in scope:
        return scope[_BODY], receive
    if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
        return None, receive
    messages: list[Message] = []
    while not messages or (messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False)):
        messages.append(await receive())
    try:
        data = json.loads(b"".join(message.get("body", b"") for message in messages))
    except json.JSONDecodeError:
        data = None
    except (ValueError, RecursionError) as error:  # not UTF-8, nested too deep, too many digits
        raise TauError(f"body must be JSON that can be decoded, got: {error}", parameter="body", value=None) from None
    scope[_BODY] = data if isinstance(data, dict) else None
    return scope[_BODY], _replay(messages, receive)


def body_values(body: dict[str, Any], name: str) -> list[Any]:
    """What a body has under `name`, in each place where it is read; null counts as absent."""
    return [place[name] for place in _places(body) if place.get(name) is not None]


def knob_of_body(body: dict[str, Any]) -> dict[str, Any]:
    """``tau`` and ``sparsity`` of a JSON body, whichever spelling was used.

    Raises:
        TauError: a value out of range, one parameter with two values, or one in a place or under a name where nobody
            would read it.
    """
    places = _places(body)
    # What users keep in a body for themselves (``metadata``, messages, tools) is none of our business.
    refuse_misplaced(body, _BODY_PLACES, read=places, also=_OTHER_PLACES)
    for place in places:
        refuse_misnamed(place)
    knob: dict[str, Any] = {}
    for name in PARAMETERS:
        values = body_values(body, name)
        for value in values:
            if name == "tau" and is_adaptive(value):
                parse_tau_range(value)
            else:
                resolve_tau({name: value}, default_tau=DENSE_TAU, tau_curve=[(DENSE_TAU, 0.0)])
            if value != values[0]:
                raise TauError(
                    f"{name} is {values[0]!r} in one place of the body and {value!r} in another; expected one value",
                    parameter=name,
                    value=values[0],
                )
        if values:
            knob[name] = values[0]
    return knob


def _places(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Where a body's knob is read: in itself and under ``vllm_xargs``; of token ids, among the sampling parameters too,
    which are the engine's own there (``/inference/v1/generate``)."""
    places = [body, body.get("vllm_xargs")]
    if "token_ids" in body and isinstance(parameters := body.get("sampling_params"), dict):
        places.append(parameters.get("extra_args"))
    return [place for place in places if isinstance(place, dict)]


_OTHER_PLACES = (
    "sampling_params",
    "pooling_params",
    "xargs",
    "additional_config",
    "prunepath",
    "chat_template_kwargs",
    "generation_config",
    "stream_options",
)
"""Where a client may think that the engine's options go, besides names like that of the right place."""


_BODY_PLACES = "at the top level of the body or under 'vllm_xargs'"


def _refuse_in_url(scope: Scope) -> None:
    """Refuse a knob in the query string: no endpoint reads it there."""
    for name, value in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True):
        if name in KNOBS:
            raise TauError(
                f"{name} in the URL is not read; expected {name!r} {_BODY_PLACES}", parameter=name, value=value
            )


def _is_json(scope: Scope) -> bool:
    content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return b"json" in content_type.lower()


def _as_schemas_take_it(body: dict[str, Any], knob: dict[str, Any], receive: Receive) -> Receive:
    """What the engine is to read where ``vllm_xargs`` holds what its schema has no type for: null, a range of taus."""
    xargs = body.get("vllm_xargs")
    if not isinstance(xargs, dict):
        return receive
    given = {name: value for name, value in xargs.items() if value is not None or name not in KNOBS}
    if isinstance(given.get("tau"), dict):
        given |= knob
    elif len(given) == len(xargs):
        return receive
    content = json.dumps({**body, "vllm_xargs": given}).encode()
    return _replay([{"type": "http.request", "body": content, "more_body": False}], receive)


def _replay(messages: list[Message], receive: Receive) -> Receive:
    pending = iter(messages)

    async def replayed() -> Message:
        return next(pending, None) or await receive()

    return replayed
