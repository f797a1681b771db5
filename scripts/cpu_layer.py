"""The routed layer alone on a CPU, its weights in bfloat16, int8 and float8 in turn: ``bench kernel`` for processors.

    OMP_NUM_THREADS=1 python scripts/cpu_layer.py qwen2.5-1.5b --expert-size 16 --output layer.json

Weights and routing are random, the weights are three layers' (so that no cache holds them), every time is a median of
calls that take turns. Each case is checked first against float32 arithmetic on the dequantised weights.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from prunepath_vllm.arguments import check_output_file, whole
from prunepath_vllm.benchmarks import options, report, shapes
from prunepath_vllm.benchmarks.float32 import layer_output
from prunepath_vllm.benchmarks.layer import spec_of
from prunepath_vllm.benchmarks.published import SHAPES
from prunepath_vllm.conversion.quantize import quantised_weights
from prunepath_vllm.kernels import cpu, reference
from prunepath_vllm.kernels.layer import LayerSpec, RouterWeights, Weights
from prunepath_vllm.kernels.native import memory

DTYPES = {"bfloat16": None, "int8": "int8", "float8": "float8_e4m3fn"}
LAYERS = 3
TOLERANCE = 5e-3


def pages(values: Tensor) -> Tensor:
    """The same in large pages, where the engine keeps weights."""
    return memory.empty(*values.shape, dtype=values.dtype).copy_(values)


def layer(spec: LayerSpec, stored: str | None) -> Weights:
    """Random weights of unit variance over their inputs; the second linear transposed, a scale for each neuron."""
    w_in, w_out_t = (
        (torch.randn(rows, spec.hidden) * size**-0.5).to(spec.dtype)
        for rows, size in ((spec.input_rows, spec.hidden), (spec.neurons, spec.neurons))
    )
    weights = Weights(w_in, None, w_out_t, None)
    if stored is not None:
        weights = quantised_weights(weights, stored)
    return replace(weights, w_in=pages(weights.w_in), w_out_t=pages(weights.w_out_t))


def main() -> None:
    """Print a table; write the times where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--expert-size", type=whole(1), default=16)
    parser.add_argument("--tokens", type=options.numbers(int), default=[1, 4, 8])
    parser.add_argument("--share", type=options.shares, default=[1.0, 0.5, 0.2, 0.1])
    parser.add_argument("--repeats", type=whole(1), default=20)
    parser.add_argument("--output")
    args = parser.parse_args()
    check_output_file(args.output, "--output")
    torch.manual_seed(0)
    specs = {name: spec_of(args.shape, args.expert_size, stored) for name, stored in DTYPES.items()}
    layers = {name: [layer(specs[name], stored) for _ in range(LAYERS)] for name, stored in DTYPES.items()}
    spec = specs["bfloat16"]
    router = RouterWeights((torch.randn(spec.num_experts, spec.hidden) * spec.hidden**-0.5).to(spec.dtype), None)
    rows = []
    for tokens, share in tqdm([(t, s) for t in args.tokens for s in args.share], unit="case"):
        x = torch.randn(tokens, spec.hidden).to(spec.dtype)
        tau = torch.full((tokens,), shapes.tau_of_share(share, spec.num_experts))
        gates = reference.expert_weights(
            reference.router_logits(x, router.weight), tau, selection="cumulative_mass", threshold=None, gate="none"
        )
        times: dict[str, list[float]] = {name: [] for name in DTYPES}
        for turn in range(args.repeats + 1):
            for name, weights in layers.items():
                for one in weights:
                    start = time.perf_counter()
                    y = cpu.routed_ffn(x, tau, router, one, specs[name])
                    times[name].append(1e3 * (time.perf_counter() - start))
                if turn == 0:
                    expected = layer_output(x, gates, one, specs[name])
                    error = float((y.float() - expected).norm() / expected.norm())
                    if not error < TOLERANCE:
                        raise SystemExit(
                            f"{name}, {tokens} tokens, share {share}: off by {error:.1e}, no speed is told"
                        )
                    times[name].clear()
        rows.append(dict(tokens=tokens, share=share, ms={name: statistics.median(of) for name, of in times.items()}))
    header = ["tokens", "share", *(f"{name}, ms" for name in DTYPES)]
    cells = [
        [str(row["tokens"]), f"{row['share']:g}"]
        + [f"{row['ms'][name]:.2f} ({row['ms']['bfloat16'] / row['ms'][name]:.2f}x)" for name in DTYPES]
        for row in rows
    ]
    print(report.table(header, cells))
    if args.output:
        result = dict(
            shape=args.shape, expert_size=args.expert_size, threads=torch.get_num_threads(), rows=rows,
            versions=report.versions(),
        )  # fmt: skip
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
