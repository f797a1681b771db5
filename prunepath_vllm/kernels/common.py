"""What the kernels share: activations, programmatic dependent launch, and how work is dealt out to programs."""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether Triton's interpreter runs the kernels, which knows no assembly."""


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """A float32 tensor's ``activations.Activation``, by its value."""
    if ACTIVATION == "silu":
        return v * tl.sigmoid(v)
    elif ACTIVATION == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2u)
        return v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    else:
        tl.static_assert(ACTIVATION == "relu", "unknown activation")
        return tl.maximum(v, 0.0)


FOLDED: tl.constexpr = tl.constexpr(256.0)
"""What a neuron that carries its quantised row's scale is multiplied by besides, and the sum over neurons divided by.

The scale alone is a hundredth or less of the row's largest weight: such neurons would leave float16's range.
"""


def float8_to_bfloat16() -> str:
    """PTX that makes 4 bfloat16 of a word's float8_e4m3fn.

    Two bytes go to the upper halves of two halves, exponent and mantissa 4 bits down, which is 2^-120 of the value,
    subnormals too. The conversions of the hardware, by way of float16, take several times as long.
    """
    one = (
        "prmt.b32 h, $2, 0, {pick}; and.b32 s, h, 0x80008000; shr.b32 h, h, 4; and.b32 h, h, 0x07F007F0; "
        "or.b32 h, h, s; fma.rn.bf16x2 ${i}, h, scale, zero; "
    )
    steps = "".join(one.format(i=i, pick=pick) for i, pick in enumerate(("0x1404", "0x3424")))
    start = "mov.b32 scale, 0x7B807B80; mov.b32 zero, 0x80008000; "  # 2^120 and -0, twice each
    return "{ .reg .b32 h, s, scale, zero; " + start + steps + "}"


FLOAT8_TO_BFLOAT16: tl.constexpr = tl.constexpr(float8_to_bfloat16())


@triton.jit
def widen(w, DTYPE: tl.constexpr):
    """Stored weights in DTYPE, exactly: all of int8's and float8_e4m3fn's values are bfloat16's and float16's too.

    uint8 are the bits of float8_e4m3fn, for GPUs that do not convert it (:func:`readable`): moved to where float16 has
    sign, exponent and mantissa they are 2^-8 of the value, subnormals too.
    """
    if w.dtype == tl.uint8:
        bits = w.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half * 256.0).to(DTYPE)
    elif w.dtype == tl.float8e4nv and tl.bfloat16 == DTYPE and not INTERPRETED:
        return tl.inline_asm_elementwise(
            FLOAT8_TO_BFLOAT16, "=r,=r,r", [w.to(tl.uint8, bitcast=True)], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return w.to(DTYPE)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Let the next kernel start its prologue, and block until the previous kernel's writes are visible.

    Every program of every kernel calls this, so that "the previous kernel is complete" holds along the whole chain.
    PDL: 0 off; 1 the next kernel may start once this one stops waiting, and holds multiprocessors while it waits; 2 it
    starts as this one ends.
    """
    if PDL:
        gdc_wait()
    if PDL == 1:
        gdc_launch_dependents()


@triton.jit
def flagged(flags, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Of int32 [E] flags, in [BLOCK_E]: experts, 1 where they are flagged, their places among those; and how many."""
    index = tl.arange(0, BLOCK_E)
    flag = (tl.load(flags + index, mask=index < E, other=0) != 0).to(tl.int32)
    position = tl.cumsum(flag, axis=0) - 1
    return index, flag, position, tl.sum(flag, axis=0)


@triton.jit
def count_reads(experts_read, index, flag, count, here, E: tl.constexpr, RESIDENT: tl.constexpr):
    """Add what :func:`flagged` gave to experts_read, if it is not None: [1], or [2] with fewer RESIDENT experts than E.

    The second entry counts those from RESIDENT on. here: whether this program counts.
    """
    if experts_read is not None:
        tl.atomic_add(experts_read, count, mask=here, sem="relaxed")
        if RESIDENT < E:
            on_host = tl.sum(tl.where(index >= RESIDENT, flag, 0), axis=0)
            tl.atomic_add(experts_read + 1, on_host, mask=here, sem="relaxed")


@triton.jit
def take_share(
    flags, experts, experts_read, pid, num_programs, E: tl.constexpr, RESIDENT: tl.constexpr, BLOCK_E: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """Number the flagged experts in ascending order and give this program its share of their units of work.

    Every program does the same scan.

    Args:
        flags: int32 [E], nonzero for the experts to list, or None where `experts` holds the list already.
        experts: int32 [E + 1], written: the listed experts in this program's share. Neighbours that share an expert
            write the same value. Program 0 also writes the number of listed experts to experts[E].
        experts_read: int32 or int64, or None; program 0 counts, as :func:`count_reads`.
        UNITS: units of work an expert is cut into; they all have the same size.

    Returns:
        first unit, end unit; unit u belongs to the expert experts[u // UNITS].
    """
    if flags is None:
        count = tl.load(experts + E)
    else:
        index, flag, position, count = flagged(flags, E, BLOCK_E)
    begin = pid * count * UNITS // num_programs
    end = (pid + 1) * count * UNITS // num_programs
    if flags is not None:
        mine = (flag != 0) & (position >= begin // UNITS) & (position * UNITS < end)
        tl.store(experts + position, index, mask=mine)
        tl.store(experts + E, count, mask=pid == 0)
        count_reads(experts_read, index, flag, count, pid == 0, E, RESIDENT)
        tl.debug_barrier()  # the list is read back by other threads of this program
    return begin, end


def rows_per_step(most: int, expert_size: int) -> int:
    """Neurons of one expert that a program takes at a time: a power of two that divides expert_size, at most `most`.

    A step then never reaches into the next expert, whatever the expert size; an odd one goes neuron by neuron.
    """
    return math.gcd(most, expert_size)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 elsewhere (the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


AMPLE_SHARED_MEMORY = 163 * 1024
"""Bytes of shared memory of a program on an A100: what the kernels' tiles were chosen for, and enough for all."""

SCRATCH = 1024
"""Bytes of shared memory that a kernel takes besides its tiles, at most: sums over warps and the like."""


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on a CUDA device: 227 KiB on Hopper, 99 on 8.6, 8.9 and 12.0."""
    if device.type != "cuda":
        return AMPLE_SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)  # PyTorch's stubs lack the field
    return properties.shared_memory_per_block_optin


def stages_that_fit(stages: int, tile_bytes: int, room: int) -> int:
    """Most stages of a pipelined loop, up to `stages`, whose tiles fit `room` bytes of shared memory.

    The tiles of all stages but one, which is in registers, lie there at a time. One stage is no pipeline; its tiles
    need no more room than those of two.
    """
    return max(1, min(stages, 1 + (room - SCRATCH) // tile_bytes))


@functools.cache
def converts_float8(device: torch.device) -> bool:
    """Whether a device converts and multiplies float8_e4m3fn in hardware: from compute capability 8.9 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def readable(weight: Tensor) -> Tensor:
    """A stored weight as the kernels read it on its device: float8 as bits where nothing else converts it."""
    if weight.dtype == torch.float8_e4m3fn and not converts_float8(weight.device):
        return weight.view(torch.uint8)
    return weight


@functools.cache
def default_pdl(device: torch.device) -> int:
    """Mode of programmatic dependent launch: 0 before Hopper and off CUDA."""
    return 1 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9 else 0


def launch_options(pdl: int) -> dict[str, bool]:
    """Extra launch arguments for a mode of programmatic dependent launch."""
    return {"launch_pdl": True} if pdl else {}
