"""Arguments of the benchmarks of a layer; apart from those, so that help is told without torch."""

import argparse
import os
from collections.abc import Sequence

from prunepath_vllm.arguments import OneLineErrors, number, whole
from prunepath_vllm.benchmarks import options
from prunepath_vllm.benchmarks.published import SHAPES


def parse_kernel(argv: Sequence[str]) -> argparse.Namespace:
    """Those of ``prunepath bench kernel``."""
    parser = OneLineErrors(
        prog="prunepath bench kernel", description="The routed layer alone against the dense one, on a CUDA GPU."
    )
    parser.add_argument(
        "models", nargs="*", metavar="CKPT|SHAPE", help=f"checkpoints or {', '.join(SHAPES)} (default: qwen2-7b)"
    )
    parser.add_argument(
        "--tokens", type=options.numbers(int), default=[1, 2, 4, 8, 16, 64, 2048], metavar="LIST",
        help="batch sizes (default: 1,2,4,8,16,64,2048)",
    )  # fmt: skip
    parser.add_argument(
        "--share", type=options.shares, default=[1.0, 0.5, 0.2, 0.1, 0.05], metavar="LIST",
        help="active shares of experts (default: 1.0,0.5,0.2,0.1,0.05)",
    )  # fmt: skip
    parser.add_argument("--expert-size", type=whole(1), default=32, metavar="N", help="of a shape (default: 32)")
    options.add_expert_dtype(parser)
    parser.add_argument(
        "--layers", type=whole(1), default=8, metavar="N", help="with weights of their own (default: 8)"
    )
    options.add_output(parser)
    options.add_debug(parser)
    return parser.parse_args(argv)


def parse_tune(argv: Sequence[str]) -> argparse.Namespace:
    """Those of ``prunepath bench tune``."""
    parser = OneLineErrors(
        prog="prunepath bench tune", description="Make the table of tile choices and crossovers for this GPU."
    )
    parser.add_argument("models", nargs="+", metavar="CKPT|SHAPE", help=f"checkpoints or {', '.join(SHAPES)}")
    parser.add_argument(
        "--output", metavar="DIR",
        help="where <gpu>.json is made or added to; the engine looks into $PRUNEPATH_TUNING_DIR (default: that, or "
        "here)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=options.numbers(int), metavar="LIST", help="batch sizes")
    parser.add_argument("--expert-size", type=whole(1), default=32, metavar="N", help="of a shape (default: 32)")
    options.add_expert_dtype(parser)
    parser.add_argument(
        "--layers", type=whole(1), default=8, metavar="N", help="with weights of their own (default: 8)"
    )
    parser.add_argument(
        "--processes", type=whole(1), default=min(8, os.cpu_count() or 1), metavar="N", help="compilers"
    )
    parser.add_argument("--seconds", type=number(0), default=float("inf"), metavar="S", help="begin nothing after this")
    options.add_debug(parser)
    return parser.parse_args(argv)
