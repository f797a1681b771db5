"""The feed-forward layer in float32 arithmetic on the weights as they are: what benchmarks check against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prunepath_vllm.kernels.layer import LayerSpec, Weights, dequantise
from prunepath_vllm.kernels.reference import scale_neurons


def layer_output(x: Tensor, gates: Tensor, weights: Weights, spec: LayerSpec) -> Tensor:
    """Eq. 10.

    Args:
        x: [T, H].
        gates: what each expert's output is multiplied by, float32 [T, E].
        weights, spec: the layer, or one rank's part of it.

    Returns:
        float32 [T, H].
    """
    w_in = dequantise(weights.w_in, weights.scale_in, torch.float32).float()
    pre = F.linear(x.float(), w_in, None if weights.b_in is None else weights.b_in.float())
    if spec.glu:
        gate, up = pre.chunk(2, dim=-1)
        neurons = spec.activate(gate) * up
    else:
        neurons = spec.activate(pre)
    y = scale_neurons(neurons, gates) @ dequantise(weights.w_out_t, weights.scale_out, torch.float32).float()
    return y if weights.b_out is None else y + weights.b_out.float()
