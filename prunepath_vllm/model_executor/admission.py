"""Admission: a request's tau is validated before the engine takes the request, so that a bad one is an HTTP 400.

vLLM's ``InputProcessor`` makes every request, online or offline, sampling or pooling, the engine's own. Offline, tau
rides on the parameter objects; a server (entrypoints/server/knob.py) says what a request's body asked for by
:func:`request_knob`. What keeps taus apart is in the engine core (engine_core.py), which sees every request, whatever
brought it.
"""

import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.engine.input_processor import InputProcessor

from prunepath_vllm.errors import TauError
from prunepath_vllm.model_executor.adapters import refuse_adapter
from prunepath_vllm.model_executor.compat import VLLMValidationError, expect_loaded, wrap_once
from prunepath_vllm.model_executor.counts import REPORT_KEY
from prunepath_vllm.model_executor.engine_core import extra_arguments, refuse_sessions, set_extra_arguments
from prunepath_vllm.model_executor.operator_policy import OPERATORS_TAUS
from prunepath_vllm.model_executor.tau_resolution import TauResolver
from prunepath_vllm.tau import PARAMETERS, shown

KNOBS = (*PARAMETERS, REPORT_KEY)
"""What a request may ask of this package."""

_request_knob: ContextVar[dict[str, Any] | None] = ContextVar("prunepath_request_knob", default=None)
"""``tau`` / ``sparsity`` of the body being handled; inherited by the tasks that stream its answer."""

Observer = Callable[[TauResolver, float, dict[str, Any]], None]
"""Called with every admitted request: its engine's resolver, the request's tau, and the engine's own copy of its extra
arguments, which may be added to."""

_observers: list[Observer] = []
_adapters: set[tuple[int, str]] = set()
"""Those of requests that have been checked: number and path."""
_resolvers: WeakKeyDictionary[InputProcessor, TauResolver | None] = WeakKeyDictionary()


class TauRequestError(VLLMValidationError, ValueError):
    """A request's tau or sparsity cannot be honoured: HTTP 400, and a ValueError offline."""

    def __init__(self, error: TauError) -> None:
        # Not its value: vLLM would repeat it whole, however long, and the message names it.
        VLLMValidationError.__init__(self, str(error), parameter=error.parameter)


def install_in_input_processor() -> None:
    """Hook admission in this process. Idempotent; models other than PrunePath's pass untouched.

    Raises:
        EngineVersionError: vLLM's front end has moved.
    """
    expect_loaded()
    wrap_once(InputProcessor, "process_inputs", _with_tau)


def observe_admissions(observer: Observer) -> None:
    """Call `observer` with every request admitted in this process. Idempotent."""
    if observer not in _observers:
        _observers.append(observer)


@contextmanager
def request_knob(knob: dict[str, Any]) -> Iterator[None]:
    """What is admitted within, here and in tasks begun here, has this ``tau`` or ``sparsity``."""
    token = _request_knob.set(knob)
    try:
        yield
    finally:
        _request_knob.reset(token)


def _check_adapter(lora_request: Any, config: Any) -> None:
    """Refuse an adapter before the engine loads it for a step, which would end the engine; once each.

    One that is not there, or not on this machine, is left to the engine.
    """
    if lora_request is None:
        return
    key = (lora_request.lora_int_id, lora_request.lora_path)
    if key not in _adapters and os.path.isdir(lora_request.lora_path):
        refuse_adapter(lora_request.lora_path, config)
        _adapters.add(key)


def refuse_misnamed(given: Mapping[str, Any]) -> None:
    """Refuse a request's field that is called almost as one of KNOBS, or as one that is the operator's.

    Args:
        given: the fields of one place where a request's parameters are read; others are the user's.

    Raises:
        TauError: names the field.
    """
    for name, value in given.items():
        if value is None or name in KNOBS:
            continue
        plain = str(name).strip().lower().replace("-", "_").strip("_")
        if plain in KNOBS:
            raise TauError(f"{shown(name)} is not read; expected {plain!r}", parameter=name, value=value)
        if plain in OPERATORS_TAUS:
            raise TauError(
                f"{name} is not read in a request: it is the operator's, in --additional-config; expected 'tau' or "
                "'sparsity'",
                parameter=name,
                value=value,
            )


_NESTED = 4
"""Levels at which a knob in the wrong place is looked for: client options within client options."""


def refuse_misplaced(
    given: Mapping[str, Any], right: str, *, read: Sequence[Mapping[str, Any]] = (), also: Collection[str] = ()
) -> None:
    """Refuse a request's knob within options that are called like a place where it is read: nobody looks into them.

    Args:
        given: the options; of others, what is in them is the user's.
        right: the right place, in words.
        read: mappings within `given` in which a knob is read.
        also: further names of options that are looked into.

    Raises:
        TauError: names the field and its path.
    """
    for name, value in given.items():
        if str(name).startswith(("extra_", "vllm_")) or name in also:
            _refuse_knobs_in(value, str(name), right, read, _NESTED)


def _refuse_knobs_in(value: Any, path: str, right: str, read: Sequence[Mapping[str, Any]], levels: int) -> None:
    if not isinstance(value, Mapping) or not levels:
        return
    is_read = any(value is place for place in read)
    for name, inner in value.items():
        if name in KNOBS and inner is not None and not is_read:
            raise TauError(f"{path}.{name} is not read; expected {name!r} {right}", parameter=name, value=inner)
        _refuse_knobs_in(inner, f"{path}.{name}", right, read, levels - 1)


def _with_tau(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(process_inputs)
    def wrapped(self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if self not in _resolvers:
            _resolvers[self] = TauResolver.of(self.vllm_config)
        resolver = _resolvers[self]
        if resolver is None:
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        # The body's own values win over the copies that the engine's schema has coerced.
        requested = {**extra_arguments(params), **(_request_knob.get() or {})}
        try:
            refuse_misnamed(requested)
            refuse_misplaced(requested, "among the extra arguments themselves")
            tau = resolver.tau_of(requested)
        except TauError as error:
            raise TauRequestError(error) from None
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        refuse_sessions(request)
        _check_adapter(request.lora_request, self.vllm_config.model_config.hf_config)
        # The engine's copy is written, never the caller's parameters.
        extra = {name: value for name, value in requested.items() if name not in PARAMETERS}
        extra["tau"] = tau
        for observer in _observers:
            observer(resolver, tau, extra)
        report = extra.get(REPORT_KEY, False)
        if report not in (None, False) and not isinstance(report, str):  # the server's observer has put a name there
            raise TauRequestError(
                TauError(
                    f"{REPORT_KEY} must be a name, under which workers count the request, got {report!r}; true is for "
                    "requests to a server",
                    parameter=REPORT_KEY,
                    value=report,
                )
            )
        for name in ("sampling_params", "pooling_params"):
            if (engine_params := getattr(request, name)) is not None:
                engine_params = engine_params.clone() if engine_params is params else engine_params
                set_extra_arguments(engine_params, extra)
                setattr(request, name, engine_params)
        return request

    return wrapped
