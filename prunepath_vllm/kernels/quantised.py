"""Dense products with int8 or float8 weights, which carry a float32 scale per neuron.

W8A16: weights are widened in registers, inputs stay as they are; any GPU and dtype. W8A8: inputs are quantised too, to
float8 with a scale per token, and the library multiplies float8 by float8; bfloat16, from compute capability 8.9 on.

Shapes: T tokens, H hidden size, F neurons. Neurons that the second linear gets carry scale_out * ``decode.fold``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunepath_vllm.kernels.common import FOLDED, num_sms, readable, widen
from prunepath_vllm.kernels.decode import DownConfig, down_words, reads_words, reduce_partials
from prunepath_vllm.kernels.float8 import quantise_tokens, quantises_activations
from prunepath_vllm.kernels.layer import LayerSpec, Weights

WIDENED_TOKENS = 128
"""Up to this many tokens the second linear is W8A16 on any GPU. Float8 tensor cores want its weights [H, F], not [F, H]
as they lie; above it, transposing them first pays (Qwen2-7B on an H200: 54 us against 90 with 128 tokens, 105 against
93 with 256, 206 against 103 with 512)."""

UNSCALED_TOKENS = 2048
"""Up to this many tokens the first W8A8 product leaves scales to what follows it: the library's product with scales per
row is slower (Qwen2-7B on an H200: 59 us against 39 with 4 tokens, 413 against 396 with 2,048, not so with 8,192)."""

MAX_SPLITS = 16


@triton.jit(do_not_specialize=["num_tokens"])
def product_kernel(
    x, w, scale, bias, out, num_tokens, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, K] times w, which is [N, K] with ROWS and scaled by scale [N], else [K, N] and unfolded.

    SPLIT: out is float32 [splits, T, N], each of a part of K and without the bias.
    """
    pid_t, pid_n, pid_k, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    token = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_t, in_n = (token < num_tokens)[:, None], (n < N)[None, :]
    blocks = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for block in range(pid_k * blocks // splits, (pid_k + 1) * blocks // splits):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = (K % BLOCK_K == 0) | (k < K)  # folds away where BLOCK_K divides K
        xv = tl.load(x + token[:, None].to(tl.int64) * K + k[None, :], mask=in_t & in_k[None, :], other=0.0)
        if ROWS:
            at = n[None, :].to(tl.int64) * K + k[:, None]
        else:
            at = k[:, None].to(tl.int64) * N + n[None, :]
        wv = tl.load(w + at, mask=in_k[:, None] & in_n, other=0.0)
        acc = tl.dot(xv, widen(wv, xv.dtype), acc, input_precision="ieee")
    if ROWS:
        acc *= tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    else:
        acc *= 1.0 / FOLDED
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    row = token[:, None].to(tl.int64)
    if SPLIT:
        row += pid_k.to(tl.int64) * num_tokens
    tl.store(out + row * N + n[None, :], acc, mask=in_t & in_n)


def product(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """W8A16: x W^T * scale + bias in x's dtype, or, for neurons x without `scale`, x W / FOLDED + bias.

    Args:
        x: [T, K] contiguous.
        weight: quantised, [N, K] with `scale`, else [K, N].
        scale: float32 [N] or None.
        bias: [N] or None.

    Returns:
        [T, N].
    """
    num_tokens, inputs = x.shape
    outputs = weight.shape[0 if scale is not None else 1]
    # Tiles change at powers of two alone, which ffn.warm_up_tokens knows.
    bucket = min(max(16, triton.next_power_of_2(num_tokens)), 2 * WIDENED_TOKENS)
    block_t, block_n, block_k = min(128, bucket), 128, 64 if x.dtype.itemsize == 2 else 32
    tiles = bucket // block_t * triton.cdiv(outputs, block_n)
    splits = 1
    if tiles < num_sms(x.device):  # so many that every multiprocessor gets two programs, or nearly
        splits = max(1, min(MAX_SPLITS, 2 * num_sms(x.device) // tiles, inputs // (8 * block_k)))
    if splits == 1:
        out = torch.empty(num_tokens, outputs, dtype=x.dtype, device=x.device)
    else:
        out = torch.empty(splits, num_tokens, outputs, dtype=torch.float32, device=x.device)
    product_kernel[(triton.cdiv(num_tokens, block_t), triton.cdiv(outputs, block_n), splits)](
        x, readable(weight), scale, bias if splits == 1 else None, out, num_tokens, outputs, inputs,
        ROWS=scale is not None, SPLIT=splits > 1, BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=8 if block_t == 128 else 4, num_stages=4,
    )  # fmt: skip
    return out if splits == 1 else reduce_partials(out, bias, x.dtype, pdl=0)


@triton.jit
def transpose_kernel(source, out, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """out [COLS, ROWS] = source [ROWS, COLS] transposed, of bytes."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < ROWS)[:, None] & (col < COLS)[None, :]
    tile = tl.load(source + row[:, None].to(tl.int64) * COLS + col[None, :], mask=inside, other=0)
    at = col[:, None].to(tl.int64) * ROWS + row[None, :]
    tl.store(out + at, tl.trans(tile), mask=(col < COLS)[:, None] & (row < ROWS)[None, :])


def transposed(weight: Tensor) -> Tensor:
    """A copy [H, F] of a weight [F, H] whose elements are bytes."""
    rows, cols = weight.shape
    out = torch.empty(cols, rows, dtype=torch.uint8, device=weight.device)
    grid = triton.cdiv(rows, 64), triton.cdiv(cols, 64)
    transpose_kernel[grid](weight.view(torch.uint8), out, rows, cols, BLOCK=64, num_warps=4)
    return out.view(weight.dtype)


class Float8Inputs(NamedTuple):
    """Which linears get their inputs in float8, and whether what the first then gives is rounded to half precision."""

    first: bool = False
    second: bool = False
    rounded: bool = False


def float8_inputs(spec: LayerSpec, weights: Weights, num_tokens: int, path: str) -> Float8Inputs:
    """What a path of ``ffn.PATHS`` does at this batch size."""
    if not (weights.quantised and quantises_activations(spec, weights)):
        return Float8Inputs()
    second = path in ("dense", "grouped") and num_tokens > WIDENED_TOKENS
    return Float8Inputs(path in ("split", "dense"), second, path == "dense")


def float8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """W8A8: with q, s = quantise_tokens(x): s * (q weight^T) * scale + bias in x's dtype.

    Args:
        x: [T, K] contiguous.
        weight: float8_e4m3fn [N, K] contiguous.
        scale: float32 [N].
        bias: [N] or None.

    Returns:
        [T, N].
    """
    inputs, scales = quantise_tokens(x)
    return torch._scaled_mm(
        inputs, weight.t(), scale_a=scales, scale_b=scale.unsqueeze(0), bias=bias, out_dtype=x.dtype
    )


def unscaled_product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in bfloat16, [T, N], of float8_e4m3fn [T, K] and [N, K] as they are: their scales come later."""
    one = torch.ones((), dtype=torch.float32, device=x.device)
    return torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def first_linear(x: Tensor, weights: Weights, spec: LayerSpec) -> tuple[Tensor, Tensor | None]:
    """x [T, H] to [T, F], or [T, 2 F] of a GLU, in x's dtype.

    Returns:
        The product, and None; or a product that is still to be multiplied by scale_in and the second tensor, float32
        [T, 1], before the bias is added.
    """
    if not quantises_activations(spec, weights):
        return product(x, weights.w_in, weights.scale_in, weights.b_in), None
    if x.shape[0] <= UNSCALED_TOKENS:
        inputs, x_scale = quantise_tokens(x)
        return unscaled_product(inputs, weights.w_in), x_scale
    assert weights.scale_in is not None
    return float8_product(x, weights.w_in, weights.scale_in, weights.b_in), None


def second_linear(neurons: Tensor, weights: Weights, spec: LayerSpec) -> Tensor:
    """Neurons [T, F] times scale_out * ``decode.fold`` to [T, H], in the same dtype."""
    num_tokens = neurons.shape[0]
    if num_tokens > WIDENED_TOKENS and quantises_activations(spec, weights):
        unfold = torch.full((spec.hidden,), 1 / FOLDED.value, dtype=torch.float32, device=neurons.device)
        return float8_product(neurons, transposed(weights.w_out_t), unfold, weights.b_out)
    if reads_words(spec, weights, num_tokens):
        tiles = triton.cdiv(spec.hidden, 128)
        config = DownConfig(128, 128, max(1, min(32, 2 * num_sms(neurons.device) // tiles)), 4, 4)
        partial = down_words(neurons, None, weights, spec, config, pdl=0)
        return reduce_partials(partial, weights.b_out, neurons.dtype, pdl=0)
    return product(neurons, weights.w_out_t, None, weights.b_out)
