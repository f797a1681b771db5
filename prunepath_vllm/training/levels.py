"""Adapters of version 0.2.0, still read: a matrix in one, two or four bits an entry and a scale per row."""

import functools

import torch
from torch import Tensor

BITS = (1, 2, 4)
_QUANTILES = 1 << 16
_ROUNDS = 200


@functools.cache
def levels(bits: int) -> Tensor:
    """The 2^bits values that approximate a standard normal variable with the least squared error, ascending: float32.

    Lloyd's method (Lloyd-Max levels) on evenly spaced quantiles.
    """
    sample = torch.special.ndtri((torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES)
    values = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(_ROUNDS):
        nearest = torch.bucketize(sample, (values[1:] + values[:-1]) / 2)
        values = torch.zeros_like(values).scatter_reduce(0, nearest, sample, "mean", include_self=False)
    return values.float()


def from_levels(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    """A level times its row's scale at every entry: float32 [R, columns].

    Args:
        codes: 8 / bits of them to a byte, lowest bits first: uint8 [R, ceil(columns * bits / 8)].
        scale: float32 [R].
        columns: C.

    Raises:
        ValueError: the codes are not those of so many columns.
    """
    bits = next((bits for bits in BITS if codes.shape[1] == -(-columns * bits // 8)), None)
    if bits is None:
        raise ValueError(f"codes of {codes.shape[1]} bytes a row; expected {columns} columns in {BITS} bits each")
    shifts = torch.arange(8 // bits, device=codes.device, dtype=torch.uint8) * bits
    entries = (codes[:, :, None] >> shifts & (2**bits - 1)).flatten(1)[:, :columns]
    return levels(bits).to(codes.device)[entries.long()] * scale.float()[:, None]
