"""The feed-forward layer in float32 arithmetic on the weights as they are: what benchmarks check against."""

import torch.nn.functional as F
from torch import Tensor

from prunepath_vllm.kernels.layer import LayerSpec, Weights
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
    pre = F.linear(x.float(), weights.w_in.float(), None if weights.b_in is None else weights.b_in.float())
    if spec.glu:
        gate, up = pre.chunk(2, dim=-1)
        neurons = spec.activate(gate) * up
    else:
        neurons = spec.activate(pre)
    y = scale_neurons(neurons, gates) @ weights.w_out_t.float()
    return y if weights.b_out is None else y + weights.b_out.float()
