"""``prunepath check``: versions, engine, GPU and kernels; what works here and what does not, for a bug report too.

What is installed is read without importing any of it, in well under a second; ``--try`` starts what serving needs.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib import resources
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path

from prunepath_vllm import plugin
from prunepath_vllm.engine_environment import require_engine
from prunepath_vllm.engine_version import expect_tested
from prunepath_vllm.errors import PrunePathError
from prunepath_vllm.families import FAMILIES
from prunepath_vllm.version import __version__

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "pydantic", "numpy")
_REQUIRED = ("torch", "transformers", "safetensors", "pydantic", "numpy")
"""Without one of them nothing but this command, --version and --help works."""
_SETTINGS = ("VLLM_", "PRUNEPATH_", "CUDA_VISIBLE", "TRITON_", "TORCH_", "OMP_NUM_THREADS", "PROMETHEUS_MULTIPROC")
"""Beginnings of the names of environment variables that change what the engine does."""
_DRIVER, _PCI = Path("/proc/driver/nvidia/gpus"), Path("/sys/bus/pci/devices")
_OF_LINK = 0.86
"""Share of a PCIe link's bits that was read as data: 55 GB/s of generation 5's 64 over 16 lanes."""
_ABSENT = "not installed"
_NOT_INSTALLED = "not installed as a package: vLLM cannot find the plugin"
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "URL", "HOST")
"""A variable with one of these in its name is reported as set; its value is nobody's business."""


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "check", parents=parents, help="what works on this machine and what does not; paste it into a bug report"
    )
    parser.add_argument("--try", dest="tried", action="store_true", help="import the engine, too: half a minute")
    parser.add_argument("--json", action="store_true", help="the same facts as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print one line per fact, those that take an import last; exit 1 where serving cannot work."""
    facts: dict[str, str] = {}

    def tell(name: str, value: str) -> None:
        facts[name] = value
        if not args.json:
            print(f"{name:<16}{value}", flush=True)

    tell("prunepath-vllm", f"{__version__}, {_installation()}")
    tell("python", platform.python_version())
    for name in _PACKAGES:
        tell(name, _version(name))
    tell("system", _system())
    tell("environment", _environment())
    missing = [name for name in _REQUIRED if facts[name] == _ABSENT]
    if args.tried:
        tell("device", _tried(_device, missing))
        tell("kernels", _tried(_kernels, missing))
        engine, serves = _engine(missing)
    else:
        gpus = _gpus()
        tell("device", ", ".join(gpus) or f"CPU only, {len(os.sched_getaffinity(0))} cores")
        if gpus:
            tell("host experts", _host_links())
        tell("kernels", _triton_table(gpus[0]) if gpus else _native_kernel())
        engine, serves = _installed_engine(missing)
    tell("engine", engine)
    if serves:
        tell("architectures", ", ".join(family.name for family in FAMILIES))
    if args.json:
        print(json.dumps({**facts, "serving": serves}, indent=2))
    else:
        works = "works here" if args.tried else "all that it needs is installed; `prunepath check --try` starts it"
        print(f"\nserving: {works if serves else 'does not work here'}")
    return 0 if serves else 1


def _tried(tell: Callable[[], str], missing: Sequence[str]) -> str:
    """What `tell` says, or why it cannot: a broken installation is what this command is there to report."""
    if missing:
        return f"unknown: {', '.join(missing)} not installed"
    try:
        return tell()
    except Exception as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    known = isinstance(error, PrunePathError)
    return ("" if known else f"{type(error).__name__}: ") + " ".join(str(error).split())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _ABSENT


def _installation() -> str:
    try:
        origin = json.loads(distribution("prunepath-vllm").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return _NOT_INSTALLED
    return "editable" if origin.get("dir_info", {}).get("editable") else "installed"


def _system() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs, {memory:.0f} GiB"


def _environment() -> str:
    shown = {
        name: "(set)" if any(word in name for word in _SECRET) else value
        for name, value in sorted(os.environ.items())
        if name.startswith(_SETTINGS)
    }
    return " ".join(f"{name}={value}" for name, value in shown.items()) or "nothing that concerns the engine"


def _gpu_files() -> list[Path]:
    """What the driver tells of each GPU, in a folder named by its place on the bus."""
    return sorted(_DRIVER.glob("*/information"))


def _gpus() -> list[str]:
    """Names of NVIDIA GPUs, as their driver tells them in /proc."""
    models = [line for file in _gpu_files() for line in file.read_text().splitlines() if line.startswith("Model:")]
    return [line.removeprefix("Model:").strip() for line in models]


def _host_links() -> str:
    """What experts in host memory need, and how fast each GPU can read them by the most that its PCIe link does."""
    if (found := _version("cuda-bindings")) == _ABSENT:
        return "not here: cuda-bindings is not installed"
    links = []
    for file in _gpu_files():
        device = _PCI / file.parent.name.lower()
        try:
            speed = (device / "max_link_speed").read_text().split()[0]
            width = int((device / "max_link_width").read_text())
            links.append(f"PCIe {speed} GT/s x{width}, about {float(speed) * width / 8 * _OF_LINK:.0f} GB/s")
        except (OSError, ValueError, IndexError):
            links.append("PCIe unknown")
    return f"{', '.join(links)} (cuda-bindings {found})"


def _installed_engine(missing: Sequence[str]) -> tuple[str, bool]:
    """What engine is installed, and whether this package would serve with it, by what is on disk."""
    if missing:
        return f"{', '.join(missing)} not installed: neither conversion nor serving works", False
    if find_spec("vllm") is None:
        return "vLLM is not installed: conversion, training and transformers work, serving does not", False
    try:
        require_engine()
        found = version("vllm")
        expect_tested(found)
    except Exception as error:
        return _reason(error), False
    return f"vLLM {found}, finds the plugin", True


def _engine(missing: Sequence[str]) -> tuple[str, bool]:
    """What the engine is, and whether all that ``prunepath serve`` needs of it is there: tried, not looked up."""
    told, installed = _installed_engine(missing)
    if not installed:
        return told, False
    try:
        import vllm
        from vllm.platforms import current_platform

        plugin.register()
        from vllm import ModelRegistry
        from vllm.entrypoints.cli import serve  # noqa: F401

        version("vllm")
        known = ModelRegistry.get_supported_archs()
    except Exception as error:
        return _reason(error), False
    if unknown := [family.architecture for family in FAMILIES if family.architecture not in known]:
        return f"vLLM {vllm.__version__} does not know {', '.join(unknown)} after the plugin was registered", False
    device = current_platform.device_type
    if device not in ("cpu", "cuda"):
        return f"vLLM {vllm.__version__} on {device or 'no device'}; expected cpu or cuda", False
    return f"vLLM {vllm.__version__} on {device}, plugin registered", True


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU only, {torch.get_num_threads()} threads"
    gpus: dict[str, int] = {}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        name = f"{torch.cuda.get_device_name(index)} (sm_{major}{minor}, {memory:.0f} GiB)"
        gpus[name] = gpus.get(name, 0) + 1
    names = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in gpus.items())
    return f"{names}, CUDA {torch.version.cuda}"


def _kernels() -> str:
    import torch

    if not torch.cuda.is_available():
        from prunepath_vllm.kernels import native

        return f"native ({', '.join(native.isas())})" if native.isas() else _native_kernel()
    return _triton_table(torch.cuda.get_device_name())


def _native_kernel() -> str:
    """Whether the CPU's kernel was built at installation."""
    if (resources.files("prunepath_vllm") / "kernels" / "native" / "libprunepath_cpu.so").is_file():
        return "native"
    return "PyTorch: the native kernel was not built, expect no speed-up (a C++ compiler, then install again)"


def _triton_table(gpu: str) -> str:
    """What the Triton kernels know of a GPU."""
    if find_spec("triton") is None:
        return "PyTorch: Triton is not installed, expect no speed-up"
    table = resources.files("prunepath_vllm") / "kernels" / "configs" / f"{gpu.lower().replace(' ', '_')}.json"
    if not table.is_file():
        return "Triton, no table shipped for this GPU (see `prunepath bench tune`)"
    return f"Triton, tuned for {', '.join(json.loads(table.read_text()))}"
