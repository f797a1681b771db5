"""Memory for weights that the CPU kernel reads in scattered pieces."""

import ctypes
import math
import sys

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU, in pages of 2 MiB where Linux gives them, else like ``torch.empty``.

    The rows of a few experts lie far apart; with pages of 4 KiB much of the time goes into translating their addresses
    (1.2x on the layer of SmolLM2 and of Qwen2.5-Coder-1.5B). Takes up to 2 MiB more than the tensor needs; tensors
    below half of that are left alone.
    """
    size = math.prod(shape) * dtype.itemsize
    if sys.platform != "linux" or size < HUGE_PAGE // 2:
        return torch.empty(shape, dtype=dtype, device="cpu")
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    memory = torch.empty(whole + HUGE_PAGE, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % HUGE_PAGE
    # A wish: where the system has no huge pages, the answer is an error, and the memory is as good as any.
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(memory.data_ptr() + start), ctypes.c_size_t(whole), ctypes.c_int(_MADV_HUGEPAGE)
    )
    return memory[start : start + size].view(dtype).view(shape)
