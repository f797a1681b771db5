"""Measures which path and tiles are fastest at each batch size and writes the table that ``ffn.load_tuning`` reads.

Every time is the median over CUDA-graph replays of one step through several layers with weights of their own (more
bytes than the L2 holds), divided by the layers. Between two layers runs what an engine has there, a normalisation and
projections, so that launch gaps and joined streams cost what they cost in an engine; its own time is taken off.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from prunepath_vllm.conversion.quantize import quantised_weights
from prunepath_vllm.conversion.rounding import quantise_weight
from prunepath_vllm.kernels import reference
from prunepath_vllm.kernels.common import shared_memory
from prunepath_vllm.kernels.decode import DownConfig, FusedConfig, UpConfig
from prunepath_vllm.kernels.dense import gated_activation
from prunepath_vllm.kernels.ffn import (
    PATHS,
    Choice,
    Tuning,
    heuristic_tuning,
    routed_ffn,
    shape_key,
    tuning_to_json,
)
from prunepath_vllm.kernels.float8 import quantise_tokens, quantises_activations
from prunepath_vllm.kernels.grouped import GroupedConfig
from prunepath_vllm.kernels.layer import Counters, LayerSpec, RouterWeights, RoutingRule, Weights, dtype_name
from prunepath_vllm.kernels.quantised import UNSCALED_TOKENS, float8_product, unscaled_product
from prunepath_vllm.kernels.routing import LIBRARY_TOKENS, RouterConfig

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 2048, 8192)
"""Batch sizes of a table."""

SWEEP_AT = (1, 2, 4, 8, 16, 64, 256, 2048, 8192)
"""Batch sizes whose tiles are searched; the next ones take them over."""

SHARES = (1.0, 0.5, 0.2, 0.1)
"""Active shares that tiles are searched for; the inputs route at random, the worst case for several tokens."""

ALIKE = 0.3
"""Correlation of two tokens' router logits at which a batch's union of experts is what real text was measured to have:
at a share of 0.21, 0.50 / 0.82 / 0.96 of the experts at 4 / 16 / 64 tokens (0.61 / 0.98 / 1.00 at random)."""

CASES = (*((share, 0.0) for share in SHARES), (0.2, ALIKE), (0.1, ALIKE))
"""(share, correlation) that a path is chosen for."""

MAX_SLOWDOWN = 1.04
"""A choice may take at most this many times the dense layer at any of the shares, where any choice does."""

TOO_LARGE = (triton.runtime.errors.OutOfResources, RuntimeError)
"""Raised by tiles that do not fit the GPU."""


@dataclass
class Layer:
    """One layer's weights, and what a dense engine would hold of it."""

    weights: Weights
    dense_in: tuple[Tensor, Tensor | None]
    """The first linear, and its scale per row where it is float8."""
    dense_out: tuple[Tensor, Tensor | None]
    """The second linear in the usual layout [H, F], likewise."""
    router: RouterWeights
    others: tuple[Tensor, Tensor]
    """Two [H, H] projections, for what an engine runs between two of these layers."""


def make_layer(spec: LayerSpec, seed: int) -> Layer:
    """Random weights; the router's logits have unit variance for inputs that do.

    Linears of a layer without a gate half have biases, as in the families that have such layers. The dense layer of a
    float8 one is in float8, where the GPU multiplies it; other quantised layers' are not quantised.
    """
    gen = torch.Generator("cuda").manual_seed(seed)

    def rand(*sizes: int, scale: float) -> Tensor:
        return torch.randn(*sizes, generator=gen, device="cuda", dtype=spec.dtype).mul_(scale)

    hidden, bias = spec.hidden, not spec.glu
    w_out_t = rand(spec.neurons, hidden, scale=0.02)
    weights = Weights(
        rand(spec.input_rows, hidden, scale=hidden**-0.5),
        rand(spec.input_rows, scale=0.1) if bias else None,
        w_out_t,
        rand(hidden, scale=0.1) if bias else None,
    )
    router = RouterWeights(rand(spec.num_experts, hidden, scale=hidden**-0.5))
    first, second = (rand(hidden, hidden, scale=0.02) for _ in range(2))
    dense_in: tuple[Tensor, Tensor | None] = weights.w_in, None
    dense_out: tuple[Tensor, Tensor | None] = w_out_t.t().contiguous(), None
    if spec.expert_dtype is not None:
        weights = quantised_weights(weights, dtype_name(spec.expert_dtype))
        if quantises_activations(replace(spec, quantise_activations=True), weights):
            dense_in = weights.w_in, weights.scale_in
            dense_out = quantise_weight(dense_out[0], 0, "float8_e4m3fn")
    return Layer(weights, dense_in, dense_out, router, (first, second))


def plain_dense(x: Tensor, layer: Layer, spec: LayerSpec) -> Tensor:
    """What a dense engine runs: two linears in their usual layouts around one activation kernel."""

    def linear(inputs: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        if scale is None:
            return F.linear(inputs, weight, bias)
        if len(inputs) > UNSCALED_TOKENS:
            return float8_product(inputs, weight, scale, bias)
        # The faster product, and its scales afterwards.
        values, token_scale = quantise_tokens(inputs)
        y = (unscaled_product(values, weight) * (token_scale * scale)).to(inputs.dtype)
        return y if bias is None else y + bias

    unscaled = replace(layer.weights, scale_in=None, scale_out=None)
    neurons = gated_activation(linear(x, *layer.dense_in, layer.weights.b_in), unscaled, spec)
    return linear(neurons, *layer.dense_out, layer.weights.b_out)


def between(x: Tensor, layer: Layer) -> Tensor:
    """What an engine runs between two of these layers, attention aside."""
    y = F.rms_norm(x, x.shape[1:])
    for weight in layer.others:
        y = F.linear(y, weight)
    return F.rms_norm(y, x.shape[1:])


def taus_for(x: Tensor, router: Tensor, active: int) -> Tensor:
    """Taus [T] at which each token keeps `active` experts, or a hundredth of all more or fewer.

    The number, of those around it, after which the next probability is the furthest: which of two nearly equal ones
    comes first is left to rounding, and among thousands of experts some are.
    """
    num_experts = router.shape[0]
    if active >= num_experts:
        return torch.ones(x.shape[0], device=x.device)
    p = reference.router_logits(x, router).double().softmax(-1).sort(dim=-1, descending=True).values
    around = num_experts // 100
    kept = torch.arange(max(1, active - around), min(num_experts - 1, active + around) + 1, device=x.device)
    kept = kept[(p[:, kept - 1] - p[:, kept]).argmax(dim=-1, keepdim=True)]
    mass = p.cumsum(-1)
    return ((mass.gather(-1, kept - 1) + mass.gather(-1, kept)) / 2).squeeze(-1).float()


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


ROUTER_ONE = [
    RouterConfig(e, 1, w, 4, select="pairwise", select_block_e=n)
    for e, w, n in [(4, 8, 2), (4, 8, 4), (4, 8, 8), (2, 4, 2)]
]
ROUTER_ONE += [RouterConfig(e, 1, w, sw, 3) for e, w, sw in [(4, 8, 8), (2, 4, 4), (4, 8, 16), (4, 8, 32)]]
ROUTER_SOME = [
    RouterConfig(4, s, 4, sw, b)
    for s, sw, b in [(4, 8, 3), (2, 8, 3), (7, 8, 3), (14, 8, 3), (7, 4, 3), (7, 4, 2), (7, 16, 3), (4, 32, 3)]
]
ROUTER_SOME += [RouterConfig(4, s, 4, 4, select="pairwise", select_block_e=n) for s, n in [(7, 4), (4, 4), (7, 16)]]
ROUTER_SOME += [RouterConfig(4, s, 4, 8, select="pairwise", select_block_e=32) for s in (2, 4)]
ROUTER_SOME += [
    RouterConfig(4, s, w, sw, b, tile_e=e)
    for e, s, w, sw, b in [(32, 4, 4, 8, 3), (64, 7, 4, 8, 3), (128, 4, 4, 8, 3), (128, 1, 8, 8, 1), (64, 2, 8, 4, 2)]
]
ROUTER_MANY = [RouterConfig(4, 1, 4, sw, b) for sw, b in [(1, 1), (2, 1), (1, 2), (4, 2), (4, 3)]]
FUSED = [
    FusedConfig(*c)
    for c in [(2, 16, 4, 1), (2, 16, 3, 1), (1, 16, 4, 1), (1, 16, 3, 2), (2, 8, 3, 2), (2, 8, 2, 2), (1, 4, 2, 4)]
]
FUSED_QUANTISED = [
    FusedConfig(*c) for c in [(4, 8, 3, 2), (4, 8, 2, 2), (4, 8, 3, 1), (2, 8, 3, 2), (8, 8, 2, 1), (4, 4, 2, 3)]
]
UP = [
    UpConfig(*c)
    for c in [
        (64, 64, 4, 6, 1), (64, 128, 4, 5, 1), (32, 128, 4, 4, 3), (32, 256, 4, 3, 1), (64, 128, 4, 3, 2),
        (16, 128, 4, 4, 3), (32, 64, 4, 6, 2),
    ]
]  # fmt: skip
DOWN = [
    DownConfig(*c)
    for c in [
        (128, 64, 9, 4, 7), (128, 32, 9, 4, 9), (128, 128, 9, 4, 5), (256, 64, 9, 8, 7), (128, 64, 5, 4, 9),
        (64, 128, 5, 4, 7),
    ]
]  # fmt: skip
UP_QUANTISED = [UpConfig(*c) for c in [(64, 128, 4, 4, 3), (64, 128, 4, 3, 3), (64, 256, 4, 3, 2), (128, 128, 8, 5, 2)]]
DOWN_QUANTISED = [
    DownConfig(*c) for c in [(256, 128, 9, 4, 5), (128, 128, 9, 4, 5), (128, 128, 9, 4, 3), (128, 64, 18, 4, 5)]
]
GROUPED = [
    GroupedConfig(*c)
    for c in [
        (128, 64, 4, 4, 8), (128, 64, 8, 4, 8), (256, 64, 8, 4, 8), (256, 64, 8, 3, 64), (128, 128, 4, 3, 8),
        (128, 64, 4, 3, 8), (128, 64, 4, 4, 64), (128, 64, 4, 4, 3), (64, 128, 4, 3, 8),
    ]
]  # fmt: skip


def paths_for(num_tokens: int) -> tuple[str, ...]:
    """Paths worth measuring at a batch size."""
    if num_tokens == 1:
        return ("fused", "split", "dense")
    if num_tokens <= LIBRARY_TOKENS:
        return ("split", "dense")
    return ("dense", "grouped") if num_tokens >= 1024 else ("dense",)


def variants(num_tokens: int, path: str, *, quantised: bool = False) -> Iterator[tuple[str, list[Any]]]:
    """The fields of a choice that matter on a path, and the values to try."""
    routers = ROUTER_ONE if num_tokens == 1 else ROUTER_SOME if num_tokens <= LIBRARY_TOKENS else ROUTER_MANY
    values: dict[str, list[Any]] = {
        "router": routers,
        "fused": FUSED_QUANTISED if quantised else FUSED,
        "up": [*UP, *UP_QUANTISED] if quantised else UP,
        "down": [*DOWN, *DOWN_QUANTISED] if quantised else DOWN,
        "grouped": GROUPED,
    }
    for name in reversed(PATHS[path]):
        yield name, values[name]
    if path in ("fused", "split"):
        yield "pdl", [0, 1, 2]


def start_choice(spec: LayerSpec, num_tokens: int, path: str) -> Choice:
    """Where the search on a path begins."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the interpreter
    tuning = heuristic_tuning(spec, shared_memory(device))
    found = tuning.choice({"fused": 1, "split": min(max(num_tokens, 2), 8), "dense": 256, "grouped": 8192}[path])
    if path == "dense" or (path == "split" and num_tokens == 1):
        found = replace(found, router=dict(variants(num_tokens, path))["router"][0])
    return replace(found, path=path)


class Bench:
    """One shape's layers and inputs."""

    def __init__(self, spec: LayerSpec, layers: int) -> None:
        self.spec = spec
        self.layers = [make_layer(spec, seed) for seed in range(layers)]
        self.sweeps: list[dict[str, Any]] = []
        self.broken: set[str] = set()
        """Paths to leave out: their results are wrong here."""
        self.between_us: dict[int, float] = {}
        """Microseconds of :func:`between` by batch size."""

    def inputs(self, num_tokens: int, share: float, alike: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
        """Per layer: tokens [T, H] and the taus at which each keeps `share` of the experts.

        alike: correlation of two tokens, and so of their router logits.
        """
        gen = torch.Generator("cuda").manual_seed(1 << 20 | num_tokens)  # no layer's seed: tokens would be its rows
        active = max(1, round(share * self.spec.num_experts))

        def rand(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=gen, device="cuda")

        hidden = self.spec.hidden
        xs = [
            (alike**0.5 * rand(1, hidden) + (1 - alike) ** 0.5 * rand(num_tokens, hidden)).to(self.spec.dtype)
            for _ in self.used(num_tokens)
        ]
        return xs, [taus_for(x, layer.router.weight, active) for x, layer in zip(xs, self.layers, strict=False)]

    def used(self, num_tokens: int) -> list[Layer]:
        """The layers a step runs through: two are enough where one takes milliseconds."""
        return self.layers if num_tokens < 1024 else self.layers[:2]

    def run(
        self, i: int, x: Tensor, tau: Tensor, choice: Choice, gate: str = "sigmoid", active_counts: Tensor | None = None
    ) -> Tensor:
        """Layer i by one choice."""
        layer, spec = self.layers[i], replace(self.spec, rule=RoutingRule(gate=gate))
        counters, tuning = Counters(active_counts), Tuning(((1, choice),))
        return routed_ffn(x, tau, layer.router, layer.weights, spec, tuning=tuning, counters=counters)

    def time(self, choice: Choice, data: tuple[list[Tensor], list[Tensor]], gate: str = "sigmoid") -> float:
        """Microseconds of a layer; infinite where the tiles do not fit."""
        xs, taus = data
        try:
            return self.time_between(xs, lambda i: self.run(i, xs[i], taus[i], choice, gate))
        except TOO_LARGE as error:
            if "out of resource" not in str(error) and "shared memory" not in str(error):
                raise
            return float("inf")
        finally:
            if xs[0].shape[0] >= 256:
                torch.cuda.empty_cache()

    def time_dense(self, num_tokens: int) -> float:
        """Microseconds of the dense layer."""
        xs, _ = self.inputs(num_tokens, 1.0)
        return self.time_between(xs, lambda i: plain_dense(xs[i], self.layers[i], self.spec))

    def time_between(self, xs: list[Tensor], step: Callable[[int], Tensor]) -> float:
        """Microseconds that `step` (layer index) adds to what an engine runs between its layers anyway."""
        size = xs[0].shape[0]
        if size not in self.between_us:
            self.between_us[size] = time_us(lambda i: between(xs[i], self.layers[i]), len(xs))
        both = time_us(lambda i: (between(xs[i], self.layers[i]), step(i)), len(xs))
        return both - self.between_us[size]

    def search(
        self, num_tokens: int, path: str, dense: float, begin: Choice | None = None, sweep: bool = True
    ) -> Choice:
        """The fastest choice on a path, one field at a time; first those that `dense` us seldom beats."""
        best = begin or start_choice(self.spec, num_tokens, path)
        data = [self.inputs(num_tokens, share) for share in SHARES]
        for name, values in variants(num_tokens, path, quantised=self.spec.expert_dtype is not None) if sweep else ():
            times = {}
            for value in dict.fromkeys([getattr(best, name), *values]):
                times[value] = [self.time(replace(best, **{name: value}), d) for d in data]
            least = [min(column) for column in zip(*times.values(), strict=True)]

            def rank(
                value: Any, times: dict[Any, list[float]] = times, least: list[float] = least
            ) -> tuple[bool, float]:
                slow = max(times[value]) > MAX_SLOWDOWN * dense
                return slow, sum(t / m for t, m in zip(times[value], least, strict=True))

            ranked = sorted(times.items(), key=lambda item: rank(item[0]))
            best = replace(best, **{name: ranked[0][0]})
            self.sweeps.append(dict(tokens=num_tokens, path=path, field=name, us=[[str(v), t] for v, t in ranked]))
        return best


def pick(times: dict[str, list[float]], dense: float) -> str:
    """The path with the least time in all, among those that are never slower than dense by more than MAX_SLOWDOWN.

    Args:
        times: for each path, its time in each of CASES.
        dense: the dense layer's time.
    """
    safe = {path: t for path, t in times.items() if max(t) <= MAX_SLOWDOWN * dense}
    # Nothing is: the one that loses least.
    return min(safe, key=lambda p: sum(safe[p])) if safe else min(times, key=lambda p: max(times[p]))


def precompile(spec: LayerSpec, num_tokens: int, choice: Choice) -> None:
    """Compile one choice's kernels into Triton's cache by running them."""
    layer = make_layer(spec, 0)
    x, tau = (
        torch.zeros(num_tokens, spec.hidden, dtype=spec.dtype, device="cuda"),
        torch.zeros(num_tokens, device="cuda"),
    )
    spec = replace(spec, rule=RoutingRule(gate="sigmoid"))
    with suppress(*TOO_LARGE):  # the search meets it again
        routed_ffn(x, tau, layer.router, layer.weights, spec, tuning=Tuning(((1, choice),)))


def precompile_all(spec: LayerSpec, tokens: tuple[int, ...], processes: int) -> None:
    """Compile what a search at these batch sizes will run, in several processes."""
    jobs: list[tuple[int, Choice]] = []
    for num_tokens in tokens:
        for path in paths_for(num_tokens):
            begin = start_choice(spec, num_tokens, path)
            jobs += [
                (num_tokens, replace(begin, **{name: value}))
                for name, values in variants(num_tokens, path, quantised=spec.expert_dtype is not None)
                for value in values
            ]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(precompile, [spec] * len(jobs), *zip(*jobs, strict=True), chunksize=2))


def tune_bench(
    bench: Bench,
    tokens: tuple[int, ...] = TOKENS,
    sweep_at: tuple[int, ...] = SWEEP_AT,
    report: Callable[[int, float, dict[str, Choice], dict[str, list[float]], str], None] | None = None,
    verify: Callable[[int, dict[str, Choice]], dict[str, Choice]] | None = None,
    deadline: float = float("inf"),
) -> Tuning:
    """The table of a shape: tiles are searched at some batch sizes and kept up to the next of them.

    Args:
        bench: the shape.
        tokens: batch sizes, ascending.
        sweep_at: those whose tiles are searched.
        report: told, for every batch size, the dense time, each path's choice, its times in CASES, and the best path.
        verify: given a batch size and each path's choice, returns those whose results are right; never none.
        deadline: the ``time.monotonic()`` after which no further batch size is begun.
    """
    known: dict[tuple[str, bool, bool], Choice] = {}
    chosen = []
    for num_tokens in tokens:
        if time.monotonic() > deadline:
            break
        dense = bench.time_dense(num_tokens)
        choices, times = {}, {}
        for path in paths_for(num_tokens):
            if path in bench.broken:
                continue
            key = path, num_tokens > 1, num_tokens > LIBRARY_TOKENS
            choices[path] = bench.search(num_tokens, path, dense, known.get(key), num_tokens in sweep_at)
            known[key] = choices[path]
        if verify:
            choices = verify(num_tokens, choices)
        for path, choice in choices.items():
            times[path] = [bench.time(choice, bench.inputs(num_tokens, *case)) for case in CASES]
        best = pick(times, dense)
        if report:
            report(num_tokens, dense, choices, times, best)
        chosen.append((num_tokens, choices[best]))
    return Tuning(tuple(chosen))


def write_table(path: str, spec: LayerSpec, tuning: Tuning) -> None:
    """Add a shape's table to a JSON file of one GPU's tables."""
    tables = {}
    if os.path.exists(path):
        with open(path) as file:
            tables = json.load(file)
    tables[shape_key(spec)] = tuning_to_json(tuning)
    with open(path, "w") as file:
        json.dump(tables, file, indent=1, sort_keys=True)
        file.write("\n")
