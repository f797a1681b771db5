"""What command lines check before any work is done: numbers, output paths, packages. Imports nothing heavy."""

import argparse
import math
import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from prunepath_vllm.errors import UsageError

MAX_WHOLE = 2**31 - 1
MAX_SEED = 2**32 - 1
"""What every random generator in use takes: NumPy's ends here, PyTorch's goes further."""


class OneLineErrors(argparse.ArgumentParser):
    """A parser that refuses in one line; argparse would print the usage first, of 250 lines for the engine's flags."""

    def error(self, message: str) -> NoReturn:
        """Print the message, and exit with code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def whole(least: int, most: int = MAX_WHOLE) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {_cut(text)}")
        return value

    return parse


seed = whole(0, MAX_SEED)
"""An argparse type: the seed of a random generator."""


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most):
            upper = "" if math.isinf(most) else f" to {most:g}"
            raise argparse.ArgumentTypeError(f"expected a finite number from {least:g}{upper}, got {_cut(text)}")
        return value

    return parse


def _cut(text: str) -> str:
    return repr(text) if len(text) <= 40 else f"{text[:37]!r}..."


def check_output_file(path: str | os.PathLike[str] | None, name: str) -> None:
    """Refuse a file that could not be written, before there is anything to write. None is no file.

    Args:
        path: the file; replaced where it is there.
        name: of the option.

    Raises:
        UsageError: a directory, a folder that is missing, or no permission to write.
    """
    if path is None:
        return
    file = Path(path)
    if file.is_dir():
        raise UsageError(f"{name} {path}: is a directory; expected a file")
    if not file.parent.is_dir():
        raise UsageError(f"{name} {path}: no such folder; expected a file in an existing one")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"{name} {path}: no permission to write; expected a file that can be written")


def check_output_folder(path: str | os.PathLike[str], name: str) -> None:
    """Refuse a folder that could neither be written into nor be made, parents included.

    Args:
        path: the folder, there or not.
        name: of the option.

    Raises:
        UsageError: it, or what should hold it, is a file, or there is no permission to write.
    """
    nearest = Path(path).absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UsageError(f"{name} {path}: {nearest} is not a directory; expected a folder, or room to make one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{name} {path}: no permission to write in {nearest}; expected a folder that can be written")


_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def may_be_hub_name(name: str) -> bool:
    """Whether Hugging Face could have a model of that name: "owner/name", or "name" alone."""
    return _HUB_NAME.fullmatch(name) is not None


def check_hub_name(name: str) -> None:
    """Refuse a model that is no directory and not :func:`may_be_hub_name` either.

    Raises:
        UsageError: names it.
    """
    if not may_be_hub_name(name):
        raise UsageError(f"{name}: no such directory, nor a Hugging Face model name (owner/name)")


def check_new_directory(path: str | os.PathLike[str], name: str) -> None:
    """Refuse a directory that is there already or could not be made.

    Args:
        path: the directory.
        name: of the argument.

    Raises:
        UsageError: says which.
    """
    if os.path.lexists(path):
        raise UsageError(f"{name} {path}: already there; expected a new directory")
    check_output_folder(path, name)


def check_plot(path: str | os.PathLike[str] | None, name: str = "--plot") -> None:
    """Refuse a figure that could not be drawn or written, before there is anything to draw. None is no figure.

    Args:
        path: the file; its suffix chooses the format.
        name: of the option.

    Raises:
        UsageError: matplotlib is missing or does not write that format, or see :func:`check_output_file`.
    """
    if path is None:
        return
    require_package("matplotlib", "eval", name)
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in formats:
        raise UsageError(f"{name} {path}: expected a file name that ends in one of {', '.join(sorted(formats))}")
    check_output_file(path, name)


def require_package(module: str, extra: str, needed_by: str) -> None:
    """Refuse what an optional package is needed for and is not there.

    Args:
        module: its import name.
        extra: of this package, that brings it.
        needed_by: the option, or what was asked for.

    Raises:
        UsageError: names all three.
    """
    if find_spec(module) is None:
        raise UsageError(f"{needed_by}: needs {module}, which is not installed; expected prunepath-vllm[{extra}]")
