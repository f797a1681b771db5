"""``prunepath check``: versions, engine, GPU and kernels; what works here and what does not."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from prunepath_vllm import __version__
from prunepath_vllm.errors import PrunePathError
from prunepath_vllm.families import FAMILIES

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "pydantic")


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    return subparsers.add_parser("check", parents=parents, help="what works on this machine and what does not")


def run(args: argparse.Namespace) -> int:
    """Print one line per fact; exit 1 where serving cannot work."""
    facts = [("prunepath-vllm", __version__), ("python", platform.python_version())]
    facts += [(name, _version(name)) for name in _PACKAGES]
    engine, serves = _engine()
    facts += [("engine", engine), ("device", _device()), ("kernels", _kernels())]
    if serves:
        facts.append(("architectures", _architectures()))
    for name, value in facts:
        print(f"{name:<16}{value}")
    print(f"\nserving: {'works here' if serves else 'does not work here'}")
    return 0 if serves else 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _engine() -> tuple[str, bool]:
    from prunepath_vllm import plugin

    if find_spec("vllm") is None:
        return "vLLM is not installed: conversion, training and transformers work, serving does not", False
    import vllm

    try:
        plugin.register()
    except PrunePathError as error:
        return str(error), False
    from vllm.platforms import current_platform

    return f"vLLM {vllm.__version__} on {current_platform.device_type}, plugin registered", True


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU only, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {memory:.0f} GiB), CUDA {torch.version.cuda}"


def _kernels() -> str:
    import torch

    if not torch.cuda.is_available():
        return "PyTorch on the CPU (the Triton kernels need a CUDA GPU)"
    return "Triton" if find_spec("triton") is not None else "PyTorch: Triton is not installed, expect no speed-up"


def _architectures() -> str:
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    missing = [family.architecture for family in FAMILIES if family.architecture not in known]
    return f"missing {', '.join(missing)}" if missing else ", ".join(family.name for family in FAMILIES)
