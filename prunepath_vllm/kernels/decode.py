"""The routed feed-forward layer for a decode step: every listed expert's weights are read once.

One token: one kernel reads gate, up and down rows of each neuron together and keeps the output in registers, so that
nothing waits between the two linears. Several tokens: an up kernel and a down kernel on tensor cores. Both leave
float32 partial outputs that a last kernel adds in a fixed order: the result does not change from run to run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunepath_vllm.kernels.common import (
    FOLDED,
    activate,
    default_pdl,
    launch_options,
    num_sms,
    readable,
    rows_per_step,
    take_share,
    wait_for_previous,
    widen,
)
from prunepath_vllm.kernels.float8 import UNPACKED, WORDS_FOLDED, down_words_kernel
from prunepath_vllm.kernels.layer import LayerSpec, Weights
from prunepath_vllm.kernels.routing import Routing


@dataclass(frozen=True)
class FusedConfig:
    """Tile choices of the one-token kernel."""

    rows: int = 2
    """Most neurons per step, a power of two; each is a row of gate, of up and of down."""
    num_warps: int = 16
    num_stages: int = 1
    programs_per_sm: int = 1


@dataclass(frozen=True)
class UpConfig:
    """Tile choices of the first linear for several tokens."""

    rows: int = 32
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 4
    programs_per_sm: int = 2


@dataclass(frozen=True)
class DownConfig:
    """Tile choices of the second linear for several tokens."""

    block_h: int = 128
    block_k: int = 64
    splits: int = 8
    num_warps: int = 4
    num_stages: int = 7
    """The expert list is read one step ahead of the rows it names, so half of these hold rows."""


@triton.jit
def fused_decode_kernel(
    x, w_in, b_in, w_out_t, scale_in, scale_out, gates, flags, experts, experts_read, partial, E: tl.constexpr,
    RESIDENT: tl.constexpr, D: tl.constexpr, H: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token: partial [programs, H] = sum over this program's neurons of gate * act(w_in x) * w_out."""
    pid, num_programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_H)
    in_h = (cols < H)[None, :]
    tl.static_assert(D % R == 0, "a step must not reach into the next expert")
    STEPS: tl.constexpr = D // R
    wait_for_previous(PDL)
    begin, end = take_share(flags, experts, experts_read, pid, num_programs, E, RESIDENT, BLOCK_E, STEPS)
    xv = tl.load(x + cols, mask=cols < H, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros([BLOCK_H], dtype=tl.float32)
    for unit in tl.range(begin, end, num_stages=STAGES):
        expert = tl.load(experts + unit // STEPS)
        rows = expert.to(tl.int64) * D + (unit % STEPS) * R + tl.arange(0, R)
        tile = rows[:, None] * H + cols[None, :]
        w1 = tl.load(w_in + tile, mask=in_h, other=0.0, eviction_policy="evict_first")
        if GLU:
            w2 = tl.load(w_in + E * D * H + tile, mask=in_h, other=0.0, eviction_policy="evict_first")
        wd = tl.load(w_out_t + tile, mask=in_h, other=0.0, eviction_policy="evict_first")
        h = tl.sum(widen(w1, tl.float32) * xv, axis=1)
        if scale_in is not None:
            h *= tl.load(scale_in + rows)
        if BIAS:
            h += tl.load(b_in + rows).to(tl.float32)
        h = activate(h, ACTIVATION)
        if GLU:
            u = tl.sum(widen(w2, tl.float32) * xv, axis=1)
            if scale_in is not None:
                u *= tl.load(scale_in + E * D + rows)
            if BIAS:
                u += tl.load(b_in + E * D + rows).to(tl.float32)
            h *= u
        h *= tl.load(gates + expert)
        if scale_out is not None:
            h *= tl.load(scale_out + rows)
        acc += tl.sum(h[:, None] * widen(wd, tl.float32), axis=0)
    tl.store(partial + pid * H + cols, acc, mask=cols < H)


@triton.jit(do_not_specialize=["num_tokens"])
def up_kernel(
    x, x_scale, w_in, b_in, scale_in, scale_out, gates, flags, experts, experts_read, neurons, num_tokens,
    E: tl.constexpr, RESIDENT: tl.constexpr, D: tl.constexpr, H: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr,
    GRAIN: tl.constexpr, FOLD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens: neurons [T, F], row r of the listed experts' rows in column r, multiplied by its gate.

    With scales they carry scale_out * FOLD too. With x_scale [T] x is float8, x_scale times which are the tokens.
    """
    pid, num_programs = tl.program_id(0), tl.num_programs(0)
    tokens = tl.arange(0, BLOCK_T)
    in_t = tokens < num_tokens
    tl.static_assert(D % GRAIN == 0, "a unit of work must not reach into the next expert")
    # Of float8 products tensor cores keep few bits from step to step; each block's sum is added in float32.
    IMPRECISE: tl.constexpr = 0 if x_scale is None else BLOCK_K
    wait_for_previous(PDL)
    begin, end = take_share(flags, experts, experts_read, pid, num_programs, E, RESIDENT, BLOCK_E, D // GRAIN)
    for r0 in range(begin * GRAIN, end * GRAIN, R):
        row = r0 + tl.arange(0, R)
        in_r = row < end * GRAIN
        expert = tl.load(experts + row // D, mask=in_r, other=0)
        source = expert.to(tl.int64) * D + row % D
        acc = tl.zeros([R, BLOCK_T], dtype=tl.float32)
        acc_up = tl.zeros([R, BLOCK_T], dtype=tl.float32)
        for k0 in range(0, H, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            tile = source[:, None] * H + k[None, :]
            # The second condition folds away where BLOCK_K divides H.
            in_w = in_r[:, None] & ((H % BLOCK_K == 0) | (k < H)[None, :])
            w1 = tl.load(w_in + tile, mask=in_w, other=0.0)
            xt = tl.load(
                x + tokens[None, :].to(tl.int64) * H + k[:, None],
                mask=in_t[None, :] & ((H % BLOCK_K == 0) | (k < H)[:, None]), other=0.0,
            )  # fmt: skip
            acc = tl.dot(widen(w1, xt.dtype), xt, acc, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
            if GLU:
                w2 = tl.load(w_in + E * D * H + tile, mask=in_w, other=0.0)
                acc_up = tl.dot(
                    widen(w2, xt.dtype), xt, acc_up, input_precision="ieee", max_num_imprecise_acc=IMPRECISE
                )
        if x_scale is not None:
            s = tl.load(x_scale + tokens, mask=in_t, other=0.0)[None, :]
            acc *= s
            acc_up *= s
        if scale_in is not None:
            acc *= tl.load(scale_in + source, mask=in_r, other=0.0)[:, None]
            if GLU:
                acc_up *= tl.load(scale_in + E * D + source, mask=in_r, other=0.0)[:, None]
        if BIAS:
            acc += tl.load(b_in + source, mask=in_r, other=0.0).to(tl.float32)[:, None]
        acc = activate(acc, ACTIVATION)
        if GLU:
            if BIAS:
                acc_up += tl.load(b_in + E * D + source, mask=in_r, other=0.0).to(tl.float32)[:, None]
            acc *= acc_up
        out = in_r[:, None] & in_t[None, :]
        gate = tl.load(gates + tokens[None, :] * E + expert[:, None], mask=out, other=0.0)
        # Not a product with 0: an overflow in an expert the token did not choose must not reach it.
        acc = tl.where(gate != 0.0, acc * gate, 0.0)
        if scale_out is not None:
            acc *= tl.load(scale_out + source, mask=in_r, other=0.0)[:, None] * FOLD
        tl.store(neurons + tokens[None, :].to(tl.int64) * (E * D) + row[:, None], acc, mask=out)


@triton.jit(do_not_specialize=["num_tokens"])
def down_kernel(
    neurons, w_out_t, experts, partial, num_tokens, E: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Several tokens: partial [splits, T, H] = neurons times this split's share of the listed experts' rows.

    SCALED: whether the neurons carry FOLDED.
    """
    pid_h, pid_s, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    tokens = tl.arange(0, BLOCK_T)
    in_t = (tokens < num_tokens)[:, None]
    cols = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = (cols < H)[None, :]
    wait_for_previous(PDL)
    blocks = tl.cdiv(tl.load(experts + E) * D, BLOCK_K)
    begin = pid_s * blocks // splits * BLOCK_K
    end = tl.minimum((pid_s + 1) * blocks // splits * BLOCK_K, tl.load(experts + E) * D)
    acc = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    for r0 in range(begin, end, BLOCK_K):
        row = r0 + tl.arange(0, BLOCK_K)
        in_r = row < end
        expert = tl.load(experts + row // D, mask=in_r, other=0)
        source = expert.to(tl.int64) * D + row % D
        w = tl.load(w_out_t + source[:, None] * H + cols[None, :], mask=in_r[:, None] & in_h, other=0.0)
        h = tl.load(
            neurons + tokens[:, None].to(tl.int64) * (E * D) + row[None, :], mask=in_t & in_r[None, :], other=0.0
        )
        acc = tl.dot(h, widen(w, h.dtype), acc, input_precision="ieee")
    if SCALED:
        acc *= 1.0 / FOLDED
    out = partial + (pid_s * num_tokens + tokens[:, None]).to(tl.int64) * H + cols[None, :]
    tl.store(out, acc, mask=in_t & in_h)


@triton.jit(do_not_specialize=["num_tokens"])
def reduce_kernel(
    partial, b_out, y, num_tokens, parts, H: tl.constexpr, BIAS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [T * H] = the parts of partial [parts, T * H] added in a fixed order, plus the output bias."""
    numel = num_tokens * H  # whose divisors the compiler sees in H, for any number of tokens
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.arange(0, BLOCK_P)
    wait_for_previous(PDL)
    values = tl.load(
        partial + p[:, None].to(tl.int64) * numel + i[None, :],
        mask=(p[:, None] < parts) & (i[None, :] < numel), other=0.0,
    )  # fmt: skip
    total = tl.sum(values, axis=0)
    if BIAS:
        total += tl.load(b_out + i % H, mask=i < numel, other=0.0).to(tl.float32)
    tl.store(y + i, total, mask=i < numel)


def listing(routing: Routing, pdl: int) -> tuple[Tensor | None, Tensor, dict[str, bool]]:
    """The flags to make the list of experts from, or None; the list, int32 [E + 1]; and options of the launch.

    A list that is there was made on another stream: the kernel that reads it has more than one predecessor, so it is
    launched plainly. It still lets the next kernel start early.
    """
    if routing.experts is not None:
        return None, routing.experts, {}
    experts = torch.empty(routing.gates.shape[1] + 1, dtype=torch.int32, device=routing.gates.device)
    return routing.flags, experts, launch_options(pdl)


def fused_partials(
    x: Tensor,
    weights: Weights,
    routing: Routing,
    spec: LayerSpec,
    config: FusedConfig,
    pdl: int | None = None,
    experts_read: Tensor | None = None,
) -> Tensor:
    """One token's output as float32 partial sums [programs, 1, H]. x: [1, H]. experts_read: see :func:`up`."""
    hidden, num_experts = spec.hidden, spec.num_experts
    pdl = default_pdl(x.device) if pdl is None else pdl
    programs = num_sms(x.device) * config.programs_per_sm
    partial = torch.empty(programs, 1, hidden, dtype=torch.float32, device=x.device)
    flags, experts, launch = listing(routing, pdl)
    fused_decode_kernel[(programs,)](
        x, readable(weights.w_in), weights.b_in, readable(weights.w_out_t), weights.scale_in, weights.scale_out,
        routing.gates, flags, experts, experts_read, partial, num_experts, spec.num_resident, spec.expert_size, hidden,
        GLU=spec.glu, BIAS=weights.b_in is not None, ACTIVATION=spec.activation.value,
        BLOCK_E=triton.next_power_of_2(num_experts), BLOCK_H=triton.next_power_of_2(hidden),
        R=rows_per_step(config.rows, spec.expert_size), STAGES=config.num_stages, PDL=pdl,
        num_warps=config.num_warps, **launch,
    )  # fmt: skip
    return partial


def up(
    x: Tensor,
    weights: Weights,
    routing: Routing,
    spec: LayerSpec,
    config: UpConfig,
    pdl: int | None = None,
    experts_read: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The listed experts' neurons, gated.

    Their number is added to experts_read, as ``layer.Counters.read`` says, or None, unless the list was made before.
    x and x_scale are what ``float8.quantise_tokens`` makes of the tokens, or x the tokens themselves.

    Returns:
        neurons [T, F] in the layer's dtype, whose column r is the r-th row of the listed experts (the rest is not
        written), and experts, int32 [E + 1]: the list, its length in the last element. Neurons of quantised weights are
        multiplied by their scale_out and :func:`fold`.
    """
    num_tokens, num_experts = x.shape[0], spec.num_experts
    pdl = default_pdl(x.device) if pdl is None else pdl
    neurons = torch.empty(num_tokens, spec.neurons, dtype=spec.dtype, device=x.device)
    flags, experts, launch = listing(routing, pdl)
    up_kernel[(num_sms(x.device) * config.programs_per_sm,)](
        x, x_scale, readable(weights.w_in), weights.b_in, weights.scale_in, weights.scale_out, routing.gates, flags,
        experts, experts_read, neurons, num_tokens, num_experts, spec.num_resident, spec.expert_size, spec.hidden,
        GLU=spec.glu, BIAS=weights.b_in is not None, ACTIVATION=spec.activation.value,
        BLOCK_E=triton.next_power_of_2(num_experts), BLOCK_T=block_t(num_tokens), R=config.rows,
        BLOCK_K=config.block_k, GRAIN=rows_per_step(8, spec.expert_size), FOLD=fold(spec, weights, num_tokens), PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, **launch,
    )  # fmt: skip
    return neurons, experts


def reads_words(spec: LayerSpec, weights: Weights, num_tokens: int) -> bool:
    """Whether the second linear goes to :func:`down_words`: float8 weights, and tokens that fill one tile at most.

    On an H200 it takes 25 us of Qwen2-7B's layer where reading bytes takes 34; with 64 tokens 70 instead of 39.
    """
    stored = weights.w_out_t.dtype == torch.float8_e4m3fn
    return stored and spec.dtype in UNPACKED and spec.hidden % 4 == 0 and block_t(num_tokens) == 16


def fold(spec: LayerSpec, weights: Weights, num_tokens: int) -> float:
    """What neurons that carry their quantised row's scale are multiplied by besides: see ``common.FOLDED``."""
    return WORDS_FOLDED[spec.dtype] if reads_words(spec, weights, num_tokens) else FOLDED.value


def down_partials(
    neurons: Tensor, experts: Tensor, weights: Weights, spec: LayerSpec, config: DownConfig, pdl: int | None = None
) -> Tensor:
    """Float32 partial outputs [splits, T, H] of the neurons and the expert list that `up` returned."""
    num_tokens, hidden = neurons.shape[0], spec.hidden
    pdl = default_pdl(neurons.device) if pdl is None else pdl
    if reads_words(spec, weights, num_tokens):
        return down_words(neurons, experts, weights, spec, config, pdl)
    partial = torch.empty(config.splits, num_tokens, hidden, dtype=torch.float32, device=neurons.device)
    down_kernel[(triton.cdiv(hidden, config.block_h), config.splits)](
        neurons, readable(weights.w_out_t), experts, partial, num_tokens, spec.num_experts, spec.expert_size, hidden,
        BLOCK_T=block_t(num_tokens), BLOCK_H=config.block_h, BLOCK_K=config.block_k,
        SCALED=weights.quantised, PDL=pdl, num_warps=config.num_warps, num_stages=config.num_stages,
        **launch_options(pdl),
    )  # fmt: skip
    return partial


def down_words(
    neurons: Tensor, experts: Tensor | None, weights: Weights, spec: LayerSpec, config: DownConfig, pdl: int
) -> Tensor:
    """:func:`down_partials` where :func:`reads_words` says so; experts None: every expert's neurons, in order."""
    num_tokens, hidden = neurons.shape[0], spec.hidden
    partial = torch.empty(config.splits, num_tokens, hidden, dtype=torch.float32, device=neurons.device)
    down_words_kernel[(triton.cdiv(hidden, config.block_h), config.splits)](
        neurons, weights.w_out_t.view(torch.int32), experts, partial, num_tokens, spec.num_experts, spec.expert_size,
        hidden, BLOCK_T=block_t(num_tokens), BLOCK_H=config.block_h, BLOCK_K=config.block_k,
        UNFOLD=UNPACKED[spec.dtype] / WORDS_FOLDED[spec.dtype], PDL=pdl, num_warps=config.num_warps,
        num_stages=config.num_stages, **launch_options(pdl),
    )  # fmt: skip
    return partial


def reduce_partials(partial: Tensor, b_out: Tensor | None, dtype: torch.dtype, pdl: int | None = None) -> Tensor:
    """Sum float32 [parts, T, H] over its parts in a fixed order, add the bias [H]: [T, H] in `dtype`."""
    parts, num_tokens, hidden = partial.shape
    pdl = default_pdl(partial.device) if pdl is None else pdl
    y = torch.empty(num_tokens, hidden, dtype=dtype, device=partial.device)
    block_p = triton.next_power_of_2(parts)
    block = max(16, min(256, 4096 // block_p))
    reduce_kernel[(triton.cdiv(y.numel(), block),)](
        partial, b_out, y, num_tokens, parts, hidden, BIAS=b_out is not None, BLOCK_P=block_p, BLOCK=block, PDL=pdl,
        num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return y


def block_t(num_tokens: int) -> int:
    """Tokens a tile is padded to: a power of two, at least a tensor-core tile."""
    return max(16, triton.next_power_of_2(num_tokens))
