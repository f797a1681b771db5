"""Arguments that several benchmarks share. Imports nothing heavy, so that help is told at once."""

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from prunepath_vllm.arguments import MAX_WHOLE, may_be_hub_name
from prunepath_vllm.errors import TauError, UsageError
from prunepath_vllm.tau import parse_tau_list

if TYPE_CHECKING:
    from prunepath_vllm.checkpoint import CheckpointSummary

Number = TypeVar("Number", int, float)


def numbers(kind: Callable[[str], Number]) -> Callable[[str], list[Number]]:
    """An argparse type: positive numbers separated by commas."""

    def parse(text: str) -> list[Number]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or not all(0 < value <= MAX_WHOLE for value in values):
            raise argparse.ArgumentTypeError(
                f"expected positive numbers separated by commas, each at most {MAX_WHOLE}, got {text!r}"
            )
        return values

    return parse


def taus(text: str) -> list[float]:
    """An argparse type: taus separated by commas."""
    try:
        return parse_tau_list(text)
    except TauError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def shares(text: str) -> list[float]:
    """An argparse type: shares of active experts in (0, 1], separated by commas."""
    values = numbers(float)(text)
    if max(values) > 1:
        raise argparse.ArgumentTypeError(f"expected shares in (0, 1] separated by commas, got {text!r}")
    return values


def causal_checkpoint(path: str) -> "CheckpointSummary":
    """A valid checkpoint that generates text.

    Raises:
        UsageError: its family does not.
    """
    from prunepath_vllm.checkpoint import validate_checkpoint

    found = validate_checkpoint(path)
    if found.family.auto_class != "AutoModelForCausalLM":
        raise UsageError(f"{path}: expected a causal language model, got {found.family.architecture}")
    return found


def check_dense(path: str) -> None:
    """Refuse a dense model that is no model's directory; what may be a Hugging Face name, the engine looks for.

    Raises:
        UsageError: no such directory.
        CheckpointError: none of a model.
    """
    from prunepath_vllm.checkpoint import read_config

    if os.path.exists(path) or not may_be_hub_name(path):
        read_config(path)


def add_output(parser: Any) -> None:
    """--output, --plot."""
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the speed-up against the active share")


def add_expert_dtype(parser: Any) -> None:
    """--expert-dtype, of weights drawn at random."""
    parser.add_argument(
        "--expert-dtype", choices=("float8_e4m3fn", "int8"),
        help="quantise the random weights (default: as a checkpoint has them, a shape's are bfloat16)",
    )  # fmt: skip


def add_debug(parser: Any) -> None:
    """--debug, which every command takes; the command line reads it."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
