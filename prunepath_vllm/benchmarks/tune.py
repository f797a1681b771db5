"""``prunepath bench tune``: the table of tile choices and crossovers for this GPU and a layer's shape."""

import argparse
import os
import time
from typing import Any

import torch

from prunepath_vllm.arguments import check_output_folder
from prunepath_vllm.benchmarks import layer
from prunepath_vllm.benchmarks.report import BenchmarkError
from prunepath_vllm.benchmarks.tile_search import (
    CASES,
    SWEEP_AT,
    TOKENS,
    Bench,
    paths_for,
    precompile_all,
    start_choice,
    tune_bench,
    write_table,
)
from prunepath_vllm.kernels.ffn import TUNING_DIR, Choice, shape_key, table_name


def run(args: argparse.Namespace) -> int:
    """Search each shape's tiles and write them down; a path whose results are wrong is left out."""
    folder = args.output or os.environ.get(TUNING_DIR) or "."
    check_output_folder(folder, "--output")
    specs = {model: layer.spec_of(model, args.expert_size, args.expert_dtype) for model in args.models}
    layer.require_gpu()
    deadline = time.monotonic() + args.seconds
    os.makedirs(folder, exist_ok=True)
    file = os.path.join(folder, table_name(torch.cuda.get_device_name()))
    tokens = tuple(sorted(args.tokens or TOKENS))
    for model, spec in specs.items():
        print(f"{model}: {shape_key(spec)}, compiling", flush=True)
        precompile_all(spec, tuple(t for t in tokens if t in SWEEP_AT), args.processes)
        bench = Bench(spec, args.layers)
        checks: list[dict[str, Any]] = []
        for count in tokens:
            starts = {path: start_choice(spec, count, path) for path in paths_for(count)}
            bench.broken |= starts.keys() - layer.check_all(bench, starts, count, checks).keys()
        tuning = tune_bench(
            bench,
            tokens,
            report=said,
            verify=lambda count, choices: right(bench, count, choices, checks),  # noqa: B023
            deadline=deadline,
        )
        write_table(file, spec, tuning)
        print(f"{model}: {sum(c['ok'] for c in checks)} of {len(checks)} checks passed; table in {file}", flush=True)
    return 0


def right(bench: Bench, tokens: int, choices: dict[str, Choice], checks: list[dict[str, Any]]) -> dict[str, Choice]:
    """The choices that pass.

    Raises:
        BenchmarkError: none does.
    """
    good = layer.check_all(bench, choices, tokens, checks)
    if not good:
        raise BenchmarkError(
            f"{shape_key(bench.spec)}, {tokens} tokens: every path gives wrong results; expected one to be right"
        )
    return good


def said(tokens: int, dense: float, choices: dict[str, Choice], times: dict[str, list[float]], best: str) -> None:
    """Print one batch size: the dense time, each path's ratios in CASES, and the choice."""
    shown = "; ".join(
        path + "".join(f" {dense / us:.2f}x" for us in times[path]) + (" <-" if path == best else "")
        for path in choices
    )
    cases = ", ".join(f"{share:g}{' (alike)' if alike else ''}" for share, alike in CASES)
    print(f"{tokens:6} tokens: dense {dense:.1f} us; at {cases}: {shown}", flush=True)
