"""Plain PyTorch references of the routed feed-forward layer, written from the equations (arXiv 2605.28283, eq. 7-10).

Differentiable, any device and dtype; the transformers models compute with these, kernels are checked against them.
Shapes: T tokens, H hidden size, E experts, D neurons per expert, F = E * D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepath_vllm.tau import DENSE_TAU


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None, down: Tensor | None = None) -> Tensor:
    """Eq. 7: g = x W_r; with a low rank r, g = (x down^T) weight^T + bias, all in float32.

    Args:
        x: what the router reads, [..., H].
        weight: [E, H], or [E, r] with `down`.
        bias: [E] or None.
        down: [r, H] or None.

    Returns:
        float32 logits [..., E].
    """
    x = x.float()
    if down is not None:
        x = F.linear(x, down.float())
    return F.linear(x, weight.float(), None if bias is None else bias.float())


def select_cumulative_mass(logits: Tensor, tau: Tensor) -> Tensor:
    """Eq. 8-9: the top expert, and every expert whose cumulative probability down the ranking stays below tau.

    The expert that crosses tau is left out. Ties rank the lower expert index first. tau >= 1 takes every expert.

    Args:
        logits: float32 [..., E].
        tau: float32, broadcastable to [...].

    Returns:
        bool [..., E], True where the expert is active.
    """
    probabilities = logits.detach().softmax(dim=-1)
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    tau = tau.unsqueeze(-1)
    keep = ranked.cumsum(dim=-1) < tau
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter(-1, order, keep) | (tau >= DENSE_TAU)


def select_threshold(logits: Tensor, tau: Tensor, threshold: float) -> Tensor:
    """LTE's rule (arXiv 2402.06126): sigmoid(g_e) > threshold. tau >= 1 still takes every expert.

    Args:
        logits: float32 [..., E].
        tau: float32, broadcastable to [...].
        threshold: delta in (0, 1).

    Returns:
        bool [..., E]; a token may have no active expert at all.
    """
    return (logits.sigmoid() > threshold) | (tau >= DENSE_TAU).unsqueeze(-1)


def select_experts(logits: Tensor, tau: Tensor, *, selection: str, threshold: float | None) -> Tensor:
    """The active experts A of each token, by the checkpoint's selection rule.

    Args:
        logits: float32 [..., E].
        tau: float32, broadcastable to [...]; 0 marks a padding row, which has no active expert.
        selection: "cumulative_mass" or "threshold".
        threshold: LTE's delta, with "threshold".

    Returns:
        bool [..., E].
    """
    if selection == "threshold":
        assert threshold is not None
        active = select_threshold(logits, tau, threshold)
    else:
        active = select_cumulative_mass(logits, tau)
    return active & (tau > 0).unsqueeze(-1)


def gate_weights(logits: Tensor, active: Tensor, *, gate: str) -> Tensor:
    """What each expert's output is multiplied by: 0 where it is not active, else sigmoid(g_e) or 1 (eq. 10).

    Args:
        logits: float32 [..., E].
        active: bool [..., E].
        gate: "sigmoid" or "none".

    Returns:
        float32 [..., E]; differentiable in `logits` through the sigmoid gate only.
    """
    weights = active.to(logits.dtype)
    return weights * logits.sigmoid() if gate == "sigmoid" else weights


def expert_weights(logits: Tensor, tau: Tensor, *, selection: str, threshold: float | None, gate: str) -> Tensor:
    """:func:`select_experts`, then :func:`gate_weights`: float32 [..., E]."""
    active = select_experts(logits, tau, selection=selection, threshold=threshold)
    return gate_weights(logits, active, gate=gate)


def scale_neurons(neurons: Tensor, weights: Tensor) -> Tensor:
    """Multiply every neuron by its expert's weight.

    Args:
        neurons: activations after the non-linearity, [..., F].
        weights: [..., E].

    Returns:
        [..., F] in the dtype of `neurons`.
    """
    experts = neurons.unflatten(-1, (weights.shape[-1], -1))
    return (experts * weights.unsqueeze(-1).to(neurons.dtype)).flatten(-2)


def ffn_sparsity(active: Tensor) -> Tensor:
    """Eq. 15 for one layer: 1 - active experts / E, per token.

    Args:
        active: [..., E], non-zero where the expert is active: a mask, or weights without a gate so small that
            it is 0.

    Returns:
        float32 [...].
    """
    return 1 - (active != 0).float().mean(dim=-1)
