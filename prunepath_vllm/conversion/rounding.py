"""A linear's weight in int8 or float8, with a scale per neuron or output.

Shapes: F neurons or outputs, I inputs, T tokens.
"""

import torch
from torch import Tensor

from prunepath_vllm.kernels.layer import dtype_name

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The value that a neuron's largest weight becomes."""


def quantise_weight(weight: Tensor, axis: int, expert_dtype: str) -> tuple[Tensor, Tensor]:
    """A linear's weight in `expert_dtype`, symmetric, and its scales.

    Args:
        weight: two dimensions, any float dtype.
        axis: the one of neurons.
        expert_dtype: a key of LARGEST.

    Returns:
        The weight, shaped as it was, and float32 [F]: their product is the weight again. A neuron of zeros has scale 1.
    """
    largest, wide = LARGEST[expert_dtype], weight.float()
    amax = wide.abs().amax(1 - axis)
    # Of subnormal weights, the quotient may be zero.
    scale = torch.where(amax == 0, 1.0, (amax / largest).clamp(min=torch.finfo(torch.float32).tiny))
    narrow = (wide / scale.unsqueeze(1 - axis)).clamp(-largest, largest)
    return (narrow.round() if expert_dtype == "int8" else narrow).to(getattr(torch, expert_dtype)), scale


def quantised_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """What a linear whose activations are quantised too, each token by its largest value, gives: float32 [T, F].

    Args:
        x: float32 [T, I].
        weight: [F, I], and
        scale: float32 [F], of :func:`quantise_weight`.
    """
    narrow, tokens = quantise_weight(x, 0, dtype_name(weight.dtype))
    return (narrow.float() @ weight.float().T) * scale * tokens.unsqueeze(1)
