"""What several modules take from inside vLLM beyond its documented interfaces, and how signatures are checked.

Read in vLLM 0.32.0. One place, so that an engine that has moved is noticed here, at start-up and by name, not as wrong
output later.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from prunepath_vllm.errors import EngineVersionError

try:
    import vllm
    from vllm.config import VllmConfig
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.exceptions import VLLMValidationError
    from vllm.model_executor.models.config import VerifyAndUpdateConfig
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import async_tensor_h2d
except ImportError as error:
    raise EngineVersionError(f"vLLM has moved what prunepath-vllm reaches for: {error}") from error

__all__ = [
    "VLLMValidationError",
    "VerifyAndUpdateConfig",
    "VllmConfig",
    "async_tensor_h2d",
    "create_error_response",
    "current_platform",
    "expect_parameters",
    "forward_hook",
    "wrap_once",
]


def moved(what: str) -> EngineVersionError:
    """The error for an internal of vLLM that is not where it was."""
    return EngineVersionError(f"vLLM {vllm.__version__} has no {what}; prunepath-vllm reaches for it as of 0.32.0")


def expect_parameters(function: Callable[..., Any], *names: str) -> None:
    """Refuse a function of vLLM that no longer takes these parameters, in this order.

    Raises:
        EngineVersionError: it does not.
    """
    found = list(inspect.signature(function).parameters)
    if found[: len(names)] != list(names):
        raise moved(f"{function.__qualname__}({', '.join(names)}, ...); it takes ({', '.join(found)})")


def wrap_once(
    owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]], mark: str = "_prunepath"
) -> None:
    """Replace ``owner.name`` by ``wrapper(original)``, the first time only.

    A second wrapper around the first has a `mark` of its own, and ``functools.wraps`` to keep the first one's.

    Raises:
        EngineVersionError: the attribute is gone.
    """
    original = getattr(owner, name, None)
    if original is None:
        raise moved(f"{getattr(owner, '__name__', owner)}.{name}")
    if getattr(original, mark, False):
        return
    replacement = wrapper(original)
    setattr(replacement, mark, True)
    setattr(owner, name, replacement)


def forward_hook(runner: Any, before_forward: Callable[[Tensor], None]) -> None:
    """Call `before_forward(positions)` in a V1 model runner, right before the model of every real step.

    Raises:
        EngineVersionError: the runner's forward, or what the hook will read, is gone.
    """
    forward = getattr(runner, "_model_forward", None)
    if forward is None:
        raise moved("GPUModelRunner._model_forward")
    expect_parameters(forward, "input_ids", "positions")
    for name in ("input_batch", "requests", "query_start_loc"):
        if not hasattr(runner, name):
            raise moved(f"GPUModelRunner.{name}")

    def hooked(input_ids: Tensor | None = None, positions: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        assert positions is not None
        before_forward(positions)
        return forward(input_ids, positions, *args, **kwargs)

    runner._model_forward = hooked
