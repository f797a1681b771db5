"""Linears whose weights are int8 or float8: feed-forward ones with a scale per neuron, others with one per output.

Shapes: H hidden size, F neurons.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.kernels.layer import dequantise


class QuantisedLinear(nn.Module):
    """A linear between H and F whose weight is widened in every forward.

    Weight and scales are buffers: they are not trained, and get no gradient.

    Args:
        inputs, outputs: sizes.
        dtype: of the weight.
        bias: whether it has one.
        is_output: whether its inputs are the neurons, not its outputs.
        conv1d: whether the weight is stored [inputs, outputs].

    Attributes:
        weight: [outputs, inputs], or [inputs, outputs], in `dtype`, whatever the module is cast to.
        weight_scale: float32 [F].
        bias: [outputs] or None.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dtype: torch.dtype,
        *,
        bias: bool = True,
        is_output: bool = False,
        conv1d: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.is_output, self.conv1d = inputs, outputs, is_output, conv1d
        shape = (inputs, outputs) if conv1d else (outputs, inputs)
        self.neuron_axis = int(is_output != conv1d)
        self.register_buffer("weight", torch.zeros(shape, dtype=dtype))
        self.register_buffer("weight_scale", torch.ones(inputs if is_output else outputs, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, as it is shaped, in `dtype`."""
        if self.neuron_axis == 0:
            return dequantise(self.weight, self.weight_scale, dtype)
        return dequantise(self.weight.t(), self.weight_scale, dtype).t()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., inputs] to [..., outputs], in the same dtype."""
        weight = self.dequantised(x.dtype)
        return F.linear(x, weight.t() if self.conv1d else weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast of the model would widen float8, and round the scales.
        kept = {name: getattr(self, name) for name in ("weight", "weight_scale")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if (cast := getattr(self, name)).dtype != before.dtype:
                setattr(self, name, before.to(cast.device))
        return self


class OutputScaledLinear(QuantisedLinear):
    """A linear of the attention, whose ``weight_scale`` is [outputs, 1], as compressed-tensors stores it."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool) -> None:
        super().__init__(inputs, outputs, dtype, bias=bias)
        self.weight_scale = self.weight_scale.unsqueeze(1)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See the base class."""
        return dequantise(self.weight, self.weight_scale.squeeze(1), dtype)


def quantise_attention(model: nn.Module, names: list[str], dtype: torch.dtype) -> None:
    """Put an :class:`OutputScaledLinear`, not loaded yet, in the place of each linear of `names`."""
    for name in names:
        linear: Any = model.get_submodule(name)
        quantised = OutputScaledLinear(linear.in_features, linear.out_features, dtype, bias=linear.bias is not None)
        model.set_submodule(name, quantised)


def expert_linear(
    prunepath: PrunePathConfig,
    inputs: int,
    outputs: int,
    *,
    bias: bool = True,
    is_output: bool = False,
    conv1d: bool = False,
) -> nn.Module:
    """A feed-forward linear as the checkpoint stores it: see :class:`QuantisedLinear` for the arguments."""
    if prunepath.expert_dtype is not None:
        dtype = getattr(torch, prunepath.expert_dtype)
        return QuantisedLinear(inputs, outputs, dtype, bias=bias, is_output=is_output, conv1d=conv1d)
    return Conv1D(outputs, inputs) if conv1d else nn.Linear(inputs, outputs, bias=bias)
