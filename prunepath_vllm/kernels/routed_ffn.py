"""The routed feed-forward layer over experts-major weights: one function, dispatched by device.

Shapes: T tokens, H hidden size, E experts, D neurons per expert, F = E * D. Weight layout: `w_in` [F, H], GLU families
[2F, H] with all gate rows above all up rows; `w_out` [F, H], the second linear transposed, so that an expert is a
contiguous run of rows in every operand.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepath_vllm.kernels.reference import expert_weights, router_logits, scale_neurons
from prunepath_vllm.tau import DENSE_TAU

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""transformers' names of the activations that the kernels know."""

GATHER_BELOW = 0.35
"""CPU: gather the experts' weights where the step touches less than this share of them; measured in
docs/performance.md, against a packed dense product."""


def routed_ffn(
    x: Tensor,
    tau: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    activation: str,
    glu: bool,
    selection: str,
    threshold: float,
    gate: str,
    dense_in: Callable[[Tensor], Tensor] | None = None,
    dense_out: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Eq. 7-10: route every token, run its experts, add the output bias once.

    Args:
        x: [T, H].
        tau: float32 [T].
        router_weight: [E, H].
        router_bias: [E] or None.
        w_in, b_in, w_out, b_out: see the module's layout; biases may be None.
        activation: a key of ``ACTIVATIONS``.
        glu: whether `w_in` holds gate and up rows.
        selection: "cumulative_mass" or "threshold".
        threshold: LTE's delta, read under "threshold".
        gate: "sigmoid" or "none".
        dense_in: CPU only, a faster x -> x @ w_in.T + b_in, e.g. over packed weights.
        dense_out: CPU only, a faster h -> h @ w_out.

    Returns:
        [T, H] in the dtype of `x`.
    """
    act = ACTIVATIONS[activation]

    def neurons(rows: Tensor) -> Tensor:
        if not glu:
            return act(rows)
        gate_rows, up_rows = rows.chunk(2, dim=-1)
        return act(gate_rows) * up_rows

    weights: Tensor | None = None
    if gate != "none" or not bool((tau >= DENSE_TAU).all()):
        logits = router_logits(x, router_weight, router_bias)
        weights = expert_weights(logits, tau, selection=selection, threshold=threshold, gate=gate)
        touched = (weights != 0).any(dim=0).nonzero().squeeze(-1)
        if touched.numel() < GATHER_BELOW * weights.shape[1]:
            y = _gathered(x, weights[:, touched], touched, w_in, b_in, w_out, neurons, num_experts=weights.shape[1])
            return y if b_out is None else y + b_out

    h = neurons(F.linear(x, w_in, b_in) if dense_in is None else dense_in(x))
    if weights is not None:
        h = scale_neurons(h, weights)
    if dense_out is not None:
        y = dense_out(h)
        return y if b_out is None else y + b_out
    return h @ w_out if b_out is None else torch.addmm(b_out, h, w_out)


def _gathered(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    neurons: Callable[[Tensor], Tensor],
    *,
    num_experts: int,
) -> Tensor:
    """The layer over the touched experts alone; no other expert's weights are read.

    Args:
        weights: [T, len(experts)].
        experts: int64 expert ids, ascending.
    """
    hidden = x.shape[-1]
    size = w_out.shape[0] // num_experts
    stacks = w_in.shape[0] // w_out.shape[0]
    rows = w_in.view(stacks, num_experts, size, hidden).index_select(1, experts).view(-1, hidden)
    bias = None
    if b_in is not None:
        bias = b_in.view(stacks, num_experts, size).index_select(1, experts).view(-1)
    h = scale_neurons(neurons(F.linear(x, rows, bias)), weights)
    return h @ w_out.view(num_experts, size, hidden).index_select(0, experts).view(-1, hidden)
