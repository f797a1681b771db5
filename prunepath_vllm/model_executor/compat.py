"""What several modules take from inside vLLM beyond its documented interfaces, and how the checklist of all that is
taken (reaches.py) is compared with the running engine.

At start-up and by name, so that an engine that has moved is not noticed by wrong output later.
"""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from prunepath_vllm.errors import EngineVersionError
from prunepath_vllm.model_executor.reaches import REACHES, Reach

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
    "expect_loaded",
    "expect_module",
    "forward_hook",
    "wrap_once",
]


def moved(what: str) -> EngineVersionError:
    """The error for an internal of vLLM that is not where it was."""
    return EngineVersionError(
        f"vLLM {vllm.__version__} has no {what}; prunepath-vllm reaches for it in tested releases"
    )


_checked: set[str] = set()


def expect_loaded() -> None:
    """Compare the checklist with every module of vLLM that this process has loaded, each once.

    Raises:
        EngineVersionError: see :func:`expect_module`.
    """
    for name in {reach.module for reach in REACHES} - _checked:
        if module := sys.modules.get(name):
            expect_module(name, module)
            _checked.add(name)


def expect_module(name: str, module: ModuleType) -> None:
    """Compare the checklist's rows of one module with it.

    Args:
        name: as it is in the list.
        module: the same, loaded; perhaps as ``__main__``.

    Raises:
        EngineVersionError: a row does not hold; names the first.
    """
    for reach in REACHES:
        if reach.module == name:
            _expect(reach, module)


def _expect(reach: Reach, module: ModuleType) -> None:
    what = f"{reach.module}.{reach.name}"
    found: Any = module
    for part in reach.name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise moved(what)
    if reach.parameters or reach.keywords:
        parameters = inspect.signature(found).parameters
        first = tuple(parameters)[: len(reach.parameters)]
        if first != reach.parameters:
            raise moved(f"{what}({', '.join(reach.parameters)}, ...); it takes ({', '.join(parameters)})")
        any_name = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        if not any_name and (missing := set(reach.keywords) - set(parameters)):
            raise moved(f"{what}(..., {min(missing)}=); it takes ({', '.join(parameters)})")
    # What other classes have, their __init__ sets: looked up on an instance, or in the source by the tests.
    if fields := getattr(found, "__dataclass_fields__", getattr(found, "__struct_fields__", None)):
        later = getattr(getattr(found, "__post_init__", None), "__code__", None)
        known = {*fields, *dir(found), *(later.co_names if later else ())}
        if missing := set(reach.attributes) - known:
            raise moved(f"{what}.{min(missing)}")


def wrap_once(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.name`` by ``wrapper(original)``, the first time only.

    Raises:
        EngineVersionError: the attribute is gone.
    """
    original = getattr(owner, name, None)
    if original is None:
        raise moved(f"{getattr(owner, '__name__', owner)}.{name}")
    if hasattr(original, "_prunepath"):
        return
    replacement: Any = wrapper(original)
    replacement._prunepath = True
    setattr(owner, name, replacement)


def forward_hook(runner: Any, before_forward: Callable[[Tensor], None]) -> None:
    """Call `before_forward(positions)` in a V1 model runner, right before the model of every real step.

    Raises:
        EngineVersionError: the runner's forward, or what the hook will read, is gone.
    """
    row = next(reach for reach in REACHES if reach.name == "GPUModelRunner")
    if missing := [name for name in row.attributes if not hasattr(runner, name)]:
        raise moved(f"{row.module}.{row.name}.{missing[0]}")
    forward = runner._model_forward

    def hooked(input_ids: Tensor | None = None, positions: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        assert positions is not None
        before_forward(positions)
        return forward(input_ids, positions, *args, **kwargs)

    runner._model_forward = hooked
