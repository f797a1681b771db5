"""``prunepath bench kernel``: the routed layer alone against the dense one, as the engine would run it."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from prunepath_vllm.arguments import check_output_file, check_plot
from prunepath_vllm.benchmarks import layer, report
from prunepath_vllm.benchmarks.report import BenchmarkError
from prunepath_vllm.benchmarks.tile_search import Bench
from prunepath_vllm.kernels.ffn import tuning_for
from prunepath_vllm.kernels.layer import LayerSpec


def run(args: argparse.Namespace) -> int:
    """Check, time, print; exit code 1, and no speed, where a choice is wrong."""
    check_output_file(args.output, "--output")
    check_plot(args.plot)
    specs = {model: layer.spec_of(model, args.expert_size, args.expert_dtype) for model in args.models or ["qwen2-7b"]}
    layer.require_gpu()
    bandwidth = layer.copy_bandwidth()
    torch.cuda.empty_cache()
    result: dict[str, Any] = {"copy_TBps": bandwidth * 1e-6, "models": {}, "versions": report.versions()}
    for model, spec in specs.items():
        rows, checks = measure(model, spec, args, bandwidth)
        result["models"][model] = {"rows": rows, "checks": checks}
        worst = max(c["error"] for c in checks)
        print(f"{report.named(model, args.expert_dtype)}: {len(checks)} checks passed, worst relative RMS {worst:.1e}")
        print(table(rows), "\n")
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        lines = {
            f"{model}, {tokens} tokens": [
                (r["share"], r["dense_us"] / r["us"]) for r in part["rows"] if r["tokens"] == tokens
            ]
            for model, part in result["models"].items()
            for tokens in args.tokens
        }
        report.plot_speedups(args.plot, "feed-forward layer", lines)
    return 0


def measure(
    model: str, spec: LayerSpec, args: argparse.Namespace, bandwidth: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One model's rows {tokens, share, path, us, dense_us, of_copy} and the checks that came first.

    Raises:
        BenchmarkError: a choice gives wrong results.
    """
    bench = Bench(spec, args.layers)
    tuning = tuning_for(torch.device("cuda"), spec)
    checks: list[dict[str, Any]] = []
    for tokens in args.tokens:
        choice = tuning.choice(tokens)
        if not layer.check_all(bench, {choice.path: choice}, tokens, checks):
            raise BenchmarkError(f"{model}, {tokens} tokens: the {choice.path} path is wrong; no speed is reported")
    rows = []
    router = float(spec.dtype.itemsize * spec.hidden * spec.num_experts)
    for tokens in tqdm(args.tokens, desc=model):
        dense = bench.time_dense(tokens)
        for share in args.share:
            us = bench.time(tuning.choice(tokens), bench.inputs(tokens, share), gate="none")
            union = 1 - (1 - share) ** tokens
            touched = router + spec.weight_bytes * union
            path = tuning.choice(tokens).path
            rows.append(
                dict(tokens=tokens, share=share, path=path, us=us, dense_us=dense, of_copy=touched / us / bandwidth)
            )
    return rows, checks


def table(rows: list[dict[str, Any]]) -> str:
    """A line a batch size: the dense layer's time, then each share's with its ratio."""
    shares = list(dict.fromkeys(row["share"] for row in rows))
    lines = []
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        mine = [row for row in rows if row["tokens"] == tokens]
        cells = [f"{row['us']:.1f}{report.ratio(row['dense_us'], row['us'])}" for row in mine]
        lines.append([str(tokens), mine[0]["path"], f"{mine[0]['dense_us']:.1f}", *cells])
    return report.table(["tokens", "path", "dense, us", *(f"share {share:g}" for share in shares)], lines)
