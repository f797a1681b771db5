"""Where the HTTP front end enters vLLM: the functions that are wrapped, the callbacks, and when."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from starlette.middleware import Middleware

from prunepath_vllm.model_executor.compat import VllmConfig, expect_loaded, wrap_once
from prunepath_vllm.model_executor.engine_config import PrunePathEngineConfig

API_SERVER = "vllm.entrypoints.launchers.app"


class ServedEngineConfig(PrunePathEngineConfig):
    """The engine's configuration hook, with the knob over HTTP and the operator's metrics, reports and routes."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """See the base class; raises what it raises."""
        PrunePathEngineConfig.verify_and_update_config(vllm_config)

        # Not at the top: the plugin loads this module in every process, the front end has its own.
        from prunepath_vllm.entrypoints.server.batch import install_in_batch_runner
        from prunepath_vllm.entrypoints.server.metrics import count_request
        from prunepath_vllm.entrypoints.server.report import fill_report
        from prunepath_vllm.model_executor.admission import observe_admissions

        expect_loaded()
        observe_admissions(count_request)
        observe_admissions(fill_report)
        install_in_batch_runner()
        # The API server imports its launcher before it reads any model's configuration; elsewhere there is no HTTP.
        if app := sys.modules.get(API_SERVER):
            wrap_once(app, "init_entrypoints_middleware", _with_middleware)


def _with_middleware(init_entrypoints_middleware: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init_entrypoints_middleware)
    def wrapped(args: Any, app: Any, *rest: Any, **kwargs: Any) -> None:
        from prunepath_vllm.entrypoints.server.knob import KnobMiddleware, check_options
        from prunepath_vllm.entrypoints.server.metrics import MetricsMiddleware
        from prunepath_vllm.entrypoints.server.render import RenderMiddleware
        from prunepath_vllm.entrypoints.server.report import ReportMiddleware
        from prunepath_vllm.entrypoints.server.routes import router

        check_options(args)
        init_entrypoints_middleware(args, app, *rest, **kwargs)
        app.include_router(router)
        # Innermost: authentication and request identifiers come first.
        ours = (KnobMiddleware, RenderMiddleware, ReportMiddleware, MetricsMiddleware)
        app.user_middleware += [Middleware(one) for one in ours]

    return wrapped
