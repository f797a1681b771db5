"""Where the operator's policy enters vLLM: the functions that are wrapped, the callbacks, and when."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from starlette.middleware import Middleware

from prunepath_vllm.model_executor.compat import VllmConfig, wrap_once
from prunepath_vllm.model_executor.engine_config import PrunePathEngineConfig

_MARK = "_prunepath_server"


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
