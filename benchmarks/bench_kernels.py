"""Times the routed feed-forward kernels against the dense layer on a CUDA GPU; nothing is timed unless it is right.

    python benchmarks/bench_kernels.py --shape qwen2-7b --output kernels.json

Every figure is the median over CUDA-graph replays of one step through several layers with weights of their own (more
bytes than the L2 holds), divided by the layers. Sweeps the tile choices, then times the whole layer with the best ones.
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from prunepath_vllm.kernels import reference
from prunepath_vllm.kernels.decode import (
    DownConfig,
    FusedConfig,
    UpConfig,
    down_partials,
    fused_partials,
    reduce_partials,
    up,
)
from prunepath_vllm.kernels.dense import dense_ffn, gated_activation
from prunepath_vllm.kernels.routing import RouterConfig, Routing, route
from prunepath_vllm.kernels.weights import Weights

SHAPES = {
    "qwen2-7b": (3584, 592, 32),
    "qwen2.5-32b": (5120, 864, 32),
    "llama3-8b": (4096, 448, 32),
}
"""Published GLU shapes: hidden size, experts, neurons per expert."""

PDL = 1
"""Mode of programmatic dependent launch in sweeps and checks; the tables compare all three."""

TOLERANCE = 5e-3
"""Relative RMS error against float32 arithmetic on the same bf16 inputs."""


@dataclass
class Layer:
    """One layer's weights and the inputs it is timed with."""

    weights: Weights
    w_out: Tensor
    router: Tensor


@dataclass(frozen=True)
class Configs:
    """Tile choices of the whole chain."""

    router: RouterConfig = field(default_factory=RouterConfig)
    fused: FusedConfig = field(default_factory=FusedConfig)
    up: UpConfig = field(default_factory=UpConfig)
    down: DownConfig = field(default_factory=DownConfig)


def make_layer(shape: tuple[int, int, int], seed: int) -> Layer:
    """Random bf16 weights; the router's logits have unit variance for inputs that do."""
    hidden, experts, size = shape
    gen = torch.Generator("cuda").manual_seed(seed)

    def rand(rows: int, scale: float) -> Tensor:
        return torch.randn(rows, hidden, generator=gen, device="cuda", dtype=torch.bfloat16).mul_(scale)

    w_out_t = rand(experts * size, 0.02)
    weights = Weights(rand(2 * experts * size, hidden**-0.5), None, w_out_t, None, "silu", True)
    return Layer(weights, w_out_t.t().contiguous(), rand(experts, hidden**-0.5))


def taus_for(x: Tensor, router: Tensor, active: int) -> Tensor:
    """The tau at which each token keeps exactly `active` experts: halfway between two cumulative masses."""
    p = reference.router_logits(x, router).double().softmax(-1)
    mass = p.sort(dim=-1, descending=True).values.cumsum(-1)
    if active >= p.shape[-1]:
        return torch.ones(x.shape[0], device=x.device)
    return ((mass[:, active - 1] + mass[:, active]) / 2).float()


def routing_of(x: Tensor, layer: Layer, tau: Tensor, config: RouterConfig, pdl: int) -> Routing:
    """Eq. 7-9 with a sigmoid gate."""
    return route(
        x, tau, layer.router, None, selection="cumulative_mass", threshold=None, gate="sigmoid", config=config, pdl=pdl
    )


def sparse_ffn(x: Tensor, layer: Layer, tau: Tensor, cfg: Configs, pdl: int, fused: bool) -> Tensor:
    """The whole routed layer."""
    routing = routing_of(x, layer, tau, cfg.router, pdl)
    if fused:
        partial = fused_partials(x, layer.weights, routing, cfg.fused, pdl)
    else:
        neurons, experts = up(x, layer.weights, routing, cfg.up, pdl)
        partial = down_partials(neurons, experts, layer.weights, cfg.down, pdl)
    return reduce_partials(partial, layer.weights.b_out, x.dtype, pdl)


def plain_dense(x: Tensor, layer: Layer) -> Tensor:
    """What a dense engine runs: two linears in their usual layouts around one activation kernel."""
    return F.linear(gated_activation(F.linear(x, layer.weights.w_in), layer.weights), layer.w_out)


def expected(x: Tensor, layer: Layer, gates: Tensor) -> Tensor:
    """Output [T, H] of the routed layer in float32."""
    gate, value = F.linear(x.float(), layer.weights.w_in.float()).chunk(2, dim=-1)
    return reference.scale_neurons(F.silu(gate) * value, gates) @ layer.weights.w_out_t.float()


def misrouted(x: Tensor, layer: Layer, tau: Tensor, routing: Routing) -> int:
    """Experts wrongly in or out, gates that are off, flags that do not match; near-ties at the cut are forgiven."""
    logits = F.linear(x.double(), layer.router.double())
    gates = reference.expert_weights(logits, tau, selection="cumulative_mass", threshold=None, gate="sigmoid")
    active = gates != 0
    cut = logits.masked_fill(~active, float("inf")).amin(-1, keepdim=True)
    wrong = ((routing.gates != 0) != active) & ((logits - cut).abs() > 1e-4)
    off = active & (routing.gates != 0) & ((routing.gates - gates).abs() > 1e-4)
    return int(wrong.sum() + off.sum() + ((routing.gates != 0).any(0) != (routing.flags != 0)).sum())


def graph_of(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `step`, after two warm-up calls on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def time_us(step: Callable[[int], Any], layers: int, replays: int = 15) -> float:
    """Median microseconds of one layer of `step(layer index)`, over CUDA-graph replays."""
    keep: list[Any] = []
    graph = graph_of(lambda: keep.append([step(i) for i in range(layers)]))
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / layers)
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes per microsecond (MB/s * 1e-6 = TB/s * 1e6) of a device-to-device copy, read plus written."""
    source = torch.randint(0, 255, (2**32,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), warmup=20, rep=100, return_mode="median")
    return 2 * source.numel() / (milliseconds * 1e3)


FUSED_SWEEP = [
    FusedConfig(rows, warps, stages, programs)
    for rows, warps, stages, programs in [
        (1, 16, 1, 2), (2, 16, 1, 1), (2, 16, 1, 2), (4, 16, 1, 1), (4, 16, 1, 2),
        (1, 16, 4, 1), (2, 16, 3, 1), (2, 16, 4, 1), (4, 16, 2, 1), (4, 16, 3, 1), (1, 16, 3, 2), (2, 16, 2, 2),
        (2, 16, 3, 2), (8, 16, 2, 1),
        (1, 8, 1, 3), (2, 8, 1, 2), (2, 8, 1, 3), (4, 8, 1, 2), (1, 8, 3, 2), (1, 8, 3, 3), (2, 8, 3, 2), (2, 8, 2, 2),
        (2, 8, 2, 4), (1, 4, 2, 4),
    ]
]  # fmt: skip
UP_SWEEP = [
    UpConfig(rows, block_k, warps, stages, programs)
    for rows, block_k, warps, stages, programs in [
        (16, 128, 4, 4, 2), (16, 128, 4, 4, 3), (16, 256, 4, 3, 2), (16, 256, 4, 4, 2), (32, 64, 4, 6, 2),
        (32, 128, 4, 3, 2), (32, 128, 4, 4, 2), (32, 128, 4, 4, 3), (32, 128, 4, 5, 2), (32, 128, 8, 4, 2),
        (32, 256, 4, 3, 1), (32, 256, 8, 3, 2), (64, 64, 4, 4, 2), (64, 64, 4, 6, 1), (64, 128, 4, 3, 2),
        (64, 128, 8, 3, 2), (64, 128, 4, 5, 1), (64, 128, 8, 5, 1), (128, 64, 8, 4, 1), (128, 64, 8, 5, 1),
    ]
]  # fmt: skip
DOWN_SWEEP = [
    DownConfig(block_h, block_k, splits, warps, stages)
    for block_h, block_k, splits, warps, stages in [
        (64, 64, 5, 4, 9), (64, 128, 5, 4, 7), (128, 32, 9, 4, 9), (128, 64, 5, 4, 7), (128, 64, 9, 4, 7),
        (128, 64, 9, 4, 9), (128, 128, 5, 4, 7), (128, 128, 5, 8, 7), (128, 128, 9, 4, 5), (256, 32, 9, 4, 9),
        (256, 32, 19, 4, 7), (256, 64, 9, 4, 7), (256, 64, 9, 8, 7), (256, 64, 19, 4, 5), (512, 32, 19, 8, 7),
    ]
]  # fmt: skip
ROUTER_SWEEP_GEMV = [
    RouterConfig(block_e, split_k, warps, select_e, select_warps)
    for block_e, split_k, warps, select_e, select_warps in [
        (4, 1, 4, 4, 4), (4, 1, 8, 4, 4), (2, 1, 4, 4, 4), (4, 2, 4, 4, 4), (8, 2, 8, 4, 4), (8, 4, 4, 4, 4),
        (4, 1, 8, 4, 8), (4, 1, 8, 2, 4), (4, 1, 8, 8, 4), (4, 1, 8, 8, 8),
    ]
]  # fmt: skip
ROUTER_SWEEP_DOT = [RouterConfig(split_k=split, select_block_e=e) for split in (2, 4, 7) for e in (4, 16)]


def precompile(shape: tuple[int, int, int], job: tuple[int, Any]) -> None:
    """Compile one variant into Triton's cache by running it once with no expert listed."""
    hidden, experts, size = shape
    num_tokens, cfg = job

    def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(*sizes, dtype=dtype, device="cuda")

    x = empty(num_tokens, hidden)
    f = experts * size
    routing = Routing(empty(num_tokens, experts, dtype=torch.float32), empty(experts, dtype=torch.int32))
    layer = Layer(Weights(empty(2 * f, hidden), None, empty(f, hidden), None, "silu", True), x, empty(experts, hidden))
    try:
        if isinstance(cfg, RouterConfig):
            routing_of(x, layer, empty(num_tokens, dtype=torch.float32), cfg, PDL)
        elif isinstance(cfg, FusedConfig):
            fused_partials(x, layer.weights, routing, cfg)
        elif isinstance(cfg, UpConfig):
            up(x, layer.weights, routing, cfg)
        else:
            down_partials(empty(num_tokens, f), empty(experts + 1, dtype=torch.int32), layer.weights, cfg)
    except (triton.runtime.errors.OutOfResources, RuntimeError):
        return  # the sweep meets it again and reports it


class Bench:
    """One shape: its layers, the checks, the sweeps and the tables."""

    def __init__(self, shape: tuple[int, int, int], layers: int) -> None:
        self.hidden, self.experts, self.size = self.shape = shape
        self.layers = [make_layer(shape, seed) for seed in range(layers)]
        self.result: dict[str, Any] = {}

    def inputs(self, num_tokens: int, share: float) -> tuple[list[Tensor], list[Tensor]]:
        """Per layer: tokens [T, H] and the taus at which each keeps `share` of the experts."""
        gen = torch.Generator("cuda").manual_seed(num_tokens)
        active = max(1, round(share * self.experts))
        xs = [
            torch.randn(num_tokens, self.hidden, generator=gen, device="cuda").to(torch.bfloat16) for _ in self.layers
        ]
        return xs, [taus_for(x, layer.router, active) for x, layer in zip(xs, self.layers, strict=True)]

    def check(self, num_tokens: int, share: float, cfg: Configs, fused: bool, pdl: int = PDL) -> dict[str, Any]:
        """Selection exact, output within tolerance, and the same bits from every replay of a graph."""
        xs, taus = self.inputs(num_tokens, share)
        routings = [routing_of(xs[i], self.layers[i], taus[i], cfg.router, pdl) for i in (0, -1)]
        wrong = sum(misrouted(xs[i], self.layers[i], taus[i], r) for i, r in zip((0, -1), routings, strict=True))
        out: list[Tensor] = []
        graph = graph_of(
            lambda: out.extend(
                sparse_ffn(xs[i], self.layers[i], taus[i], cfg, pdl, fused) for i in range(len(self.layers))
            )
        )
        first = None
        same = True
        for _ in range(20):
            for t in out:
                t.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            outputs = torch.stack(out[-len(self.layers) :])
            same = same and (first is None or torch.equal(first, outputs))
            first = outputs
        assert first is not None
        error = 0.0
        for i, r in zip((0, -1), routings, strict=True):
            y = expected(xs[i], self.layers[i], r.gates)
            error = max(error, float((first[i].float() - y).norm() / y.norm()))
        ok = wrong == 0 and error < TOLERANCE and same
        return {"tokens": num_tokens, "share": share, "wrong": wrong, "error": error, "same": same, "ok": ok}

    def sweep(self, name: str, variants: list[Any], num_tokens: int, shares: tuple[float, ...]) -> Any:
        """Time each variant of one kernel alone at each share; return the one with the least total."""
        n = len(self.layers)
        weights = [layer.weights for layer in self.layers]
        totals: dict[Any, list[float]] = {cfg: [] for cfg in variants}
        for share in shares:
            xs, taus = self.inputs(num_tokens, share)
            routings = [routing_of(xs[i], self.layers[i], taus[i], RouterConfig(split_k=4), PDL) for i in range(n)]
            ups = [up(xs[i], weights[i], routings[i], UpConfig()) for i in range(n)]

            def step(i: int, cfg: Any) -> Any:
                if isinstance(cfg, RouterConfig):
                    return routing_of(xs[i], self.layers[i], taus[i], cfg, PDL)  # noqa: B023
                if isinstance(cfg, FusedConfig):
                    return fused_partials(xs[i], weights[i], routings[i], cfg)  # noqa: B023
                if isinstance(cfg, UpConfig):
                    return up(xs[i], weights[i], routings[i], cfg)  # noqa: B023
                return reduce_partials(down_partials(*ups[i], weights[i], cfg), None, torch.bfloat16)  # noqa: B023

            for cfg in list(totals):
                try:
                    totals[cfg].append(time_us(lambda i: step(i, cfg), n))  # noqa: B023
                except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
                    print(f"  {name} T={num_tokens} {cfg}: {str(error)[:120]}")
                    del totals[cfg]
        ranked = sorted(totals.items(), key=lambda item: sum(item[1]))
        self.result.setdefault("sweeps", []).append(
            {"kernel": name, "tokens": num_tokens, "shares": shares, "us": [[t, asdict(c)] for c, t in ranked]}
        )
        print(f"{name} T={num_tokens}, us at shares {shares}, best 6 of {len(ranked)}:")
        for cfg, times in ranked[:6]:
            print("   ", " ".join(f"{t:7.1f}" for t in times), tuple(asdict(cfg).values()))
        return ranked[0][0]

    def table(self, num_tokens: int, cfg: Configs, fused: bool, shares: tuple[float, ...], bandwidth: float) -> None:
        """The whole layer against dense."""
        n = len(self.layers)
        xs, _ = self.inputs(num_tokens, 1.0)
        dense = time_us(lambda i: plain_dense(xs[i], self.layers[i]), n)
        gates = torch.rand(num_tokens, self.experts, device="cuda")
        ours = time_us(lambda i: dense_ffn(xs[i], self.layers[i].weights), n)
        masked = time_us(lambda i: dense_ffn(xs[i], self.layers[i].weights, gates), n)
        path = "fused" if fused else "up+down"
        print(f"T={num_tokens} {path}: dense {dense:.1f} us, dense_ffn {ours:.1f}, with gates {masked:.1f}")
        print("   share union   route  no PDL   PDL 1   PDL 2  x dense  of copy")
        rows = []
        for share in shares:
            xs, taus = self.inputs(num_tokens, share)
            routings = [routing_of(xs[i], self.layers[i], taus[i], cfg.router, PDL) for i in range(n)]
            union = statistics.mean(float(r.flags.float().mean()) for r in routings)
            route_us = time_us(lambda i: routing_of(xs[i], self.layers[i], taus[i], cfg.router, PDL), n)  # noqa: B023
            whole = time_us(lambda i: sparse_ffn(xs[i], self.layers[i], taus[i], cfg, PDL, fused), n)  # noqa: B023
            no_pdl = time_us(lambda i: sparse_ffn(xs[i], self.layers[i], taus[i], cfg, 0, fused), n)  # noqa: B023
            early = time_us(lambda i: sparse_ffn(xs[i], self.layers[i], taus[i], cfg, 2, fused), n)  # noqa: B023
            megabytes = 2e-6 * self.hidden * self.experts * (1 + 3 * self.size * union)
            best = min(whole, early)
            of_copy = megabytes * 1e6 / best / bandwidth
            rows.append(
                dict(share=share, union=union, route=route_us, whole=whole, no_pdl=no_pdl, early=early, of_copy=of_copy)
            )
            figures = f"{route_us:7.1f} {no_pdl:7.1f} {whole:7.1f} {early:7.1f} {dense / best:8.2f} {of_copy:8.2f}"
            print(f"   {share:5.2f} {union:5.2f} {figures}")
        self.result.setdefault("tables", []).append(
            dict(
                tokens=num_tokens, path=path, dense=dense, dense_ffn=ours, masked=masked, configs=asdict(cfg), rows=rows
            )
        )


def main() -> None:
    """Check, sweep, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-7b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=lambda s: [int(t) for t in s.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--output", default="kernels.json")
    args = parser.parse_args()
    shape = SHAPES[args.shape]

    jobs: list[tuple[int, Any]] = []
    for tokens in args.tokens:
        variants = [FUSED_SWEEP, ROUTER_SWEEP_GEMV] if tokens == 1 else [ROUTER_SWEEP_DOT]
        jobs += [(tokens, cfg) for cfg in itertools.chain(*variants, UP_SWEEP, DOWN_SWEEP)]
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(precompile, [shape] * len(jobs), jobs, chunksize=4))

    bench = Bench(shape, args.layers)
    bandwidth = copy_bandwidth()
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    bench.result |= {"shape": args.shape, "copy_TBps": bandwidth * 1e-6, **versions}
    print(f"{versions}, copy {bandwidth * 1e-6:.2f} TB/s, shape {args.shape} {shape}")
    failed = False
    for tokens in args.tokens:
        cfg = Configs(router=RouterConfig() if tokens == 1 else RouterConfig(split_k=4))
        for fused in [True, False] if tokens == 1 else [False]:
            for share in (1.0, 0.2, 0.05, 1 / shape[1]):
                check = bench.check(tokens, share, cfg, fused)
                bench.result.setdefault("checks", []).append(check | {"fused": fused})
                if not check["ok"]:
                    failed = True
                    print(f"FAILED T={tokens} fused={fused}: {check}")
    print("checks:", "FAILED" if failed else "passed", "worst", max(c["error"] for c in bench.result["checks"]))
    for tokens in [] if failed else args.tokens:
        cfg = Configs()
        routers = ROUTER_SWEEP_GEMV if tokens == 1 else ROUTER_SWEEP_DOT
        cfg = replace(cfg, router=bench.sweep("route", routers, tokens, (0.2,)))
        if tokens == 1:
            cfg = replace(cfg, fused=bench.sweep("fused", FUSED_SWEEP, tokens, (0.1, 0.2, 1.0)))
        cfg = replace(cfg, up=bench.sweep("up", UP_SWEEP, tokens, (0.1, 1.0)))
        cfg = replace(cfg, down=bench.sweep("down+reduce", DOWN_SWEEP, tokens, (0.1, 1.0)))
        for fused in [True, False] if tokens == 1 else [False]:
            final = [bench.check(tokens, 0.2, cfg, fused, pdl) for pdl in (0, 1, 2)]
            bench.result["checks"] += [check | {"fused": fused, "tuned": True} for check in final]
            if all(check["ok"] for check in final):
                bench.table(tokens, cfg, fused, (1.0, 0.5, 0.2, 0.1, 0.05), bandwidth)
            else:
                print(f"FAILED with the tuned tiles, T={tokens} fused={fused}: {final}; no times")
        os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
        with open(args.output, "w") as file:
            json.dump(bench.result, file, indent=1)


if __name__ == "__main__":
    main()
