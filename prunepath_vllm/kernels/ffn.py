"""The routed feed-forward layer: one function that picks kernels by batch size from a table of tuned choices."""

import functools
import json
from dataclasses import dataclass, field
from importlib import resources

from torch import Tensor

from prunepath_vllm.kernels.decode import (
    DownConfig,
    FusedConfig,
    UpConfig,
    down_partials,
    fused_partials,
    reduce_partials,
    up,
)
from prunepath_vllm.kernels.dense import dense_ffn
from prunepath_vllm.kernels.routing import RouterConfig, route
from prunepath_vllm.kernels.weights import Weights


@dataclass(frozen=True)
class Choice:
    """How batches of up to some number of tokens are computed.

    Attributes:
        path: "fused" (one token), "split" (up and down kernels) or "dense" (every expert, multiplied by its gate).
        router, fused, up, down: tile choices of the kernels on that path.
    """

    path: str
    router: RouterConfig = field(default_factory=RouterConfig)
    fused: FusedConfig = field(default_factory=FusedConfig)
    up: UpConfig = field(default_factory=UpConfig)
    down: DownConfig = field(default_factory=DownConfig)


@dataclass(frozen=True)
class Tuning:
    """Choices by batch size: ascending (largest number of tokens, choice) pairs; larger batches take the last."""

    choices: tuple[tuple[int, Choice], ...]

    def choice(self, num_tokens: int) -> Choice:
        """The choice for a batch of `num_tokens`."""
        return next((c for limit, c in self.choices if num_tokens <= limit), self.choices[-1][1])


def heuristic_tuning() -> Tuning:
    """Choices for a GPU or shape without a table."""
    several = RouterConfig(split_k=4)
    return Tuning(
        (
            (1, Choice("fused")),
            (16, Choice("split", router=several)),
            (64, Choice("split", router=several, up=UpConfig(rows=64, block_k=64))),
            (65, Choice("dense", router=several)),
        )
    )


@functools.cache
def load_tuning(gpu: str, hidden: int, num_experts: int, expert_size: int, glu: bool) -> Tuning:
    """The shipped table of this GPU and shape (kernels/configs/<gpu>.json), or the heuristic.

    Args:
        gpu: ``torch.cuda.get_device_name()``.
    """
    file = resources.files("prunepath_vllm.kernels") / "configs" / f"{gpu.replace(' ', '_')}.json"
    if not file.is_file():
        return heuristic_tuning()
    rows = json.loads(file.read_text()).get(f"H{hidden}_E{num_experts}_D{expert_size}_{'glu' if glu else 'plain'}")
    if rows is None:
        return heuristic_tuning()
    parts = {"router": RouterConfig, "fused": FusedConfig, "up": UpConfig, "down": DownConfig}
    return Tuning(
        tuple(
            (row["tokens"], Choice(row["path"], **{k: parts[k](**v) for k, v in row.items() if k in parts}))
            for row in rows
        )
    )


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
) -> Tensor:
    """Eq. 7-10 for a batch whose tokens each have a tau.

    No host synchronisation and no control flow on tensor values: safe under CUDA graph capture. The number of tokens
    picks the kernels, so a captured size always takes the same ones.

    Args:
        x: [T, H] contiguous, bf16, fp16 or fp32; H divisible by 16.
        tau: float32 [T]; padding rows carry a tiny one, which selects a single expert.
        router_weight: [E, H].
        router_bias: [E] or None.
        weights: the layer's weights, :class:`Weights`.
        selection: "cumulative_mass" or "threshold".
        threshold: LTE's delta, with "threshold".
        gate: "sigmoid" or "none".
        tuning: from :func:`load_tuning`.
        active_counts: int32 [T] or None; each token's number of active experts is added to it.

    Returns:
        [T, H] in x's dtype.
    """
    choice = tuning.choice(x.shape[0])
    routing = route(
        x, tau, router_weight, router_bias, selection=selection, threshold=threshold, gate=gate,
        config=choice.router, active_counts=active_counts,
    )  # fmt: skip
    if choice.path == "dense":
        return dense_ffn(x, weights, routing.gates)
    if choice.path == "fused":
        partial = fused_partials(x, weights, routing, choice.fused)
    else:
        neurons, experts = up(x, weights, routing, choice.up)
        partial = down_partials(neurons, experts, weights, choice.down)
    return reduce_partials(partial, weights.b_out, x.dtype)
