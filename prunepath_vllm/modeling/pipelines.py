"""``tau`` in the pipelines of transformers that would ignore it.

Text generation hands what it does not know to ``generate``, and so needs nothing. Text classification hands it to the
tokenizer, which drops it; others drop it themselves.
"""

import functools
from collections.abc import Callable
from typing import Any

from transformers import (
    FeatureExtractionPipeline,
    Pipeline,
    TextClassificationPipeline,
    ZeroShotClassificationPipeline,
)

from prunepath_vllm.errors import UnsupportedFeatureError
from prunepath_vllm.modeling.modeling_utils import RoutedModel
from prunepath_vllm.modeling.routing import refuse_other_names
from prunepath_vllm.tau import parse_tau

_WITHOUT_TAU = (FeatureExtractionPipeline, ZeroShotClassificationPipeline)


def teach_pipelines() -> None:
    """Let text classification take ``tau``, when it is built and when it is called; refuse it where it has no way.

    Pipelines of models that are not PrunePath's stay as they are. Idempotent.
    """
    _wrap(TextClassificationPipeline, "_sanitize_parameters", _takes_tau)
    _wrap(TextClassificationPipeline, "_forward", _forwards_tau)
    for pipeline in _WITHOUT_TAU:
        _wrap(pipeline, "_sanitize_parameters", _refuses_tau)


def _wrap(owner: type[Pipeline], name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "_prunepath"):
        replacement = functools.wraps(original)(wrapper(original))
        replacement._prunepath = True  # type: ignore[attr-defined]
        setattr(owner, name, replacement)


def _takes_tau(sanitize: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Pipeline, **kwargs: Any) -> Any:
        if not isinstance(self.model, RoutedModel):
            return sanitize(self, **kwargs)
        refuse_other_names(kwargs.keys() - {"tau"})
        if kwargs.get("tau") is None:
            return sanitize(self, **kwargs)
        tau = parse_tau(kwargs.pop("tau"))
        preprocess, forward, postprocess = sanitize(self, **kwargs)
        return preprocess, {**forward, "tau": tau}, postprocess

    return wrapped


def _forwards_tau(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Pipeline, model_inputs: Any, **kwargs: Any) -> Any:
        return forward(self, {**model_inputs, **kwargs})  # which it gives to the model as they are

    return wrapped


def _refuses_tau(sanitize: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Pipeline, **kwargs: Any) -> Any:
        if isinstance(self.model, RoutedModel) and kwargs.get("tau") is not None:
            raise UnsupportedFeatureError(
                f"{type(self).__name__} does not take tau, got {kwargs['tau']!r}; expected it left out (the "
                "checkpoint's default_tau holds), or tau given to the model's own forward"
            )
        return sanitize(self, **kwargs)

    return wrapped
