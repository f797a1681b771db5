"""``prunepath bench kernel|latency|serve|tune``: speed, dense beside sparse."""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from prunepath_vllm.arguments import OneLineErrors
from prunepath_vllm.engine_environment import require_engine

BENCHMARKS = {
    "kernel": "the routed layer alone, on a CUDA GPU",
    "latency": "the engine's latency benchmark; takes any `vllm bench latency` flag",
    "serve": "the engine's own benchmark of a server; takes any `vllm bench serve` flag",
    "tune": "make the table of kernel choices for this GPU and a shape",
}
"""Modules of ``prunepath_vllm.benchmarks``. Those of the engine parse their own arguments, its flags among them."""


class _Raw(OneLineErrors):
    """Keeps the arguments as they are in ``argv``, --help included; reads --debug."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        argv = list(args or ())
        return argparse.Namespace(argv=argv, debug="--debug" in argv), []


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser("bench", help="speed, dense beside sparse, in one run")
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="|".join(BENCHMARKS), required=True, parser_class=_Raw)
    for name, line in BENCHMARKS.items():
        benchmarks.add_parser(name, help=line, add_help=False)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run one benchmark."""
    from prunepath_vllm.benchmarks.layer_options import parse_kernel, parse_tune

    parse = {"kernel": parse_kernel, "tune": parse_tune}.get(args.benchmark)
    if parse is None:
        require_engine()
    given = args.argv if parse is None else parse(args.argv)
    return importlib.import_module(f"prunepath_vllm.benchmarks.{args.benchmark}").run(given)
