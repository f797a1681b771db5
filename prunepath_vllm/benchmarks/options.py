"""Arguments that several benchmarks share."""

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from prunepath_vllm.tau import parse_tau

Number = TypeVar("Number", int, float)


def numbers(kind: Callable[[str], Number]) -> Callable[[str], list[Number]]:
    """An argparse type: positive numbers separated by commas."""

    def parse(text: str) -> list[Number]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or not all(0 < value < float("inf") for value in values):
            raise argparse.ArgumentTypeError(f"expected positive numbers separated by commas, got {text!r}")
        return values

    return parse


def taus(text: str) -> list[float]:
    """An argparse type: taus separated by commas.

    Raises:
        TauError: one is out of range.
    """
    return [parse_tau(value) for value in numbers(float)(text)]


def shares(text: str) -> list[float]:
    """An argparse type: shares of active experts in (0, 1], separated by commas."""
    values = numbers(float)(text)
    if max(values) > 1:
        raise argparse.ArgumentTypeError(f"expected shares in (0, 1] separated by commas, got {text!r}")
    return values


def add_output(parser: Any) -> None:
    """--output, --plot."""
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the speed-up against the active share")
