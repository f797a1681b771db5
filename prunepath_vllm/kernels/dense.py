"""The feed-forward layer with every expert computed: two dense products around one elementwise kernel.

The path for tau >= 1 and for batches whose tokens together use most experts; gates make it exact for any mix.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from prunepath_vllm.kernels import quantised
from prunepath_vllm.kernels.common import activate
from prunepath_vllm.kernels.decode import fold
from prunepath_vllm.kernels.layer import LayerSpec, Weights

BIASED_TOKENS = range(33, 513)
"""Where the second linear is given a bias of zeros: PyTorch then multiplies with cublasLt, which does better by weights
[F, H] than cuBLAS (Qwen2-7B on an H200, 64 tokens in bfloat16: 37.8 us against 43.6; 16 tokens 40.1 against 36.8)."""


@triton.jit
def linear_output(row, i, mask, x_scale, scale_in, b_in):
    """Entries i of a row of the first linear's output, float32; with x_scale, the token's, it lacks scales and bias."""
    v = tl.load(row + i, mask=mask, other=0.0).to(tl.float32)
    if x_scale is not None:
        v *= tl.load(x_scale) * tl.load(scale_in + i, mask=mask, other=0.0)
        if b_in is not None:
            v += tl.load(b_in + i, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def gated_activation_kernel(
    pre, x_scale, scale_in, b_in, gates, scale_out, out, experts_read, tau, active_counts, F: tl.constexpr,
    E: tl.constexpr, GLU: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, FOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [T, F] = gate of the neuron's expert * act(pre[:, :F]) (* pre[:, F:] for a GLU) (* scale_out * FOLD).

    With x_scale [T], pre lacks it, scale_in and b_in.
    """
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < F
    row = pre + token * (2 * F if GLU else F)
    if x_scale is not None:
        x_scale += token
    h = activate(linear_output(row, i, mask, x_scale, scale_in, b_in), ACTIVATION)
    if GLU:
        h *= linear_output(row, F + i, mask, x_scale, scale_in, b_in)
    if GATED:
        gate = tl.load(gates + token * E + i // (F // E), mask=mask, other=0.0)
        h = tl.where(gate != 0.0, h * gate, 0.0)
    if scale_out is not None:
        h *= tl.load(scale_out + i, mask=mask, other=0.0) * FOLD
    tl.store(out + token * F + i, h, mask=mask)
    if experts_read is not None:
        tl.atomic_add(experts_read, E, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0), sem="relaxed")
    if active_counts is not None:
        first = tl.program_id(1) == 0
        used = tl.where(tl.load(tau + token) > 0.0, E, 0)  # none at a padding row
        tl.store(active_counts + token, tl.load(active_counts + token, mask=first, other=0) + used, mask=first)


def gated_activation(
    pre: Tensor,
    weights: Weights,
    spec: LayerSpec,
    gates: Tensor | None = None,
    experts_read: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    tau: Tensor | None = None,
    active_counts: Tensor | None = None,
) -> Tensor:
    """Neurons [T, F] of the first linear's output `pre` [T, F or 2 F], multiplied by their experts' gates [T, E].

    Those of quantised weights are multiplied by scale_out and ``decode.fold`` too. pre and x_scale are what
    :func:`first_linear` returns; the other arguments are those of :func:`dense_ffn`.
    """
    neurons = torch.empty(pre.shape[0], spec.neurons, dtype=pre.dtype, device=pre.device)
    block = 1024
    gated_activation_kernel[(pre.shape[0], triton.cdiv(spec.neurons, block))](
        pre, x_scale, weights.scale_in, weights.b_in, gates, weights.scale_out, neurons, experts_read, tau,
        active_counts, spec.neurons, spec.num_experts, GLU=spec.glu, GATED=gates is not None,
        ACTIVATION=spec.activation.value, FOLD=fold(spec, weights, pre.shape[0]), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return neurons


def dense_ffn(
    x: Tensor,
    weights: Weights,
    spec: LayerSpec,
    gates: Tensor | None = None,
    experts_read: Tensor | None = None,
    *,
    tau: Tensor | None = None,
    active_counts: Tensor | None = None,
) -> Tensor:
    """Every expert's neurons, multiplied by their gates: eq. 10 with the sum over all experts.

    Args:
        x: [T, H].
        weights, spec: the layer.
        gates: float32 [T, E], 0 where an expert is not active; None where every gate is 1.
        experts_read: int32 or int64 [1], or None; E is added to it.
        tau: float32 [T], with `active_counts`; 0 at padding rows.
        active_counts: int32 [T] or None; E is added to the entries of tokens, for callers that routed nothing.

    Returns:
        [T, H] in x's dtype.
    """
    pre, x_scale = first_linear(x, weights, spec)
    neurons = gated_activation(
        pre, weights, spec, gates, experts_read, x_scale=x_scale, tau=tau, active_counts=active_counts
    )
    return second_linear(neurons, weights, spec)


def routed_dense_ffn(
    x: Tensor, weights: Weights, spec: LayerSpec, route: Callable[[], Tensor], experts_read: Tensor | None = None
) -> Tensor:
    """:func:`dense_ffn` with the gates that `route` returns, found on a second stream during the first linear.

    experts_read: int32 or int64 [1], or None; E is added to it.
    """
    with beside_main_stream(x.device):
        gates = route()
    pre, x_scale = first_linear(x, weights, spec)
    join_side_stream(x.device)
    neurons = gated_activation(pre, weights, spec, gates, experts_read, x_scale=x_scale)
    return second_linear(neurons, weights, spec)


def first_linear(x: Tensor, weights: Weights, spec: LayerSpec) -> tuple[Tensor, Tensor | None]:
    """x [T, H] @ w_in^T + b_in, or what ``quantised.first_linear`` returns."""
    if weights.quantised:
        return quantised.first_linear(x, weights, spec)
    return F.linear(x, weights.w_in, weights.b_in), None


def second_linear(neurons: Tensor, weights: Weights, spec: LayerSpec) -> Tensor:
    """neurons [T, F] @ w_out_t + b_out; those for quantised weights carry scale_out: see ``decode.fold``."""
    if weights.quantised:
        return quantised.second_linear(neurons, weights, spec)
    bias = weights.b_out
    if bias is None and neurons.device.type == "cuda":
        zeros = no_bias(spec.hidden, neurons.dtype, neurons.device)
        bias = zeros if neurons.shape[0] in BIASED_TOKENS and neurons.dtype.itemsize == 2 else None
    if bias is None:
        return neurons @ weights.w_out_t
    return torch.addmm(bias, neurons, weights.w_out_t)


@functools.cache
def no_bias(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [size]. Made at the engine's first step, of the most tokens, so before it captures graphs."""
    return torch.zeros(size, dtype=dtype, device=device)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A device's second stream; of high priority, or its programs would wait for those of a large product."""
    return torch.cuda.Stream(device, priority=-1)


@contextmanager
def beside_main_stream(device: torch.device) -> Iterator[None]:
    """Launch what the block launches on the second stream, after all that the current one has so far.

    Off CUDA there is one stream. The second stream's memory needs no record_stream: its next user waits for all that
    the current stream does until then.
    """
    if device.type != "cuda":
        yield
        return
    side = side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield


def join_side_stream(device: torch.device) -> None:
    """Let the current stream wait for the second one."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(side_stream(device))
