"""``vllm run-batch``: it builds no app and so has no middleware; each line's body meets the same rules here.

A line is parsed twice, because vLLM's schemas turn booleans under ``vllm_xargs`` into numbers. A body that is refused
becomes an error in its line of the output file; the other lines are untouched.
"""

import functools
import json
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NoReturn

from prunepath_vllm.entrypoints.server.knob import (
    KNOBS,
    TauRequestError,
    check_options,
    refuse_misplaced,
    request_knob,
    settled_knob,
)
from prunepath_vllm.entrypoints.server.report import FIELD, Report, asks_for_report, report_to
from prunepath_vllm.errors import TauError
from prunepath_vllm.model_executor.compat import expect_module, wrap_once
from prunepath_vllm.model_executor.tau_resolution import TauResolver

RUNNER = "vllm.entrypoints.launchers.run_batch"

_LINE = "prunepath_line"
"""Attribute of vLLM's parsed line: the line as it was written."""

_serving: ContextVar[tuple[TauResolver, Any] | None] = ContextVar("prunepath_batch", default=None)
"""The resolver of the batch's engine, and vLLM's client of it; None where its model is not a PrunePath one."""


def install_in_batch_runner() -> None:
    """Hook ``run-batch``, where this process runs it: it imports its runner before it reads the model's configuration.

    Raises:
        EngineVersionError: the runner has moved inside.
    """
    main = sys.modules.get("__main__")
    launcher = main if getattr(getattr(main, "__spec__", None), "name", None) == RUNNER else sys.modules.get(RUNNER)
    if launcher is None:
        return
    expect_module(RUNNER, launcher)
    wrap_once(launcher, "run_batch", _with_resolver)
    wrap_once(launcher.BatchRequestInput, "model_validate_json", _with_written_body)
    wrap_once(launcher, "run_request", _with_knob)


def _with_resolver(run_batch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run_batch)
    async def wrapped(engine_client: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        if resolver := TauResolver.of(engine_client.vllm_config):
            check_options(args)
            _serving.set((resolver, engine_client))  # seen by the tasks of all lines
        return await run_batch(engine_client, args, *rest, **kwargs)

    return wrapped


def _with_written_body(model_validate_json: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(model_validate_json)
    def wrapped(json_data: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            line = json.loads(json_data)
        except (ValueError, RecursionError):
            line = None
        body = line.get("body") if isinstance(line, dict) else None
        if _serving.get() is None or not isinstance(body, dict):
            return model_validate_json(json_data, *args, **kwargs)
        if isinstance(xargs := body.get("vllm_xargs"), dict):
            # One value that the schema has no type for, such as a range, would end the whole batch.
            left = {name: value for name, value in xargs.items() if name not in KNOBS}
            json_data = json.dumps({**line, "body": {**body, "vllm_xargs": left}})
        request = model_validate_json(json_data, *args, **kwargs)
        setattr(request, _LINE, line)
        return request

    return wrapped


def _with_knob(run_request: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run_request)
    async def wrapped(serving_engine_func: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        serving, line = _serving.get(), getattr(request, _LINE, None)
        if serving is None or line is None:
            return await run_request(serving_engine_func, request, *args, **kwargs)
        resolver, engine = serving
        body = line["body"]
        try:
            _refuse_beside_body(line)
            knob, report = settled_knob(body, resolver, engine), Report() if asks_for_report(body) else None
        except TauError as error:
            return await run_request(functools.partial(_refuse, error), request, *args, **kwargs)
        with request_knob(knob), report_to(report):
            output = await run_request(serving_engine_func, request, *args, **kwargs)
        if report and output.response is not None and output.response.body is not None:
            setattr(output.response.body, FIELD, await report.complete(engine))
        return output

    return wrapped


def _refuse_beside_body(line: dict[str, Any]) -> None:
    """Refuse a knob that stands in a line, but not in its body: no endpoint sees it."""
    for name in KNOBS:
        if line.get(name) is not None:
            raise TauError(
                f"{name} beside the line's body is not read; expected {name!r} in it", parameter=name, value=line[name]
            )
    refuse_misplaced(line, "in the line's body")


async def _refuse(error: TauError, body: Any) -> NoReturn:
    """In the place of the endpoint's function: vLLM makes an error of the line's output of it."""
    raise TauRequestError(error)
