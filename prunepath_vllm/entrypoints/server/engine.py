"""Where the operator's policy enters vLLM: the functions that are wrapped, and when."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from starlette.middleware import Middleware

from prunepath_vllm.entrypoints.server.metrics import count_request
from prunepath_vllm.entrypoints.server.policy import BoundsMiddleware, admit, decode_block_key
from prunepath_vllm.entrypoints.server.report import ReportMiddleware, fill_report
from prunepath_vllm.model_executor.compat import VllmConfig, expect_parameters, wrap_once
from prunepath_vllm.model_executor.engine_config import PrunePathEngineConfig, server_options

_MARK = "_prunepath_server"
_API_SERVER = "vllm.entrypoints.launchers.app"
_BLOCK_HASHES = "vllm.v1.core.kv_cache_utils"


class ServedEngineConfig(PrunePathEngineConfig):
    """The engine's configuration hook, with the operator's policy around the request path it installs."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """See the base class; raises what it raises."""
        PrunePathEngineConfig.verify_and_update_config(vllm_config)

        from vllm.v1.engine.input_processor import InputProcessor

        wrap_once(InputProcessor, "process_inputs", _with_policy, _MARK)
        # The API server imports its launcher before it reads any model's configuration; elsewhere there is no HTTP.
        if app := sys.modules.get(_API_SERVER):
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


def _with_policy(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(process_inputs)
    def wrapped(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        if hasattr(self.vllm_config.model_config.hf_config, "prunepath"):
            options = server_options(self.vllm_config)
            tau = admit(request, params, options)
            count_request(tau)
            fill_report(tau, options, self.vllm_config.model_config.hf_config.prunepath)
        return request

    return wrapped


def _with_routes(init_entrypoints_middleware: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init_entrypoints_middleware)
    def wrapped(args: Any, app: Any, *rest: Any, **kwargs: Any) -> None:
        from prunepath_vllm.entrypoints.server.routes import router

        init_entrypoints_middleware(args, app, *rest, **kwargs)
        app.include_router(router)
        # Inside the one that reads the knob.
        app.user_middleware += [Middleware(BoundsMiddleware), Middleware(ReportMiddleware)]

    return wrapped


def _with_decode_tau(generate_extra_keys: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(generate_extra_keys)
    def wrapped(request: Any, start_token_idx: int, end_token_idx: int, *args: Any) -> Any:
        keys, *rest = generate_extra_keys(request, start_token_idx, end_token_idx, *args)
        if key := decode_block_key(request, start_token_idx, end_token_idx):
            keys = (*(keys or ()), key)
        return keys, *rest

    return wrapped
