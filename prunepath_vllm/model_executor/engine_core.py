"""The engine core: no request reaches a worker with a tau that was not checked, or shares blocks with another tau.

Whatever brought it: Python's front end has checked it already, to answer with HTTP 400; another front end may not have.
Here a request gets the one tau that workers read, and its prompt's tau is appended to its prefix-cache salt, which vLLM
makes part of its first block's hash and so, hashes being chained, of all. Keys and values that are stored under block
hashes, in the engine's cache or by a KV connector, are thereby their tau's own.

With a prefill tau, keys and values at positions below the prompt's length are computed at it, and those after at the
request's. So prompts of every tau share one salt, and blocks that hold generated tokens are marked besides.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from prunepath_vllm.errors import UnsupportedFeatureError
from prunepath_vllm.model_executor.compat import expect_module, wrap_once
from prunepath_vllm.model_executor.tau_resolution import TauResolver
from prunepath_vllm.tau import DENSE_TAU, PARAMETERS

PREFILL_KEY = "prunepath_prefill_tau"
"""Key of the engine core's copy of a request's extra arguments; overwritten whatever a user sends under it."""

_CORE = "vllm.v1.engine.core"
_HASHING = ("vllm.v1.core.kv_cache_utils", "vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager")
"""Modules that know the hash function; the second and third tell of it in KV events."""

_resolvers: WeakKeyDictionary[Any, TauResolver | None] = WeakKeyDictionary()


def install_in_engine_core() -> None:
    """Hook the engine core, where this process has imported it. Idempotent; other models' requests pass untouched.

    Raises:
        EngineVersionError: the engine core has moved.
    """
    if core := sys.modules.get(_CORE):
        expect_module(_CORE, core)
        wrap_once(core.EngineCore, "preprocess_add_request", _with_settled_tau)
    for name in _HASHING:
        if module := sys.modules.get(name):
            expect_module(name, module)
            wrap_once(module, "generate_block_hash_extra_keys", _with_decode_tau)


def extra_arguments(params: Any) -> dict[str, Any]:
    """A copy of the extra arguments of sampling or pooling parameters."""
    return dict((params.extra_kwargs if hasattr(params, "extra_kwargs") else params.extra_args) or {})


def set_extra_arguments(params: Any, extra: dict[str, Any]) -> None:
    """The reverse of :func:`extra_arguments`."""
    setattr(params, "extra_kwargs" if hasattr(params, "extra_kwargs") else "extra_args", extra)


def settle(resolver: TauResolver, request: Any) -> None:
    """Give a request the tau that it runs at and the salt of its prompt's.

    Args:
        resolver: its engine's.
        request: vLLM's ``EngineCoreRequest``, as it came; written to.

    Raises:
        TauError: its tau is none, or outside the operator's bounds.
        UnsupportedFeatureError: see :func:`refuse_sessions`.
    """
    refuse_sessions(request)
    params = request.sampling_params or request.pooling_params
    extra = extra_arguments(params)
    tau = resolver.tau_of(extra)
    extra = {name: value for name, value in extra.items() if name not in (*PARAMETERS, PREFILL_KEY)}
    extra["tau"] = tau
    if resolver.policy.prefill_tau is not None:
        extra[PREFILL_KEY] = resolver.policy.prefill_tau
    set_extra_arguments(params, extra)
    request.cache_salt = tau_cache_salt(request.cache_salt, resolver.prompt_tau(tau))


def refuse_sessions(request: Any) -> None:
    """Refuse an ``EngineCoreRequest`` whose prompt goes on later: its parts may differ in tau, and share blocks.

    Raises:
        UnsupportedFeatureError: it does.
    """
    if request.resumable:
        raise UnsupportedFeatureError(
            "PrunePath models do not support streaming input (resumable requests); expected the whole prompt at once"
        )


def tau_cache_salt(cache_salt: str | None, tau: float) -> str:
    """The prefix-cache salt of a request: the user's own, then the tau. Every dense tau shares one.

    The tau always comes last, so that no salt a user may choose passes for another request's.
    """
    return f"{cache_salt or ''}|prunepath:tau={min(tau, DENSE_TAU)!r}"


def decode_block_key(request: Any, start: int, end: int) -> tuple[str, str] | None:
    """What the hash of the block of tokens [`start`, `end`) needs besides vLLM's own keys.

    The first block that holds generated tokens is marked with their tau and where they begin; later ones inherit that,
    because block hashes are chained.

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
    tau, prefill_tau = extra.get("tau"), extra.get(PREFILL_KEY)
    if not isinstance(tau, float) or not isinstance(prefill_tau, float):  # no prefill tau, or another model's request
        return None
    tau, prefill_tau = min(tau, DENSE_TAU), min(prefill_tau, DENSE_TAU)
    return None if tau == prefill_tau else ("prunepath", f"tau={tau!r} from {first}")


def _with_settled_tau(preprocess_add_request: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(preprocess_add_request)
    def wrapped(self: Any, request: Any) -> Any:
        if self not in _resolvers:
            _resolvers[self] = TauResolver.of(self.vllm_config)
        if resolver := _resolvers[self]:
            settle(resolver, request)
        return preprocess_add_request(self, request)

    return wrapped


def _with_decode_tau(generate_extra_keys: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate_extra_keys)
    def wrapped(request: Any, start_token_idx: int, end_token_idx: int, *args: Any) -> Any:
        keys, *rest = generate_extra_keys(request, start_token_idx, end_token_idx, *args)
        if key := decode_block_key(request, start_token_idx, end_token_idx):
            keys = (*(keys or ()), key)
        return keys, *rest

    return wrapped
