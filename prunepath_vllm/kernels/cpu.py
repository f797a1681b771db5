"""The routed feed-forward layer on a CPU: touched experts are gathered, or the packed dense product is masked.

Shapes: T tokens, H hidden size, E experts, D neurons per expert, F = E * D; weights in the layout of ``Weights``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepath_vllm.kernels.reference import expert_weights, router_logits, scale_neurons
from prunepath_vllm.kernels.weights import Weights
from prunepath_vllm.tau import DENSE_TAU

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""transformers' names of the activations."""

GATHER_BELOW = 0.35
"""Gather where the step touches less than this share of the experts. Measured on two cores, bf16, SmolLM2's shape: a
packed dense layer takes as long as gathering 0.4 of it at one token, more at sixteen."""


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
    dense_in: Callable[[Tensor], Tensor] | None = None,
    dense_out: Callable[[Tensor], Tensor] | None = None,
    gather: bool = True,
    active_counts: Tensor | None = None,
    experts_read: Tensor | None = None,
) -> Tensor:
    """Eq. 7-10 in PyTorch: route every token, run its experts, add the output bias once.

    Args:
        x: [T, H].
        tau: float32 [T].
        router_weight: [E, H].
        router_bias: [E] or None.
        weights: the layer's weights.
        selection: "cumulative_mass" or "threshold".
        threshold: LTE's delta, with "threshold".
        gate: "sigmoid" or "none".
        dense_in: a faster x -> x @ w_in.T + b_in, e.g. over packed weights.
        dense_out: a faster h -> h @ w_out_t.
        gather: look at the values to skip what they allow; False never reads a value on the host, so that the function
            may be captured in a CUDA graph.
        active_counts: int32 [T] or None; each token's number of active experts is added to it.
        experts_read: int32 or int64 [1], or None; the number of experts whose weights are read is added to it.

    Returns:
        [T, H] in the dtype of `x`.
    """
    scale: Tensor | None = None
    if gate != "none" or not gather or not bool((tau >= DENSE_TAU).all()):
        logits = router_logits(x, router_weight, router_bias)
        scale = expert_weights(logits, tau, selection=selection, threshold=threshold, gate=gate)
        active = scale != 0
        if active_counts is not None:
            active_counts += active.sum(dim=1, dtype=torch.int32)
        if gather:
            touched = active.any(dim=0).nonzero().squeeze(-1)
            if touched.numel() < GATHER_BELOW * scale.shape[1]:
                if experts_read is not None:
                    experts_read += touched.numel()
                if touched.numel() == 0:  # threshold selection may choose nothing
                    return _add_bias(torch.zeros_like(x), weights.b_out)
                return _add_bias(_gathered(x, scale, touched, weights), weights.b_out)
    elif active_counts is not None:
        active_counts += router_weight.shape[0]
    if experts_read is not None:
        experts_read += router_weight.shape[0]

    pre = F.linear(x, weights.w_in, weights.b_in) if dense_in is None else dense_in(x)
    h = _neurons(pre, weights)
    if scale is not None:
        h = scale_neurons(h, scale)
    return _add_bias(h @ weights.w_out_t if dense_out is None else dense_out(h), weights.b_out)


def _gathered(x: Tensor, scale: Tensor, experts: Tensor, weights: Weights) -> Tensor:
    """The layer over `experts` (int64 ids) alone: no other expert's weights are read."""
    num_experts, hidden = scale.shape[1], x.shape[-1]
    shape = (-1, num_experts, weights.w_out_t.shape[0] // num_experts)
    rows = weights.w_in.view(*shape, hidden).index_select(1, experts).view(-1, hidden)
    bias = None if weights.b_in is None else weights.b_in.view(shape).index_select(1, experts).view(-1)
    h = scale_neurons(_neurons(F.linear(x, rows, bias), weights), scale[:, experts])
    return h @ weights.w_out_t.view(*shape[1:], hidden).index_select(0, experts).view(-1, hidden)


def _neurons(pre: Tensor, weights: Weights) -> Tensor:
    act = ACTIVATIONS[weights.activation]
    if not weights.glu:
        return act(pre)
    gate, up = pre.chunk(2, dim=-1)
    return act(gate) * up


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias
