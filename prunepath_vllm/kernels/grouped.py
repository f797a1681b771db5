"""The routed feed-forward layer of a long prefill: tokens are gathered by expert for the first linear.

A long batch uses every expert, each for some of the tokens. The first linear runs once per (expert, its tokens) and
writes its neurons into a zero-filled [T, F] matrix; the second is one dense product over that. Deterministic, and no
host synchronisation: the grid covers the worst case and programs without work return at once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunepath_vllm.kernels.common import activate, readable, widen
from prunepath_vllm.kernels.decode import fold
from prunepath_vllm.kernels.dense import second_linear
from prunepath_vllm.kernels.layer import LayerSpec, Weights
from prunepath_vllm.kernels.routing import Routing


@dataclass(frozen=True)
class GroupedConfig:
    """Tile choices of the gathered first linear."""

    block_m: int = 128
    """Tokens of one expert per program."""
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 4
    group: int = 8
    """Token tiles of every expert in turn: few keep the tokens in cache, many the weights."""


@triton.jit(do_not_specialize=["num_tokens"])
def list_tokens_kernel(
    gates, tokens, counts, experts_read, num_tokens, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    """tokens int32 [E, T]: each expert's tokens in ascending order; counts int32 [E]."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    chunk = tl.program_id(1)
    row = tl.arange(0, BLOCK_T)
    before = tl.zeros([BLOCK_E], dtype=tl.int32)
    for c in range(chunk):
        gate = tl.load(
            gates + (c * BLOCK_T + row).to(tl.int64)[:, None] * E + e[None, :], mask=(e < E)[None, :], other=0
        )
        before += tl.sum((gate != 0.0).to(tl.int32), axis=0)
    t_here = chunk * BLOCK_T + row
    inside = (t_here < num_tokens)[:, None] & (e < E)[None, :]
    flag = (tl.load(gates + t_here.to(tl.int64)[:, None] * E + e[None, :], mask=inside, other=0.0) != 0.0).to(tl.int32)
    position = before[None, :] + tl.cumsum(flag, axis=0) - 1
    tl.store(
        tokens + e.to(tl.int64)[None, :] * num_tokens + position,
        t_here[:, None].broadcast_to(flag.shape),
        mask=flag != 0,
    )
    last = chunk == tl.num_programs(1) - 1
    count = before + tl.sum(flag, axis=0)
    tl.store(counts + e, count, mask=(e < E) & last)
    if experts_read is not None:
        tl.atomic_add(experts_read, tl.sum((count > 0).to(tl.int32), axis=0), mask=last, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens", "tiles"])
def grouped_up_kernel(
    x, w_in, b_in, scale_in, scale_out, gates, tokens, counts, neurons, num_tokens, tiles, E: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """neurons [T, F], zero elsewhere: one expert's neurons of BLOCK_M of its tokens, gated.

    With scales they carry scale_out * FOLD too.
    """
    pid = tl.program_id(0)
    first_tile = pid // (E * GROUP) * GROUP
    width = tl.minimum(tiles - first_tile, GROUP)
    expert = pid % (E * GROUP) // width
    tile = first_tile + pid % (E * GROUP) % width
    count = tl.load(counts + expert)
    if tile * BLOCK_M < count:
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        token = tl.load(tokens + expert.to(tl.int64) * num_tokens + m, mask=m < count, other=0).to(tl.int64)
        # Columns: the expert's gate rows, then its up rows, as one tile.
        HALVES: tl.constexpr = 2 if GLU else 1
        n = tl.arange(0, HALVES * BLOCK_D)
        in_n = n % BLOCK_D < D
        source = (n // BLOCK_D) * (E * D) + expert * D + n % BLOCK_D
        acc = tl.zeros([BLOCK_M, HALVES * BLOCK_D], dtype=tl.float32)
        k = tl.arange(0, BLOCK_K)
        x_tile = x + token[:, None] * H + k[None, :]
        w_tile = w_in + source[None, :].to(tl.int64) * H + k[:, None]
        for k0 in range(0, H, BLOCK_K):
            # Rows past the count repeat token 0 and are not stored; the K condition folds away where BLOCK_K divides H.
            in_k = (H % BLOCK_K == 0) | (k0 + k < H)
            xv = tl.load(x_tile + k0, mask=in_k[None, :], other=0.0)
            w = tl.load(w_tile + k0, mask=in_n[None, :] & in_k[:, None], other=0.0)
            acc = tl.dot(xv, widen(w, xv.dtype), acc, input_precision="ieee")
        if scale_in is not None:
            acc *= tl.load(scale_in + source, mask=in_n, other=0.0)[None, :]
        if BIAS:
            acc += tl.load(b_in + source, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if GLU:
            first, second = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_D]), [0, 2, 1]))
            h = activate(first, ACTIVATION) * second
        else:
            h = activate(acc, ACTIVATION)
        gate = tl.load(gates + token * E + expert, mask=m < count, other=0.0)
        d = tl.arange(0, BLOCK_D)
        if scale_out is not None:
            h *= tl.load(scale_out + expert * D + d, mask=d < D, other=0.0)[None, :] * FOLD
        out = neurons + token[:, None] * (E * D) + expert * D + d[None, :]
        tl.store(out, h * gate[:, None], mask=(m < count)[:, None] & (d < D)[None, :])


def grouped_neurons(
    x: Tensor,
    weights: Weights,
    routing: Routing,
    spec: LayerSpec,
    config: GroupedConfig,
    experts_read: Tensor | None = None,
) -> Tensor:
    """Gated neurons [T, F] in x's dtype, zero where a token does not use the neuron's expert. x: [T, H].

    With quantised weights each is multiplied by its scale_out and ``decode.fold``.
    """
    num_tokens, num_experts = x.shape[0], spec.num_experts
    neurons = torch.zeros(num_tokens, spec.neurons, dtype=x.dtype, device=x.device)
    tokens = torch.empty(num_experts, num_tokens, dtype=torch.int32, device=x.device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=x.device)
    chunk, experts_per_program = 512, 8
    list_tokens_kernel[(triton.cdiv(num_experts, experts_per_program), triton.cdiv(num_tokens, chunk))](
        routing.gates, tokens, counts, experts_read, num_tokens, num_experts, BLOCK_T=chunk,
        BLOCK_E=experts_per_program, num_warps=4,
    )  # fmt: skip
    tiles = triton.cdiv(num_tokens, config.block_m)
    grouped_up_kernel[(num_experts * tiles,)](
        x, readable(weights.w_in), weights.b_in, weights.scale_in, weights.scale_out, routing.gates, tokens, counts,
        neurons, num_tokens, tiles, num_experts, spec.expert_size, spec.hidden, GLU=spec.glu,
        BIAS=weights.b_in is not None, ACTIVATION=spec.activation.value, BLOCK_M=config.block_m,
        BLOCK_D=max(8 if spec.glu else 16, triton.next_power_of_2(spec.expert_size)), BLOCK_K=config.block_k,
        GROUP=config.group, FOLD=fold(spec, weights, num_tokens), num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return neurons


def grouped_ffn(
    x: Tensor,
    weights: Weights,
    routing: Routing,
    spec: LayerSpec,
    config: GroupedConfig,
    experts_read: Tensor | None = None,
) -> Tensor:
    """Eq. 10 for x [T, H], given its routing: [T, H] in x's dtype.

    The number of experts with a token is added to experts_read, int32 or int64 [1], or None.
    """
    return second_linear(grouped_neurons(x, weights, routing, spec, config, experts_read), weights, spec)
