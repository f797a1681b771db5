"""``vllm bench serve`` against servers of a checkpoint and of its dense model, tau by tau.

Requests, load and figures are vLLM's own; tau travels in the requests' ``--extra-body``. The servers are started one
after the other, or ``--base-url`` names one that runs.
"""

import argparse
import copy
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from vllm.benchmarks import serve as vllm_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from prunepath_vllm.arguments import OneLineErrors, check_output_file
from prunepath_vllm.benchmarks import options, report, server
from prunepath_vllm.benchmarks.report import BenchmarkError
from prunepath_vllm.benchmarks.shapes import share_on_curve
from prunepath_vllm.errors import UsageError
from prunepath_vllm.tau import shown

METRICS = {
    "request_throughput": "requests/s",
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "TTFT median, ms",
    "p99_ttft_ms": "TTFT p99, ms",
    "median_tpot_ms": "TPOT median, ms",
    "p99_tpot_ms": "TPOT p99, ms",
    "median_itl_ms": "ITL median, ms",
    "p99_itl_ms": "ITL p99, ms",
}
"""The table's lines: vLLM's names of them, and ours."""

HIGHER_IS_BETTER = ("request_throughput", "output_throughput")


class _Parser(OneLineErrors, FlexibleArgumentParser):
    """The engine's parser, whose flags it adds; underscores do for dashes."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Our arguments and every flag of ``vllm bench serve``, under vLLM's names.

    Raises:
        UsageError: arguments that make no sense together.
    """
    parser = _Parser(
        prog="prunepath bench serve",
        conflict_handler="resolve",
        description="The engine's own benchmark of a server, dense and at several taus in one run.",
    )
    vllm_serve.add_cli_args(parser)
    parser.set_defaults(num_warmups=4)  # a server that has just started is slow at first
    parser.add_argument("checkpoint", metavar="CKPT", help="PrunePath checkpoint directory")
    parser.add_argument("--tau", type=options.taus, default=[1.0, 0.8, 0.5], metavar="LIST", help="(1.0,0.8,0.5)")
    parser.add_argument("--dense", metavar="DIR", help="the dense model, served and measured first")
    parser.add_argument("--base-url", metavar="URL", help="a server of CKPT that runs already")
    parser.add_argument("--dense-url", metavar="URL", help="a server of the --dense model that runs already")
    parser.add_argument(
        "--server-args", type=shlex.split, default=[], metavar="FLAGS",
        help='`vllm serve` flags of the servers started here, as in "--max-model-len 2048"',
    )  # fmt: skip
    options.add_output(parser)
    options.add_debug(parser)
    args = parser.parse_args(argv)
    if args.model or args.served_model_name:
        raise UsageError("--model, --served-model-name: expected CKPT; the name is asked of the server")
    if args.dense_url and not args.dense:
        raise UsageError("--dense-url: expected with --dense, which its answers are compared with")
    if not isinstance(args.extra_body, dict | None):
        raise UsageError(f"--extra-body: {shown(args.extra_body)}; expected a JSON object")
    if {"tau", "sparsity"} & set(args.extra_body or {}):
        raise UsageError("--extra-body: expected no tau or sparsity in it; --tau says which to measure")
    check_output_file(args.output, "--output")
    if args.plot:
        report.check_plot(args.plot, dense=bool(args.dense))
    return args


def run(argv: Sequence[str]) -> int:
    """The command: servers, a check of their answers, vLLM's benchmark, then one table, JSON and plot."""
    args = parse(argv)
    curve = options.causal_checkpoint(args.checkpoint).prunepath.tau_curve
    if args.dense:
        options.check_dense(args.dense)
    result: dict[str, Any] = {"model": args.checkpoint, "answers_off_by": {}, "runs": []}
    if args.dense:
        _measure(args, args.dense, args.dense_url, [None], result)
    _measure(args, args.checkpoint, args.base_url, args.tau, result)
    for row in result["runs"]:
        row["share"] = None if row["tau"] is None else share_on_curve(curve, row["tau"])
    result["versions"] = report.versions()
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    off = ", ".join(f"{tau} {nats:.1g}" for tau, nats in result["answers_off_by"].items())
    print(f"{args.checkpoint}: answers off by, in nats a token: {off}\n{table(result['runs'])}")
    if args.plot:
        _plot(args.plot, result)
    return 0


def _measure(
    args: argparse.Namespace, path: str, url: str | None, taus: Sequence[float | None], result: dict[str, Any]
) -> None:
    """Check and measure one server; nothing is kept of one that is wrong."""
    if url is None:
        with server.running(path, args.server_args) as started:
            return _measure(args, path, started, taus, result)
    result["answers_off_by"] |= server.check_answers(url, path, taus)
    for tau in taus:
        print(f"measuring {'the dense model' if tau is None else f'tau {tau:g}'}", file=sys.stderr, flush=True)
        result["runs"].append({"tau": tau, "result": engine_benchmark(args, url, path, tau)})


def engine_benchmark(args: argparse.Namespace, url: str, path: str, tau: float | None) -> dict[str, Any]:
    """One ``vllm bench serve``: what it writes as JSON.

    Args:
        args: from :func:`parse`.
        url: the server.
        path: directory of the served model, whose tokenizer makes the prompts.
        tau: of every request; None sends none.

    Raises:
        BenchmarkError: a request failed.
    """
    args = copy.deepcopy(args)
    args.base_url, args.tokenizer = url.rstrip("/"), args.tokenizer or path
    args.extra_body = {**(args.extra_body or {}), **({} if tau is None else {"tau": tau})}
    with redirect_stdout(sys.stderr):  # stdout is for our table
        result = vllm_serve.main(args)
    if failed := result.get("failed", 0):
        asked = failed + result["completed"]
        raise BenchmarkError(f"tau {tau}: {failed} of {asked} requests failed, expected none: no speed is reported")
    return result


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A line a metric, a column a run; ratios above 1 are better than dense."""
    dense = next((run["result"] for run in runs if run["tau"] is None), None)
    lines = []
    for key, title in METRICS.items():
        cells = []
        for run in runs:
            value = run["result"].get(key)  # --percentile-metrics may leave some out
            if value is None:
                cells.append("")
                continue
            gain = ""
            if dense is not None and run["tau"] is not None:
                gain = report.ratio(*((value, dense[key]) if key in HIGHER_IS_BETTER else (dense[key], value)))
            cells.append(f"{value:.2f}{gain}")
        lines.append([title, *cells])
    return report.table(["", *("dense" if run["tau"] is None else f"tau {run['tau']:g}" for run in runs)], lines)


def _plot(path: str, result: dict[str, Any]) -> None:
    """Output throughput and time per token against the active share, or tau where the checkpoint has no curve."""
    runs = [run for run in result["runs"] if run["tau"] is not None]
    dense = next(run["result"] for run in result["runs"] if run["tau"] is None)
    by_share = all(run["share"] is not None for run in runs)
    at = [run["share"] if by_share else run["tau"] for run in runs]
    lines = {
        "output throughput": [run["result"]["output_throughput"] / dense["output_throughput"] for run in runs],
        "median TPOT": [dense["median_tpot_ms"] / run["result"]["median_tpot_ms"] for run in runs],
    }
    report.plot_speedups(
        path,
        f"server, {os.path.basename(result['model'])}",
        {label: list(zip(at, values, strict=True)) for label, values in lines.items()},
        "active share of experts" if by_share else "tau",
    )
