"""The loss terms of training (arXiv 2605.28283, eq. 12-17), and the ranking loss of this project.

Every term is a float32 scalar of one layer; :class:`RouterTerms` computes them where the layer computes, so that
torch.compile fuses them with it, and :func:`mean_terms` averages them over layers. Padding counts nowhere.

What a term can move: the paper's three are functions of the router logits, so they reach the router and, through its
input, the layers below. Contribution and LTE's two reach the router alone: what the weights learn is the task, and near
the threshold the separation term is so steep that below it would drown the task. Selection has no gradient. Under the
gate "none" the task loss reaches no router at all; under "sigmoid" it does through the gates of active experts.

Shapes: B sequences, S tokens each, E experts, D neurons per expert, F = E * D, L layers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from prunepath_vllm.conversion.costs import log_costs
from prunepath_vllm.modeling.routing import kernel_boundary
from prunepath_vllm.training.targets import LayerCosts

TERMS = ("entropy", "balance", "gate", "contribution", "efficiency", "separation")
"""What a recipe can weigh, in the order of :attr:`RouterTerms.terms`; the last two are LTE's."""

EPS = 1e-8


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens: `values` [B, S, ...] to [...]; `mask` float32 [B, S], 0 at padding, None for no padding."""
    if mask is None:
        return values.mean(dim=(0, 1))
    weights = mask / mask.sum().clamp_min(1)
    return torch.einsum("bs...,bs->...", values, weights)


def entropy_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Eq. 12: L_ent = - mean over tokens of sum_j p_j log(p_j + eps), p = softmax(logits). Low: sharp per token.

    Args:
        logits: router logits, float32 [B, S, E].
        mask: float32 [B, S], 0 at padding.
    """
    p = logits.softmax(dim=-1)
    return masked_mean(-(p * (p + EPS).log()).sum(dim=-1), mask)


def balance_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Eq. 13: L_bal = E * sum_j (mean over tokens of p_j)^2. 1 where the batch uses all experts alike, E at worst.

    Args:
        logits: router logits, float32 [B, S, E].
        mask: float32 [B, S], 0 at padding.
    """
    return logits.shape[-1] * masked_mean(logits.softmax(dim=-1), mask).square().sum()


def gate_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Eq. 17: L_gate = mean over tokens and experts of sigmoid(logits).

    Args:
        logits: router logits, float32 [B, S, E].
        mask: float32 [B, S], 0 at padding.
    """
    return masked_mean(logits.sigmoid().mean(dim=-1), mask)


def contribution_shares(
    neurons: Tensor, column_norms: Tensor, num_experts: int, sharpness: Tensor | float = 1.0
) -> Tensor:
    """Each expert's share of the layer's squared contribution, as a target: no gradient.

    ||FFN_e(x)||^2 is taken as the sum over the expert's neurons of (neuron * norm of its output column)^2: the cross
    terms between the neurons of an expert are left out. On SmolLM2-135M these shares are within 0.005 nats (KL) of the
    exact ones, at expert sizes 8 and 32, and cost one pass over the neurons instead of a product with Gram matrices.

    Args:
        neurons: activations after the non-linearity, before routing, [..., F].
        column_norms: norm of each neuron's column of the second linear, [F]: Euclidean, or in another metric.
        num_experts: E.
        sharpness: power of the squared contributions whose shares count, float32 [].

    Returns:
        float32 [..., E], summing to 1.
    """
    with torch.no_grad():
        squares = (neurons.float() * column_norms.float()).square().unflatten(-1, (num_experts, -1)).sum(dim=-1)
        return (sharpness * log_costs(kernel_boundary(squares))).softmax(dim=-1)


def contribution_loss(logits: Tensor, shares: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of softmax(logits) to `shares` (ours, no counterpart in the paper). Teaches the ranking itself.

    Args:
        logits: router logits, float32 [B, S, E].
        shares: of :func:`contribution_shares`, float32 [B, S, E].
        mask: float32 [B, S], 0 at padding.
    """
    return masked_mean(-(shares * logits.log_softmax(dim=-1)).sum(dim=-1), mask)


def efficiency_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """LTE's efficiency loss (arXiv 2402.06126): mean over tokens and experts of G^2, G = sigmoid(logits).

    Args:
        logits: router logits, float32 [B, S, E].
        mask: float32 [B, S], 0 at padding.
    """
    return masked_mean(logits.sigmoid().square().mean(dim=-1), mask)


def separation_loss(logits: Tensor, threshold: float, mask: Tensor | None = None) -> Tensor:
    """LTE's separability loss: mean over tokens and experts of 1 / (G - threshold)^2, G = sigmoid(logits).

    Args:
        logits: router logits, float32 [B, S, E].
        threshold: delta.
        mask: float32 [B, S], 0 at padding.
    """
    # Not from the paper: at the threshold the term and its gradient are infinite. 1e-3 is a distance of 0.03.
    distance = (logits.sigmoid() - threshold).square().clamp_min(1e-3)
    return masked_mean((1 / distance).mean(dim=-1), mask)


class RouterTerms(nn.Module):
    """Computes one router's loss terms during the forward and keeps them until the trainer collects them.

    It holds no parameters. ``wanted`` says which terms are computed; the others are 0.
    """

    def __init__(self, num_experts: int, output_rows: Callable[[], Tensor], costs: LayerCosts | None = None) -> None:
        """Watch one layer.

        Args:
            num_experts: E.
            output_rows: gives the second linear as it is now, a row a neuron: [F, H].
            costs: how contributions are measured; None: by their squared norm.
        """
        super().__init__()
        self.wanted: frozenset[str] = frozenset()
        """Names out of :data:`TERMS`."""
        self.threshold = 0.5
        """LTE's delta."""
        self.num_experts = num_experts
        self.mask: Tensor | None = None
        """float32 [B, S], 0 at padding; set before each forward."""
        self.column_norms: Tensor | None = None
        self.metric: Tensor | None
        """M, float32 [H, H]: a column's squared norm is w' M w. None: Euclidean."""
        self.register_buffer("metric", costs.metric if costs else None, persistent=False)
        self.sharpness: Tensor  # a tensor, so that one compiled graph serves all layers
        self.register_buffer("sharpness", torch.tensor(costs.sharpness if costs else 1.0), persistent=False)
        self.terms: Tensor | None = None
        """float32 [len(TERMS)], with gradient, of the last forward."""
        self.usage: Tensor | None = None
        """float32 [E]: share of tokens that used each expert in the last forward."""
        self.spread: Tensor | None = None
        """float32 []: entropy of the routers' softmax in the last forward, without gradient."""
        self._output_rows = output_rows
        self.measured_late = False
        """Whether :meth:`measure` is called by the layer's forward: before it a sharded layer has no whole weights."""

    def prepare(self, mask: Tensor | None) -> None:
        """Before a forward: take its mask, and the output columns' norms as they are now."""
        self.mask = mask
        if not self.measured_late:
            self.measure()

    def measure(self) -> None:
        """Take the output columns' norms as they are now, where they are wanted."""
        if "contribution" in self.wanted:
            with torch.no_grad(), torch.autocast(self.sharpness.device.type, enabled=False):
                rows = self._output_rows().float()
                if self.metric is None:
                    self.column_norms = torch.linalg.vector_norm(rows, dim=1)
                else:
                    self.column_norms = ((rows @ self.metric) * rows).sum(dim=1).clamp_min(0).sqrt()

    def clear(self) -> None:
        """After a backward: let go of the graph."""
        self.terms = None

    def forward(self, logits: Tensor, active: Tensor, neurons: Tensor, own: Callable[[], Tensor]) -> None:
        """Called by the router.

        Args:
            logits: float32 [B, S, E].
            active: bool [B, S, E].
            neurons: [B, S, F], before routing.
            own: gives the logits again, their gradient ending in this router.
        """
        mask = self.mask
        zero = logits.new_zeros(())
        terms = [zero] * len(TERMS)
        if "entropy" in self.wanted:
            terms[0] = entropy_loss(logits, mask)
        if "balance" in self.wanted:
            terms[1] = balance_loss(logits, mask)
        if "gate" in self.wanted:
            terms[2] = gate_loss(logits, mask)
        if not self.wanted.isdisjoint(("contribution", "efficiency", "separation")):
            alone = own()
            if "contribution" in self.wanted:
                assert self.column_norms is not None
                shares = contribution_shares(neurons, self.column_norms, self.num_experts, self.sharpness)
                terms[3] = contribution_loss(alone, shares, mask)
            if "efficiency" in self.wanted:
                terms[4] = efficiency_loss(alone, mask)
            if "separation" in self.wanted:
                terms[5] = separation_loss(alone, self.threshold, mask)
        self.terms = torch.stack(terms)
        with torch.no_grad():
            self.usage = masked_mean(active.float(), mask)
            self.spread = entropy_loss(logits, mask)


def mean_terms(observers: Sequence[RouterTerms]) -> Tensor:
    """The terms of the last forward averaged over layers: float32 [len(TERMS)], with gradient."""
    return torch.stack([observer.terms for observer in observers if observer.terms is not None]).mean(dim=0)
