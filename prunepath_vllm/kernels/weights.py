"""One layer's feed-forward weights, in the layout every kernel reads."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """F = E * D neurons, all tensors contiguous.

    Attributes:
        w_in: [F, H], or [2 F, H] with the gate rows first for a GLU.
        b_in: [F] or [2 F], or None.
        w_out_t: [F, H], the second linear transposed: expert e is the rows [e D, (e + 1) D).
        b_out: [H], or None. Added once, never gated.
        activation: transformers' name, a key of ``common.ACTIVATIONS``.
        glu: whether the first linear has a gate half.
    """

    w_in: Tensor
    b_in: Tensor | None
    w_out_t: Tensor
    b_out: Tensor | None
    activation: str
    glu: bool
