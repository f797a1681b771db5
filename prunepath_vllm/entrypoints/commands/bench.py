"""``prunepath bench kernel|latency|serve|tune``: speed, dense beside sparse."""

import argparse
from collections.abc import Sequence
from typing import Any

from prunepath_vllm.entrypoints.engine_defaults import require_engine


class _EngineFlags(argparse.ArgumentParser):
    """Leaves the arguments to a parser that knows the engine's flags, which is slow to import."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        argv = list(args or ())
        namespace, _ = super().parse_known_args([flag for flag in argv if flag == "--debug"], namespace)
        namespace.argv = [flag for flag in argv if flag != "--debug"]
        return namespace, []


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser("bench", help="speed, dense beside sparse, in one run")
    benchmarks = parser.add_subparsers(
        dest="benchmark", metavar="kernel|latency|serve|tune", required=True, parser_class=_EngineFlags
    )
    benchmarks.add_parser("latency", parents=parents, help="the engine's own latency benchmark").set_defaults(
        benchmark_run=_latency
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run one benchmark."""
    return args.benchmark_run(args)


def _latency(args: argparse.Namespace) -> int:
    require_engine()
    from prunepath_vllm.benchmarks import latency

    return latency.run(args.argv)
