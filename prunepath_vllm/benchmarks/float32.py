"""The feed-forward layer in float32 arithmetic on the weights as they are: what benchmarks check against.

Where products take their inputs in float8, so does the reference: what is checked is the kernel, not the rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepath_vllm.conversion.rounding import quantise_weight
from prunepath_vllm.kernels.layer import LayerSpec, Weights, dequantise
from prunepath_vllm.kernels.reference import scale_neurons


def float8_values(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] as a product in float8 takes it, each token's largest value 448; and the scales [T, 1]; float32."""
    values, scale = quantise_weight(x, 0, "float8_e4m3fn")
    return values.float(), scale.unsqueeze(1)


def layer_output(
    x: Tensor,
    gates: Tensor,
    weights: Weights,
    spec: LayerSpec,
    float8_inputs: tuple[bool, bool, bool] = (False, False, False),
) -> Tensor:
    """Eq. 10.

    Args:
        x: [T, H].
        gates: what each expert's output is multiplied by, float32 [T, E].
        weights, spec: the layer, or one rank's part of it.
        float8_inputs: ``kernels.quantised.float8_inputs``: whether the inputs of the first linear, and of the second,
            are in float8, and whether what the first gives is rounded. It is then rounded here as it is in the kernels:
            otherwise other values would be at the edge between two of float8's.

    Returns:
        float32 [T, H].
    """
    first, second, rounded = float8_inputs
    bias = None if weights.b_in is None else weights.b_in.float()
    if first:
        assert weights.scale_in is not None
        values, scale = float8_values(x)
        pre = F.linear(values, weights.w_in.float())
        if rounded:  # by kernels alone: an emulation does without triton
            from prunepath_vllm.kernels.quantised import UNSCALED_TOKENS
        before_scales = rounded and len(x) <= UNSCALED_TOKENS
        if before_scales:
            pre = pre.bfloat16().float()
        pre = pre * (scale * weights.scale_in)
        pre = pre if bias is None else pre + bias
        if rounded and not before_scales:
            pre = pre.to(spec.dtype).float()
    else:
        pre = F.linear(x.float(), dequantise(weights.w_in, weights.scale_in, torch.float32).float(), bias)
    if spec.glu:
        gate, up = pre.chunk(2, dim=-1)
        neurons = spec.activate(gate) * up
    else:
        neurons = spec.activate(pre)
    neurons = scale_neurons(neurons, gates)
    if second:
        assert weights.scale_out is not None
        values, scale = float8_values((neurons * weights.scale_out).to(spec.dtype))
        y = values * scale @ weights.w_out_t.float()
    else:
        y = neurons @ dequantise(weights.w_out_t, weights.scale_out, torch.float32).float()
    return y if weights.b_out is None else y + weights.b_out.float()
