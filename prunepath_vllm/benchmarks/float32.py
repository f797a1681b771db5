"""The feed-forward layer in float32 arithmetic on the weights as they are: what benchmarks check against."""

import torch.nn.functional as F
from torch import Tensor

from prunepath_vllm.kernels.cpu import ACTIVATIONS
from prunepath_vllm.kernels.reference import scale_neurons
from prunepath_vllm.kernels.weights import Weights


def layer_output(x: Tensor, gates: Tensor, weights: Weights) -> Tensor:
    """Eq. 10.

    Args:
        x: [T, H].
        gates: what each expert's output is multiplied by, float32 [T, E].
        weights: of the layer, or of one rank's neurons.

    Returns:
        float32 [T, H].
    """
    pre = F.linear(x.float(), weights.w_in.float(), None if weights.b_in is None else weights.b_in.float())
    activation = ACTIVATIONS[weights.activation]
    if weights.glu:
        gate, up = pre.chunk(2, dim=-1)
        neurons = activation(gate) * up
    else:
        neurons = activation(pre)
    y = scale_neurons(neurons, gates) @ weights.w_out_t.float()
    return y if weights.b_out is None else y + weights.b_out.float()
