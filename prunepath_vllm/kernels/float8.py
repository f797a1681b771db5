"""float8 as tensor cores take it: tokens quantised with a scale each, and the second linear's bytes read as words.

Shapes: T tokens, H hidden size, F neurons.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunepath_vllm.kernels.common import FOLDED, INTERPRETED, converts_float8, wait_for_previous
from prunepath_vllm.kernels.layer import LayerSpec, Weights

FLOAT8_MAX = 448.0
"""The largest float8_e4m3fn."""

UNPACKED = {torch.float16: 2.0**8, torch.bfloat16: 2.0**120}
"""What a weight from :func:`unpack_words` is to be multiplied by, by the dtype it is in."""

WORDS_FOLDED = {torch.float16: FOLDED.value, torch.bfloat16: 2.0**72}
"""What takes the place of ``common.FOLDED`` with such weights: their products with neurons must not be subnormal."""


@triton.jit
def quantise_kernel(x, out, scale, K: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr):
    """One token: scale = max |x| / MAX, out = x / scale in out's dtype."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], dtype=tl.float32)
    for k0 in range(0, K, BLOCK):
        v = tl.load(x + token * K + k0 + i, mask=k0 + i < K, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(v))
    s = tl.maximum(tl.max(most, axis=0), 1e-12) / MAX
    tl.store(scale + token, s)
    for k0 in range(0, K, BLOCK):
        v = tl.load(x + token * K + k0 + i, mask=k0 + i < K, other=0.0).to(tl.float32) / s
        v = tl.minimum(tl.maximum(v, -MAX), MAX)  # beyond it lies NaN
        tl.store(out + token * K + k0 + i, v.to(out.dtype.element_ty), mask=k0 + i < K)


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] in float8_e4m3fn, and the float32 scales [T, 1] that give it back."""
    num_tokens, inputs = x.shape
    out = torch.empty(num_tokens, inputs, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(num_tokens, 1, dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(inputs))
    quantise_kernel[(num_tokens,)](x, out, scale, inputs, MAX=FLOAT8_MAX, BLOCK=block, num_warps=8)
    return out, scale


def quantises_activations(spec: LayerSpec, weights: Weights) -> bool:
    """Whether products may be W8A8: the layer allows it, and the GPU and the library do it for these shapes."""
    return (
        spec.quantise_activations
        and weights.w_in.dtype == torch.float8_e4m3fn
        and spec.dtype == torch.bfloat16  # all that the library gives with scales per row on every such GPU
        and spec.hidden % 16 == spec.neurons % 16 == 0
        and converts_float8(weights.w_in.device)
    )


def unpack_assembly(shift: int, mask: int) -> str:
    """PTX that makes 8 halves of two words' bytes: the sign in front, the other bits moved `shift` down, to `mask`."""
    one = (
        "prmt.b32 h, $4, $5, {pick}; shr.b32 m, h, {shift}; and.b32 m, m, {mask}; and.b32 h, h, 0x80008000; "
        "or.b32 ${i}, h, m; "
    )
    # A byte of each word, picked into the upper byte of each half; what is below it falls to the mask.
    picks = (f"0x{4 + i}0{i}0" for i in range(4))
    steps = "".join(one.format(pick=pick, shift=shift, mask=hex(mask), i=i) for i, pick in enumerate(picks))
    return "{ .reg .b32 h, m; " + steps + "}"


TO_FLOAT16: tl.constexpr = tl.constexpr(unpack_assembly(1, 0x3F803F80))
TO_BFLOAT16: tl.constexpr = tl.constexpr(unpack_assembly(4, 0x07F007F0))


@triton.jit
def unpack_byte(w, BYTE: tl.constexpr, DTYPE: tl.constexpr):
    """Byte BYTE of each int32, a float8_e4m3fn, as :func:`unpack_words` gives it."""
    shift: tl.constexpr = 7 if tl.float16 == DTYPE else 4
    bits = w >> (8 * BYTE)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << shift)).to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit
def unpack_words(w, DTYPE: tl.constexpr):
    """Four tiles of DTYPE from one of int32: the float8_e4m3fn in the words' bytes over UNPACKED.

    The bits are moved to where DTYPE has sign, exponent and mantissa, subnormals too, which is exact on any GPU.
    """
    if INTERPRETED:
        return unpack_byte(w, 0, DTYPE), unpack_byte(w, 1, DTYPE), unpack_byte(w, 2, DTYPE), unpack_byte(w, 3, DTYPE)
    elif tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            TO_FLOAT16, "=r,=r,=r,=r,r,r", [w], (tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            TO_BFLOAT16, "=r,=r,=r,=r,r,r", [w], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def down_words_kernel(
    neurons, words, experts, partial, num_tokens, E: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, UNFOLD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``decode.down_kernel`` on float8 weights, whose rows lie as H / 4 words; experts None: all of them.

    A tensor core wants two neighbours of a column in one register, and they lie a row apart: bytes would be read and
    placed one by one, words four by four.
    """
    pid_h, pid_s, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    W: tl.constexpr = H // 4
    tokens = tl.arange(0, BLOCK_T)
    in_t = (tokens < num_tokens)[:, None]
    cols = pid_h * (BLOCK_H // 4) + tl.arange(0, BLOCK_H // 4)
    in_h = (cols < W)[None, :]
    wait_for_previous(PDL)
    count = E if experts is None else tl.load(experts + E)
    blocks = tl.cdiv(count * D, BLOCK_K)
    begin = pid_s * blocks // splits * BLOCK_K
    end = tl.minimum((pid_s + 1) * blocks // splits * BLOCK_K, count * D)
    acc0 = tl.zeros([BLOCK_T, BLOCK_H // 4], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_T, BLOCK_H // 4], dtype=tl.float32)
    acc2 = tl.zeros([BLOCK_T, BLOCK_H // 4], dtype=tl.float32)
    acc3 = tl.zeros([BLOCK_T, BLOCK_H // 4], dtype=tl.float32)
    for r0 in range(begin, end, BLOCK_K):
        row = r0 + tl.arange(0, BLOCK_K)
        in_r = row < end
        source = row.to(tl.int64)
        if experts is not None:
            source = tl.load(experts + row // D, mask=in_r, other=0).to(tl.int64) * D + row % D
        w = tl.load(words + source[:, None] * W + cols[None, :], mask=in_r[:, None] & in_h, other=0)
        h = tl.load(
            neurons + tokens[:, None].to(tl.int64) * (E * D) + row[None, :], mask=in_t & in_r[None, :], other=0.0
        )
        w0, w1, w2, w3 = unpack_words(w, h.dtype)
        acc0 = tl.dot(h, w0, acc0)
        acc1 = tl.dot(h, w1, acc1)
        acc2 = tl.dot(h, w2, acc2)
        acc3 = tl.dot(h, w3, acc3)
    out = partial + (pid_s * num_tokens + tokens[:, None]).to(tl.int64) * H + 4 * cols[None, :]
    mask = in_t & in_h
    tl.store(out, acc0 * UNFOLD, mask=mask)
    tl.store(out + 1, acc1 * UNFOLD, mask=mask)
    tl.store(out + 2, acc2 * UNFOLD, mask=mask)
    tl.store(out + 3, acc3 * UNFOLD, mask=mask)
