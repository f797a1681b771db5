"""The operator's policy on a request: the taus it may ask for, and which prefix-cache blocks it may share.

With a prefill tau, keys and values at positions below the prompt's length are computed at it, and those after at the
request's. So prompts of every tau share one salt, and the first block that holds generated tokens is marked with their
tau and where they begin; later blocks inherit that, because block hashes are chained.
"""

from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from prunepath_vllm.errors import TauError
from prunepath_vllm.model_executor.compat import create_error_response
from prunepath_vllm.model_executor.engine_config import ServerOptions, server_options
from prunepath_vllm.tau import DENSE_TAU, resolve_tau

PREFILL_KEY = "prunepath_prefill_tau"
"""Key of the engine core's copy of a request's extra arguments; overwritten whatever a user sends under it."""

_ROUNDING = 1e-9
"""A tau looked up for a sparsity may miss a bound by the curve's interpolation."""


def admit(request: Any, params: Any, options: ServerOptions) -> float:
    """Check an engine request whose tau has been resolved, and bring the operator's prefill tau to it.

    Args:
        request: vLLM's ``EngineCoreRequest``; changed.
        params: the caller's own parameters, as they came.
        options: the server's.

    Returns:
        The request's tau.

    Raises:
        TauRequestError: the tau is outside the server's bounds.
    """
    # Not at the top: the plugin loads this module in every process, the front end has its own.
    from prunepath_vllm.model_executor import requests

    pooling = request.pooling_params is not None
    extra: dict[str, Any] = request.pooling_params.extra_kwargs if pooling else request.sampling_params.extra_args
    tau: float = extra["tau"]
    try:
        check_bounds(tau, requested_sparsity(params), options)
    except TauError as error:
        raise requests.TauRequestError(error) from None
    extra.pop(PREFILL_KEY, None)
    if options.prefill_tau is not None:
        extra[PREFILL_KEY] = options.prefill_tau
        own = request.cache_salt.removesuffix(requests.tau_cache_salt(None, tau))
        request.cache_salt = requests.tau_cache_salt(own, options.prefill_tau)
    return tau


def requested_sparsity(params: Any) -> float | None:
    """The ``sparsity`` that a request named, from wherever it was."""
    from prunepath_vllm.model_executor import requests

    extra = params.extra_kwargs if hasattr(params, "extra_kwargs") else params.extra_args
    return {**(extra or {}), **(requests._http_knob.get() or {})}.get("sparsity")


def decode_block_key(request: Any, start: int, end: int) -> tuple[str, str] | None:
    """What the hash of the block of tokens [`start`, `end`) needs besides vLLM's own keys.

    Args:
        request: the engine core's ``Request``.
        start: position of the block's first token.
        end: position after its last.

    Returns:
        (name, value) for the first block with generated tokens, where they run at another tau than the prompt.
    """
    first = request.num_prompt_tokens
    if not start <= first < end or request.sampling_params is None:
        return None
    extra = request.sampling_params.extra_args or {}
    if PREFILL_KEY not in extra:
        return None
    tau, prefill_tau = (min(extra[name], DENSE_TAU) for name in ("tau", PREFILL_KEY))
    return None if tau == prefill_tau else ("prunepath", f"tau={tau!r} from {first}")


def check_bounds(tau: float, sparsity: float | None, options: ServerOptions) -> None:
    """Refuse a tau outside the server's bounds; `sparsity` is what the request named, where it named one.

    Raises:
        TauError: names the field, its value and the bounds.
    """
    if options.min_tau - _ROUNDING <= tau <= options.max_tau + _ROUNDING:
        return
    bounds = f"[{options.min_tau}, {options.max_tau}] (this server's min_tau and max_tau)"
    if sparsity is None:
        raise TauError(f"tau must be in {bounds}, got {tau}", parameter="tau", value=tau)
    raise TauError(
        f"sparsity {sparsity} means tau {tau:.4g} on this checkpoint, and tau must be in {bounds}",
        parameter="sparsity",
        value=sparsity,
    )


def refusal(error: TauError) -> JSONResponse:
    """An OpenAI error: HTTP 400 that names the parameter."""
    from prunepath_vllm.model_executor import requests

    return JSONResponse(create_error_response(requests.TauRequestError(error)).model_dump(), status_code=400)


class BoundsMiddleware:
    """ASGI middleware: refuses what :func:`admit` would, before a stream's status has been sent."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        from prunepath_vllm.model_executor import requests

        knob = requests._http_knob.get() if scope["type"] == "http" else None
        if knob:
            vllm_config = scope["app"].state.vllm_config
            options = server_options(vllm_config)
            curve = vllm_config.model_config.hf_config.prunepath.tau_curve
            try:
                tau = resolve_tau(knob, default_tau=options.default_tau, tau_curve=curve)
                check_bounds(tau, knob.get("sparsity"), options)
            except TauError as error:
                await refusal(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)
