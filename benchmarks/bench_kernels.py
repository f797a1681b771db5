"""Checks, tunes and times the routed feed-forward layer against the dense one on a CUDA GPU.

    python benchmarks/bench_kernels.py --shapes qwen2-7b,gpt2-medium --output kernels.json

Nothing is timed unless it is right. Times are medians over CUDA-graph replays (see kernels/tuning.py); inputs route at
random, so that several tokens together touch 1 - (1 - share)^T of the experts. Stops starting work after --seconds.
"""

import argparse
import json
import os
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from prunepath_vllm.kernels import reference
from prunepath_vllm.kernels.dense import dense_ffn
from prunepath_vllm.kernels.ffn import Choice, Tuning, tuning_to_json
from prunepath_vllm.kernels.routing import LIBRARY_TOKENS, route
from prunepath_vllm.kernels.tuning import (
    SWEEP_AT,
    TOKENS,
    Bench,
    Shape,
    graph_of,
    paths_for,
    precompile_all,
    start_choice,
    time_us,
    tune_bench,
    write_table,
)

SHAPES = {
    "qwen2-7b": Shape(3584, 592, 32),
    "qwen2.5-32b": Shape(5120, 864, 32),
    "llama-3-8b": Shape(4096, 448, 32),
    "gpt2-medium": Shape(1024, 128, 32, False, "gelu_new", True),
    "smollm2": Shape(576, 48, 32),
}
"""Published shapes."""

CHECKED_ONLY = [Shape(1024, 96, size) for size in (8, 16, 64)] + [Shape(768, 40, 4, False, "relu", True)]
"""Other expert sizes, not timed. 4: 8 neurons split over two GPUs."""

TOLERANCE = 5e-3
"""Relative RMS error against float32 arithmetic on the same bf16 inputs."""

TABLE_SHARES = (1.0, 0.5, 0.2, 0.1, 0.05)

ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu_new": lambda v: F.gelu(v, approximate="tanh")}


def expected(bench: Bench, i: int, x: Tensor, gates: Tensor) -> Tensor:
    """Output [T, H] of layer i in float32."""
    w = bench.layers[i].weights
    pre = F.linear(x.float(), w.w_in.float(), None if w.b_in is None else w.b_in.float())
    act = ACTIVATIONS[w.activation]
    if w.glu:
        gate, value = pre.chunk(2, dim=-1)
        neurons = act(gate) * value
    else:
        neurons = act(pre)
    y = reference.scale_neurons(neurons, gates) @ w.w_out_t.float()
    return y if w.b_out is None else y + w.b_out.float()


def check(bench: Bench, num_tokens: int, share: float, choice: Choice, gate: str = "sigmoid") -> dict[str, Any]:
    """Every token's number of experts, its output, and the same bits from every replay of a graph."""
    xs, taus = bench.inputs(num_tokens, share)
    last = len(xs) - 1
    counts = torch.zeros(num_tokens, dtype=torch.int32, device="cuda")
    bench.run(last, xs[last], taus[last], choice, gate=gate, active_counts=counts)
    active = max(1, round(share * bench.shape.experts))
    wrong = int((counts != active).sum())
    out: list[Tensor] = []
    graph = graph_of(
        lambda: out.extend(bench.run(i, x, t, choice, gate=gate) for i, (x, t) in enumerate(zip(xs, taus, strict=True)))
    )
    first = None
    same = True
    for _ in range(20 if num_tokens <= LIBRARY_TOKENS else 3):
        for t in out:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        outputs = torch.stack(out[-len(xs) :])
        same = same and (first is None or torch.equal(first, outputs))
        first = outputs
    assert first is not None
    error = 0.0
    for i in {0, last}:
        logits = F.linear(xs[i].double(), bench.layers[i].router.double()).float()
        gates = reference.expert_weights(logits, taus[i], selection="cumulative_mass", threshold=None, gate=gate)
        y = expected(bench, i, xs[i], gates)
        difference = float((first[i].float() - y).norm() / y.norm())
        error = max(error, difference) if difference == difference else float("inf")
    del graph
    out.clear()
    if num_tokens >= 256:
        torch.cuda.empty_cache()
    # Rounding may move a near-tie in thousands of tokens.
    ok = wrong <= num_tokens // 1000 and error < TOLERANCE and same
    return dict(tokens=num_tokens, share=share, path=choice.path, gate=gate, wrong=wrong, error=error, same=same, ok=ok)


def check_all(
    bench: Bench, choices: dict[str, Choice], num_tokens: int, log: list[dict[str, Any]]
) -> dict[str, Choice]:
    """The choices that pass; the others are printed."""
    good = {}
    for path, choice in choices.items():
        cases = [(1.0, "sigmoid"), (0.2, "sigmoid"), (0.2, "none"), (1.0, "none"), (1 / bench.shape.experts, "sigmoid")]
        if num_tokens > LIBRARY_TOKENS:
            cases = cases[:2]
        try:
            results = [check(bench, num_tokens, share, choice, gate) for share, gate in cases]
        except Exception as error:
            print(
                f"FAILED {bench.shape} T={num_tokens} {choice}: {type(error).__name__} {str(error)[:300]}", flush=True
            )
            log.append(dict(tokens=num_tokens, path=path, ok=False, exception=str(error)[:500]))
            continue
        log += results
        if all(r["ok"] for r in results):
            good[path] = choice
        else:
            print(f"FAILED {bench.shape} T={num_tokens} {choice}:", [r for r in results if not r["ok"]], flush=True)
    return good


def copy_bandwidth() -> float:
    """Bytes per microsecond (TB/s * 1e6) of a device-to-device copy, read plus written."""
    source = torch.randint(0, 255, (2**32,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), warmup=20, rep=100, return_mode="median")
    return 2 * source.numel() / (milliseconds * 1e3)


class Report:
    """Prints a table per batch size and keeps it for the JSON."""

    def __init__(self, bench: Bench, bandwidth: float, result: dict[str, Any]) -> None:
        self.bench, self.bandwidth, self.result = bench, bandwidth, result

    def __call__(
        self, num_tokens: int, dense: float, choices: dict[str, Choice], times: dict[str, list[float]], best: str
    ) -> None:
        """One batch size: time every path's choice at TABLE_SHARES."""
        bench = self.bench
        xs, _ = bench.inputs(num_tokens, 1.0)
        ours = time_us(lambda i: dense_ffn(xs[i], bench.layers[i].weights), len(xs))
        data = {share: bench.inputs(num_tokens, share) for share in TABLE_SHARES}
        routing = {}
        for path, choice in choices.items():
            xs, taus = data[0.2]
            rule: dict[str, Any] = dict(selection="cumulative_mass", threshold=None, gate="sigmoid")
            flags = num_tokens <= LIBRARY_TOKENS
            rule |= dict(config=choice.router, want_flags=flags, pdl=choice.pdl)
            routing[path] = time_us(
                lambda i: route(xs[i], taus[i], bench.layers[i].router, None, **rule),  # noqa: B023
                len(xs),
            )
        print(f"T={num_tokens}: dense {dense:.1f} us, dense_ffn (host_dense) {ours:.1f}; chosen: {best}")
        rows = []
        for path in choices:
            us = [bench.time(choices[path], data[share]) for share in TABLE_SHARES]
            none = bench.time(choices[path], data[1.0], gate="none")
            size = bench.shape.hidden * 2.0 * bench.shape.experts
            touched = [1 - (1 - s) ** num_tokens for s in TABLE_SHARES]
            per_expert = bench.shape.size * (3 if bench.shape.glu else 2)
            copy = [size * (1 + per_expert * u) / t / self.bandwidth for u, t in zip(touched, us, strict=True)]
            rows.append(
                dict(path=path, us=us, none=none, route=routing[path], of_copy=copy, choice=asdict(choices[path]))
            )
            figures = "  ".join(f"{s}: {t:.1f} {dense / t:.2f}x" for s, t in zip(TABLE_SHARES, us, strict=True))
            figures += f" | all, no gate: {none:.1f} | of copy {copy[2]:.2f}"
            print(f"  {path:7} route {routing[path]:.1f} | {figures}")
            print("         ", one_line(choices[path]), flush=True)
        self.result["tables"].append(dict(tokens=num_tokens, dense=dense, dense_ffn=ours, chosen=best, rows=rows))


def one_line(choice: Choice) -> str:
    """A choice's own fields."""
    row = tuning_to_json(Tuning(((1, choice),)))[0]
    del row["max_tokens"]
    return " ".join(f"{k}={tuple(v.values()) if isinstance(v, dict) else v}" for k, v in row.items())


def shape_names(text: str) -> list[str]:
    """Names of published shapes, separated by commas; none where the text is empty."""
    names = text.split(",") if text else []
    for name in names:
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"unknown shape {name!r}; expected some of {', '.join(SHAPES)}")
    return names


def main() -> None:
    """Check, tune, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        type=shape_names,
        default=["qwen2-7b", "gpt2-medium"],
        help=f"{', '.join(SHAPES)}; empty: check the expert sizes alone",
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=lambda s: tuple(int(t) for t in s.split(",")), default=TOKENS)
    parser.add_argument("--few", type=int, default=4, help="largest batch of the shapes after the first")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--output", default="kernels.json")
    parser.add_argument("--table", default="table.json", help="the tuned table, in the shipped format")
    args = parser.parse_args()
    begin = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False

    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    result |= {"copy_TBps": bandwidth * 1e-6, "shapes": {}}
    print(result, flush=True)

    def save() -> None:
        os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
        with open(args.output, "w") as file:
            json.dump(result, file, indent=1)

    checks: list[dict[str, Any]] = []
    result["checks"] = checks
    for shape in CHECKED_ONLY:
        bench = Bench(shape, 2)
        for num_tokens in (1, 5, 64, 1500):
            starts = {path: start_choice(shape, num_tokens, path) for path in paths_for(num_tokens)}
            check_all(bench, starts, num_tokens, checks)
    summary = max((c.get("error", 9.0) for c in checks), default=0)
    print(f"expert sizes: {sum(c['ok'] for c in checks)} of {len(checks)} checks, worst {summary:.1e}", flush=True)
    save()

    for n, name in enumerate(args.shapes):
        if time.monotonic() - begin > args.seconds:
            print(f"no time left for {', '.join(args.shapes[n:])}")
            break
        shape = SHAPES[name]
        tokens = tuple(t for t in args.tokens if n == 0 or t <= args.few)
        precompile_all(shape, tuple(t for t in tokens if t in SWEEP_AT), args.processes)
        print(f"{name} {shape}, compiled at {time.monotonic() - begin:.0f} s", flush=True)
        part: dict[str, Any] = {"checks": [], "tables": []}
        result["shapes"][name] = part
        bench = Bench(shape, args.layers)
        for num_tokens in tokens:
            starts = {path: start_choice(shape, num_tokens, path) for path in paths_for(num_tokens)}
            bench.broken |= starts.keys() - check_all(bench, starts, num_tokens, part["checks"]).keys()
        wrong = ", ".join(sorted(bench.broken))
        print(
            f"checks: {f'FAILED, left out: {wrong}' if wrong else 'passed'}, {time.monotonic() - begin:.0f} s",
            flush=True,
        )
        tuning = tune_bench(
            bench,
            tokens,
            report=Report(bench, bandwidth, part),
            verify=lambda t, choices: check_all(bench, choices, t, part["checks"]),  # noqa: B023
            deadline=begin + args.seconds,
        )
        part["sweeps"] = bench.sweeps
        write_table(args.table, shape, tuning)
        print(f"{name} done at {time.monotonic() - begin:.0f} s", flush=True)
        save()
        bench.layers.clear()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
