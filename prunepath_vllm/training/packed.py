"""A matrix in one, two or four bits an entry and a scale per row: how an adapter holds what full training changed."""

import functools
import itertools
from collections.abc import Mapping

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
        nearest = torch.bucketize(sample, _borders(values))
        values = torch.zeros_like(values).scatter_reduce(0, nearest, sample, "mean", include_self=False)
    return values.float()


def _borders(values: Tensor) -> Tensor:
    """Where the nearest of ascending values changes."""
    return (values[1:] + values[:-1]) / 2


@functools.cache
def error_share(bits: int) -> float:
    """Which share of a normal variable's squared size rounding leaves: .363, .118 and .010; 1 for 0 bits."""
    if bits == 0:
        return 1.0
    values = levels(bits).double()
    share = torch.special.ndtr(_borders(values)).diff(prepend=torch.zeros(1), append=torch.ones(1))
    # Levels are the means of what is rounded to them, so the error is what their variance lacks.
    return 1 - float((share * values.square()).sum())


def deal_bits(matrices: Mapping[str, tuple[int, float]], mean: float) -> dict[str, int]:
    """Bits for each matrix, `mean` an entry at most, so that the squared errors add up to least.

    The step that saves the most error a bit comes first: 0 to 1 bits, 1 to 2, 2 to 4, each less than the one before.

    Args:
        matrices: name -> (entries, sum of their squares).
        mean: bits an entry, over all matrices.

    Returns:
        Name -> 0 or one of :data:`BITS`.
    """
    steps = []
    for name, (entries, squares) in matrices.items():
        for fewer, more in itertools.pairwise((0, *BITS)):
            cost = (more - fewer) * entries
            saved = squares * (error_share(fewer) - error_share(more))
            steps.append((-saved / cost, fewer, more, name, cost))
    left = mean * sum(entries for entries, _ in matrices.values())
    dealt = dict.fromkeys(matrices, 0)
    for _, fewer, more, name, cost in sorted(steps):
        if dealt[name] == fewer and cost <= left:
            dealt[name] = more
            left -= cost
    return dealt


def pack(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round every entry to the nearest level times its row's scale, fitted to the row by alternating least squares.

    Args:
        matrix: [R, C], any float dtype, finite.
        bits: one of :data:`BITS`.

    Returns:
        Codes, 8 / bits of them to a byte, lowest bits first: uint8 [R, ceil(C * bits / 8)]; scales: float32 [R].

    Raises:
        ValueError: fewer than 5 columns, of whose codes the number of bits could not be told.
    """
    if matrix.shape[1] < 5:
        raise ValueError(f"matrix of {matrix.shape[1]} columns; expected at least 5")
    matrix = matrix.float()
    values = levels(bits).to(matrix.device)
    borders = _borders(values)
    scale = matrix.square().mean(dim=1).sqrt()
    for _ in range(3):
        rounded = values[_nearest(matrix, scale, borders)]
        scale = (matrix * rounded).sum(dim=1) / rounded.square().sum(dim=1)
    codes = _nearest(matrix, scale, borders)
    places = 8 // bits
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -matrix.shape[1] % places))
    shifts = torch.arange(places, device=matrix.device, dtype=torch.uint8) * bits
    grouped = codes.view(len(codes), -1, places) << shifts
    return grouped.sum(dim=-1, dtype=torch.uint8), scale


def _nearest(matrix: Tensor, scale: Tensor, borders: Tensor) -> Tensor:
    return torch.bucketize(matrix / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None], borders)


def unpack(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    """What :func:`pack` has rounded to: float32 [R, columns].

    Raises:
        ValueError: the codes are not those of so many columns.
    """
    bits = next((bits for bits in BITS if codes.shape[1] == -(-columns * bits // 8)), None)
    if bits is None:
        raise ValueError(f"codes of {codes.shape[1]} bytes a row; expected {columns} columns in {BITS} bits each")
    shifts = torch.arange(8 // bits, device=codes.device, dtype=torch.uint8) * bits
    entries = (codes[:, :, None] >> shifts & (2**bits - 1)).flatten(1)[:, :columns]
    return levels(bits).to(codes.device)[entries.long()] * scale.float()[:, None]
