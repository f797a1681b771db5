"""Where the operator's policy enters vLLM: the functions that are wrapped, the callbacks, and when."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from starlette.middleware import Middleware

from prunepath_vllm.model_executor.compat import VllmConfig, expect_parameters, wrap_once
from prunepath_vllm.model_executor.engine_config import PREFILL_KEY, PrunePathEngineConfig, server_options
from prunepath_vllm.tau import DENSE_TAU

_MARK = "_prunepath_server"
_BLOCK_HASHES = "vllm.v1.core.kv_cache_utils"


class ServedEngineConfig(PrunePathEngineConfig):
    """The engine's configuration hook, with the operator's metrics, reports and routes."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """See the base class; raises what it raises."""
        PrunePathEngineConfig.verify_and_update_config(vllm_config)

        # Not at the top: the plugin loads this module in every process, the front end has its own.
        from prunepath_vllm.entrypoints.server.batch import install_in_batch_runner
        from prunepath_vllm.entrypoints.server.metrics import count_request
        from prunepath_vllm.entrypoints.server.report import fill_report
        from prunepath_vllm.model_executor.requests import API_SERVER, observe_admissions

        observe_admissions(count_request)
        observe_admissions(fill_report)
        install_in_batch_runner()
        # The API server imports its launcher before it reads any model's configuration; elsewhere there is no HTTP.
        if app := sys.modules.get(API_SERVER):
            wrap_once(app, "init_entrypoints_middleware", _with_routes, _MARK)
        if server_options(vllm_config).prefill_tau is not None:
            import vllm.v1.core.kv_cache_utils  # noqa: F401  this process may be the engine core too

            install_in_engine_core()


def install_in_engine_core() -> None:
    """Make block hashes tell generated tokens of different taus apart; only where the engine core has been imported.

    Raises:
        EngineVersionError: the hash function has moved.
    """
    if module := sys.modules.get(_BLOCK_HASHES):
        expect_parameters(module.generate_block_hash_extra_keys, "request", "start_token_idx", "end_token_idx")
        wrap_once(module, "generate_block_hash_extra_keys", _with_decode_tau, _MARK)


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
    if PREFILL_KEY not in extra:
        return None
    tau, prefill_tau = (min(extra[name], DENSE_TAU) for name in ("tau", PREFILL_KEY))
    return None if tau == prefill_tau else ("prunepath", f"tau={tau!r} from {first}")


def _with_routes(init_entrypoints_middleware: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init_entrypoints_middleware)
    def wrapped(args: Any, app: Any, *rest: Any, **kwargs: Any) -> None:
        from prunepath_vllm.entrypoints.server.metrics import MetricsMiddleware
        from prunepath_vllm.entrypoints.server.render import RenderMiddleware
        from prunepath_vllm.entrypoints.server.report import ReportMiddleware
        from prunepath_vllm.entrypoints.server.routes import router

        init_entrypoints_middleware(args, app, *rest, **kwargs)
        app.include_router(router)
        # Inside the one that reads the knob.
        app.user_middleware += [Middleware(one) for one in (RenderMiddleware, ReportMiddleware, MetricsMiddleware)]

    return wrapped


def _with_decode_tau(generate_extra_keys: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate_extra_keys)
    def wrapped(request: Any, start_token_idx: int, end_token_idx: int, *args: Any) -> Any:
        keys, *rest = generate_extra_keys(request, start_token_idx, end_token_idx, *args)
        if key := decode_block_key(request, start_token_idx, end_token_idx):
            keys = (*(keys or ()), key)
        return keys, *rest

    return wrapped
