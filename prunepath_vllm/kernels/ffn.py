"""The routed feed-forward layer: one function that picks kernels by batch size from a table of tuned choices."""

import functools
import json
import os
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from prunepath_vllm.kernels.common import default_pdl
from prunepath_vllm.kernels.decode import (
    DownConfig,
    FusedConfig,
    UpConfig,
    down_partials,
    fused_partials,
    reduce_partials,
    up,
)
from prunepath_vllm.kernels.dense import dense_ffn, routed_dense_ffn
from prunepath_vllm.kernels.expand import expand_taus
from prunepath_vllm.kernels.grouped import GroupedConfig, grouped_ffn
from prunepath_vllm.kernels.routing import LIBRARY_TOKENS, RouterConfig, route
from prunepath_vllm.kernels.weights import Weights

__all__ = ["Choice", "Tuning", "expand_taus", "heuristic_tuning", "load_tuning", "routed_ffn", "tuning_for"]

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


@dataclass(frozen=True)
class Tuning:
    """Choices by batch size: ascending (largest number of tokens, choice) pairs; larger batches take the last."""

    choices: tuple[tuple[int, Choice], ...]

    def choice(self, num_tokens: int) -> Choice:
        """The choice for a batch of `num_tokens`."""
        return next((c for limit, c in self.choices if num_tokens <= limit), self.choices[-1][1])


def heuristic_tuning(hidden: int, expert_size: int, glu: bool, element_size: int = 2) -> Tuning:
    """Choices for a GPU or shape without a table: what was fastest on Qwen2-7B's shape, cut to fit shared memory."""
    rows = min(2, expert_size)
    step = rows * (3 if glu else 2) * triton.next_power_of_2(hidden) * element_size
    fused = FusedConfig(rows, 16, max(1, min(4, 196608 // step)), 1)
    wide = 1 if element_size == 2 else 2  # float32 tiles take twice the room
    small = UpConfig(64 // wide, 64, 4, 6 // wide, 1)
    down = DownConfig(128, 32, 9, 4, 9 // wide)
    one = RouterConfig(4, 1, 8, 4, select="pairwise", select_block_e=2)
    few = RouterConfig(4, 7, 4, 4, select="pairwise", select_block_e=4)
    grouped = GroupedConfig(128, 64, 4, 3, 8)
    return Tuning(
        (
            (1, Choice("fused", 1, one, fused=fused)),
            (4, Choice("split", 1, few, up=small, down=down)),
            (8, Choice("split", 1, RouterConfig(split_k=7), up=small, down=down)),
            (LIBRARY_TOKENS, Choice("dense", 0, RouterConfig(split_k=4))),
            (4095, Choice("dense", 0, RouterConfig(select_warps=1, select_bits=2))),
            (1 << 30, Choice("grouped", 0, RouterConfig(select_warps=2, select_bits=1), grouped=grouped)),
        )
    )


FLOAT32 = heuristic_tuning(8192, 32, True, 4)
"""Choices for float32 models, which tables are not made for. Grouped tiles would not fit."""
FLOAT32 = Tuning(FLOAT32.choices[:-1])

SMALL_LAYER = 200_000_000
"""Bytes of a layer's weights below which only a table of its own shape makes it sparse on a GPU: launches and selection
cost more there than the reads they save. On an H200 a layer of 407 MB (Qwen2-7B) gained, one of 83 MB lost."""


TUNING_DIR = "PRUNEPATH_TUNING_DIR"
"""Environment variable: a directory of tables made by ``prunepath bench tune``, looked into first."""


def shape_key(hidden: int, num_experts: int, expert_size: int, glu: bool) -> str:
    """A shape's name in a table."""
    return f"H{hidden}_E{num_experts}_D{expert_size}_{'glu' if glu else 'plain'}"


def table_name(gpu: str) -> str:
    """The file name of a GPU's table."""
    return gpu.lower().replace(" ", "_") + ".json"


@functools.cache
def load_tuning(gpu: str, hidden: int, num_experts: int, expert_size: int, glu: bool) -> Tuning:
    """The table of this GPU and shape, <gpu>.json in $PRUNEPATH_TUNING_DIR or as shipped, or else the heuristic.

    Args:
        gpu: ``torch.cuda.get_device_name()``.
    """
    folders = [resources.files("prunepath_vllm.kernels") / "configs"]
    if own := os.environ.get(TUNING_DIR):
        folders.insert(0, Path(own))
    for file in (folder / table_name(gpu) for folder in folders):
        tables = json.loads(file.read_text()) if file.is_file() else {}
        if rows := tables.get(shape_key(hidden, num_experts, expert_size, glu)):
            return tuning_from_json(rows)
    tuning = heuristic_tuning(hidden, expert_size, glu)
    if 2 * num_experts * expert_size * hidden * (3 if glu else 2) < SMALL_LAYER:
        return Tuning(tuple(row for row in tuning.choices if row[1].path == "dense"))
    return tuning


def tuning_for(dtype: torch.dtype, tuning: Tuning) -> Tuning:
    """The choices that layers of a dtype take, given those of :func:`load_tuning`."""
    return FLOAT32 if dtype == torch.float32 else tuning


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
    router_weight: Tensor,
    router_bias: Tensor | None,
    weights: Weights,
    *,
    selection: str,
    threshold: float | None,
    gate: str,
    tuning: Tuning,
    active_counts: Tensor | None = None,
    experts_read: Tensor | None = None,
    host_dense: bool = False,
) -> Tensor:
    """Eq. 7-10 for a batch whose tokens each have a tau.

    No host synchronisation and no control flow on tensor values: safe under CUDA graph capture. The number of tokens
    picks the kernels, so a captured size always takes the same ones.

    Args:
        x: [T, H] contiguous, bf16, fp16 or fp32; H divisible by 16.
        tau: float32 [T]; padding rows carry 0, which selects no expert.
        router_weight: [E, H].
        router_bias: [E] or None.
        weights: the layer's weights, :class:`Weights`.
        selection: "cumulative_mass" or "threshold".
        threshold: LTE's delta, with "threshold".
        gate: "sigmoid" or "none".
        tuning: from :func:`load_tuning`.
        active_counts: int32 [T] or None; each token's number of active experts is added to it.
        experts_read: int32 or int64 [1], or None; the number of experts whose weights the batch reads is added to it:
            those that some token uses, or all where a dense path computes them.
        host_dense: whether the host knows that every tau is >= 1; not to be set under graph capture.

    Returns:
        [T, H] in x's dtype.
    """
    if host_dense and gate == "none":
        if active_counts is not None:
            active_counts.add_(tau > 0, alpha=router_weight.shape[0])  # none at a padding row
        if experts_read is not None:
            experts_read.add_(router_weight.shape[0])
        return dense_ffn(x, weights)
    choice = (tuning_for(x.dtype, tuning) if x.is_cuda else tuning).choice(x.shape[0])
    rule: dict[str, Any] = dict(selection=selection, threshold=threshold, gate=gate, active_counts=active_counts)
    pdl = min(choice.pdl, 2 * default_pdl(x.device))
    find_routing = functools.partial(route, x, tau, router_weight, router_bias, **rule, config=choice.router)
    if choice.path == "dense" or host_dense:
        return routed_dense_ffn(x, weights, lambda: find_routing(want_flags=False, pdl=0).gates, experts_read)
    if choice.path == "grouped":
        return grouped_ffn(x, weights, find_routing(want_flags=False, pdl=0), choice.grouped, experts_read)
    routing = find_routing(pdl=pdl)
    if choice.path == "fused":
        partial = fused_partials(x, weights, routing, choice.fused, pdl, experts_read)
    else:
        neurons, experts = up(x, weights, routing, choice.up, pdl, experts_read)
        partial = down_partials(neurons, experts, weights, choice.down, pdl)
    return reduce_partials(partial, weights.b_out, x.dtype, pdl)
