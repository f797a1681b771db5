"""The routed feed-forward layer: one function that picks kernels by batch size from a table of tuned choices."""

import functools
import json
import os
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from prunepath_vllm.errors import ConfigError
from prunepath_vllm.kernels.common import AMPLE_SHARED_MEMORY, default_pdl, shared_memory, stages_that_fit
from prunepath_vllm.kernels.decode import (
    DownConfig,
    FusedConfig,
    UpConfig,
    block_t,
    down_partials,
    fused_partials,
    reduce_partials,
    up,
)
from prunepath_vllm.kernels.dense import beside_main_stream, dense_ffn, join_side_stream, routed_dense_ffn
from prunepath_vllm.kernels.expand import expand_taus
from prunepath_vllm.kernels.float8 import quantise_tokens
from prunepath_vllm.kernels.grouped import GroupedConfig, grouped_ffn
from prunepath_vllm.kernels.layer import NO_COUNTERS, Counters, LayerSpec, RouterWeights, Weights, dtype_name
from prunepath_vllm.kernels.quantised import WIDENED_TOKENS, float8_inputs
from prunepath_vllm.kernels.routing import LIBRARY_TOKENS, RouterConfig, Routing, list_experts, route

__all__ = [
    "Choice", "OutOfResources", "Routing", "Tuning", "expand_taus", "float8_inputs", "heuristic_tuning", "load_tuning",
    "route_ahead", "routed_ffn", "tuning_for", "warm_up_tokens",
]  # fmt: skip

PATHS = {
    "fused": ("router", "fused"),
    "split": ("router", "up", "down"),
    "dense": ("router",),
    "grouped": ("router", "grouped"),
}
"""The ways to compute the layer, and the kernels each uses (fields of :class:`Choice`)."""


@dataclass(frozen=True)
class Choice:
    """How batches of up to some number of tokens are computed.

    Attributes:
        path: "fused" (one token), "split" (up and down kernels), "dense" (every expert, multiplied by its
            gate) or "grouped" (tokens gathered by expert).
        pdl: mode of programmatic dependent launch (``common.wait_for_previous``), where the GPU has it.
        router, fused, up, down, grouped: tile choices of the kernels.
    """

    path: str
    pdl: int = 0
    router: RouterConfig = field(default_factory=RouterConfig)
    fused: FusedConfig = field(default_factory=FusedConfig)
    up: UpConfig = field(default_factory=UpConfig)
    down: DownConfig = field(default_factory=DownConfig)
    grouped: GroupedConfig = field(default_factory=GroupedConfig)

    @property
    def reads_every_expert(self) -> bool:
        """Whether the weights of all experts are read, whatever the tokens chose."""
        return self.path in ("dense", "grouped")


@dataclass(frozen=True)
class Tuning:
    """Choices by batch size: ascending (largest number of tokens, choice) pairs; larger batches take the last."""

    choices: tuple[tuple[int, Choice], ...]

    def choice(self, num_tokens: int) -> Choice:
        """The choice for a batch of `num_tokens`."""
        return next((c for limit, c in self.choices if num_tokens <= limit), self.choices[-1][1])


GROUPED = range(32, 65)
"""Neurons of an expert for which large batches are grouped. The path's tiles are all of an expert's neurons wide: with
fewer they leave tensor cores idle (Qwen2-7B on an H200, experts of 8, 8,192 tokens, half active: .56x of dense), with
more they do not fit a multiprocessor."""


PAIRWISE_UP_TO = 1024
"""Experts up to which comparing every expert with all others is the faster selection for a few tokens; for one token
four times as many."""


SPARSE_FROM = 32
"""Neurons of an expert from which batches of 2 to 8 tokens read the chosen experts alone. Smaller ones, at half of the
experts, take longer than every expert: on an H200, 4 tokens, .85x to .96x of dense with experts of 8 and 16 (Llama-3-8B
and Qwen2.5-32B), .76x with 4 (Qwen2-7B)."""


def heuristic_tuning(spec: LayerSpec, room: int = AMPLE_SHARED_MEMORY) -> Tuning:
    """Choices for a GPU or shape without a table: what was fastest on Qwen2-7B's shape, cut to fit shared memory.

    Args:
        spec: the layer.
        room: ``common.shared_memory`` of the GPU. From an A100's on choices do not depend on it.
    """
    element_size = spec.dtype.itemsize
    row = (3 if spec.glu else 2) * triton.next_power_of_2(spec.hidden)
    fused = FusedConfig(2, 16, max(1, min(4, 196608 // (2 * row * element_size))), 1)
    if spec.expert_dtype is not None:
        # Widening takes instructions: two programs a multiprocessor, one computing while the other waits.
        rows = 4 if 8 * row <= 98304 else 2
        fused = FusedConfig(rows, 8, max(1, min(3, 98304 // (rows * row))), 2)
    wide = 1 if element_size == 2 else 2  # float32 tiles take twice the room
    small = UpConfig(64 // wide, 64, 4, 6 // wide, 1)
    down = DownConfig(128, 32, 9, 4, 9 // wide)
    one = RouterConfig(4, 1, 8, 4, select="pairwise", select_block_e=2)
    few = RouterConfig(4, 7, 4, 4, select="pairwise", select_block_e=4)
    if spec.num_experts > PAIRWISE_UP_TO:
        few = RouterConfig(4, 7, 4, 16)
        # Of more than 2,048 eight at once do not fit the registers.
        one = replace(one, select_block_e=8 if spec.num_experts <= 2 * PAIRWISE_UP_TO else 4)
        if spec.num_experts > 4 * PAIRWISE_UP_TO:
            one = RouterConfig(4, 1, 8, 16)
    grouped = GroupedConfig(128, 64, 4, 3, 8)
    fused, small, down, grouped = cut_to_fit(spec, room, fused, small, down, grouped)
    choices = (
        (1, Choice("fused", 1, one, fused=fused)),
        (4, Choice("split", 1, few, up=small, down=down)),
        (8, Choice("split", 1, RouterConfig(split_k=7), up=small, down=down)),
        (LIBRARY_TOKENS, Choice("dense", 0, RouterConfig(split_k=4, tile_e=32))),
        (4095, Choice("dense", 0, RouterConfig(select_warps=1, select_bits=2))),
        (1 << 30, Choice("grouped", 0, RouterConfig(select_warps=2, select_bits=1), grouped=grouped)),
    )
    fits = spec.dtype != torch.float32 and spec.expert_size in GROUPED
    return Tuning(choices if fits else choices[:-1])


def cut_to_fit(
    spec: LayerSpec, room: int, fused: FusedConfig, up: UpConfig, down: DownConfig, grouped: GroupedConfig
) -> tuple[FusedConfig, UpConfig, DownConfig, GroupedConfig]:
    """The heuristic's tiles with as many stages as `room` bytes of shared memory hold: those of up to 8 tokens."""
    stored, inputs = (spec.expert_dtype or spec.dtype).itemsize, spec.dtype.itemsize
    matrices = 2 if spec.glu else 1
    width = triton.next_power_of_2(spec.hidden)
    fused_bytes = (matrices + 1) * width * fused.rows * stored
    # Where warps share a row with others, they add up through shared memory.
    sums = 4 * width * fused.rows if width * stored < 32 * 16 * fused.num_warps else 0
    # Programs that share a multiprocessor share its memory; else the second would wait for the first to end.
    fused_stages = stages_that_fit(fused.num_stages, fused_bytes, room // fused.programs_per_sm - sums)
    up_bytes = (matrices * up.rows * stored + block_t(8) * inputs) * up.block_k
    down_bytes = (down.block_h * stored + block_t(8) * inputs) * down.block_k
    down_stages = 2 * stages_that_fit((down.num_stages + 1) // 2, down_bytes, room)  # half of them hold rows
    columns = matrices * triton.next_power_of_2(spec.expert_size)
    grouped_bytes = (columns * stored + grouped.block_m * inputs) * grouped.block_k
    return (
        replace(fused, num_stages=fused_stages),
        replace(up, num_stages=stages_that_fit(up.num_stages, up_bytes, room)),
        replace(down, num_stages=min(down.num_stages, down_stages)),
        replace(grouped, num_stages=stages_that_fit(grouped.num_stages, grouped_bytes, room)),
    )


SMALL_LAYER = 200_000_000
"""Bytes of a layer's weights below which only a table of its own shape makes it sparse on a GPU: launches and selection
cost more there than the reads they save. On an H200 a layer of 407 MB (Qwen2-7B) gained, one of 83 MB lost."""


TUNING_DIR = "PRUNEPATH_TUNING_DIR"
"""Environment variable: a directory of tables made by ``prunepath bench tune``, looked into first."""


def shape_key(spec: LayerSpec) -> str:
    """A layer's name in a table: its shape and dtype, and that of quantised weights."""
    kind = "glu" if spec.glu else "plain"
    dtypes = "_".join(dtype_name(dtype) for dtype in (spec.dtype, spec.expert_dtype) if dtype is not None)
    return f"H{spec.hidden}_E{spec.num_experts}_D{spec.expert_size}_{kind}_{dtypes}"


def table_name(gpu: str) -> str:
    """The file name of a GPU's table."""
    return gpu.lower().replace(" ", "_") + ".json"


def tuning_for(device: torch.device, spec: LayerSpec) -> Tuning:
    """The choices for a layer on a CUDA device: :func:`load_tuning`."""
    return load_tuning(torch.cuda.get_device_name(device), spec, shared_memory(device))


@functools.cache
def load_tuning(gpu: str, spec: LayerSpec, room: int = AMPLE_SHARED_MEMORY) -> Tuning:
    """The table of this GPU and layer, <gpu>.json in $PRUNEPATH_TUNING_DIR or as shipped, or else the heuristic.

    A float16 layer without a table of its own takes bfloat16's: it reads as many bytes. float32, which no table is made
    for, is for checking results and has the same paths at any size.

    Args:
        gpu: ``torch.cuda.get_device_name()``.
        spec: the layer.
        room: of :func:`heuristic_tuning`. A table is taken as it is: its choices ran on such a GPU.
    """
    on_host = spec.resident is not None
    spec = replace(spec, kept=None, resident=None)  # all layers of a model alike, however many experts each keeps
    if spec.dtype == torch.float32:
        return heuristic_tuning(spec, room)
    keys = [shape_key(spec), shape_key(replace(spec, dtype=torch.bfloat16))]
    folders = [resources.files("prunepath_vllm.kernels") / "configs"]
    if own := os.environ.get(TUNING_DIR):
        folders.insert(0, Path(own))
    for file in (folder / table_name(gpu) for folder in folders):
        tables = json.loads(file.read_text()) if file.is_file() else {}
        if rows := next((tables[key] for key in keys if key in tables), None):
            return tuning_from_json(rows)
        if old := next((key for key in tables if key.endswith(("_glu", "_plain"))), None):
            raise ConfigError(
                f"{file}: {old}: a table without a dtype in its name; expected one made by this version's bench tune"
            )
    tuning = heuristic_tuning(spec, room)
    if on_host:  # what is not read there is what counts
        return tuning
    if spec.weight_bytes < SMALL_LAYER:
        return Tuning(tuple(row for row in tuning.choices if row[1].path == "dense"))
    if spec.expert_size < SPARSE_FROM:
        return Tuning(tuple(row for row in tuning.choices if row[1].path != "split"))
    return tuning


def tuning_from_json(rows: list[dict[str, Any]]) -> Tuning:
    """The inverse of :func:`tuning_to_json`."""
    parts = {
        "router": RouterConfig,
        "fused": FusedConfig,
        "up": UpConfig,
        "down": DownConfig,
        "grouped": GroupedConfig,
    }
    choices = []
    for row in rows:
        assert row["path"] in PATHS, f"unknown path {row['path']!r}; expected one of {', '.join(PATHS)}"
        configs = {name: parts[name](**row[name]) for name in PATHS[row["path"]]}
        choices.append((row["max_tokens"], Choice(row["path"], row["pdl"], **configs)))
    return Tuning(tuple(choices))


def tuning_to_json(tuning: Tuning) -> list[dict[str, Any]]:
    """A list of {max_tokens, path, pdl, and the tile choices of that path's kernels}."""
    return [
        {"max_tokens": limit, "path": c.path, "pdl": c.pdl} | {name: asdict(getattr(c, name)) for name in PATHS[c.path]}
        for limit, c in tuning.choices
    ]


def routed_ffn(
    x: Tensor,
    tau: Tensor,
    router: RouterWeights,
    weights: Weights,
    spec: LayerSpec,
    *,
    tuning: Tuning,
    router_input: Tensor | None = None,
    routing: Routing | None = None,
    counters: Counters = NO_COUNTERS,
    host_dense: bool = False,
) -> Tensor:
    """Eq. 7-10 for a batch whose tokens each have a tau.

    No host synchronisation and no control flow on tensor values: safe under CUDA graph capture. The number of tokens
    picks the kernels, so a captured size always takes the same ones.

    Args:
        x: [T, H] contiguous, in the layer's dtype.
        tau: float32 [T]; padding rows carry 0, which selects no expert.
        router, weights, spec: the layer.
        tuning: from :func:`load_tuning`.
        router_input: [T, H] contiguous, in the layer's dtype; what the router reads, or None for `x`.
        routing: from :func:`route_ahead`, or None for routing here.
        counters: what the call adds to.
        host_dense: whether the host knows that every tau is >= 1; not to be set under graph capture.

    Returns:
        [T, H] in x's dtype.

    Raises:
        ConfigError: a tensor that is not this layer's.
    """
    spec.check(x, tau, router, weights, router_input)
    spec, kept = spec.routed, spec.kept
    read = counters.read
    choice = tuning.choice(x.shape[0])
    if spec.resident is not None and read is not None and (host_dense or choice.reads_every_expert):
        read[1:].add_(spec.num_experts - spec.resident)
    every = spec.at_least and choice.path == "dense"
    if every and spec.rule.gate == "none":
        return dense_ffn(x, weights, spec, experts_read=read, tau=tau, active_counts=counters.active)
    if host_dense and spec.rule.gate == "none":
        if counters.active is not None:
            counters.active.add_(tau > 0, alpha=spec.num_experts)  # none at a padding row
        if read is not None:
            read[:1].add_(spec.num_experts)
        return dense_ffn(x, weights, spec)
    pdl = min(choice.pdl, 2 * default_pdl(x.device))
    routed = x if router_input is None else router_input
    find_routing = functools.partial(
        route, routed, tau, router, spec.rule, config=choice.router, active_counts=counters.active, kept=kept
    )
    if choice.path == "dense" or host_dense:
        gates = functools.partial(find_routing, want_flags=False, every=every, pdl=0)
        return routed_dense_ffn(x, weights, spec, lambda: gates().gates, read)
    if choice.path == "grouped":
        return grouped_ffn(x, weights, find_routing(want_flags=False, pdl=0), spec, choice.grouped, read)
    inputs, x_scale = x, None
    if float8_inputs(spec, weights, x.shape[0], choice.path).first:
        # Before the routing, whose kernels wait for one another: between it and the product it would add to both.
        inputs, x_scale = quantise_tokens(x)
    if routing is None:
        routing = find_routing(pdl=pdl)
    else:
        join_side_stream(x.device)
        read = None  # counted with the list
    if choice.path == "fused":
        partial = fused_partials(x, weights, routing, spec, choice.fused, pdl, read)
    else:
        neurons, experts = up(inputs, weights, routing, spec, choice.up, pdl, read, x_scale)
        partial = down_partials(neurons, experts, weights, spec, choice.down, pdl)
    return reduce_partials(partial, weights.b_out, x.dtype, pdl)


def route_ahead(
    router_input: Tensor,
    tau: Tensor,
    router: RouterWeights,
    spec: LayerSpec,
    *,
    tuning: Tuning,
    counters: Counters = NO_COUNTERS,
    host_dense: bool = False,
) -> Routing | None:
    """The routing of a later :func:`routed_ffn` of as many tokens, found on a second stream.

    What the caller launches meanwhile, an attention say, runs beside it; ``routed_ffn`` waits for it. Between the two
    calls no other layer may be routed. The arguments are those of ``routed_ffn``, which counts what this does not.

    Returns:
        None where ``routed_ffn`` needs no list of experts and routes beside its first product, which costs less than
        beside an attention (Qwen2-7B on an H200, 16 tokens: 4 us a layer against 12).
    """
    choice = tuning.choice(router_input.shape[0])
    if host_dense or choice.path not in ("fused", "split"):
        return None
    with beside_main_stream(router_input.device):
        routing = route(
            router_input, tau, router, spec.rule, config=choice.router, active_counts=counters.active, kept=spec.kept,
            pdl=0,
        )  # fmt: skip
        return list_experts(routing, counters.read, spec.resident)


def warm_up_tokens(tuning: Tuning, max_tokens: int) -> list[int]:
    """Batch sizes that between them compile every kernel of every batch size up to `max_tokens`.

    A kernel is compiled again where the choice changes, where a tile of tokens grows to the next power of two (those of
    quantised weights' dense products do up to WIDENED_TOKENS), and where the logits go to the library.
    """
    starts = {1, 2, LIBRARY_TOKENS + 1, max_tokens, *(2**power + 1 for power in range(4, WIDENED_TOKENS.bit_length()))}
    starts |= {limit + 1 for limit, _ in tuning.choices}
    return sorted(size for size in starts if size <= max_tokens)
