"""A matrix in one, two or four bits an entry and a scale per row: how an adapter holds what full training changed.

Rounding to the nearest level is best for the entries. With the moment M of what the matrix E multiplies, mean of x x',
codes are chosen that leave the products alone: tr(E M E') counts, so that errors of inputs that come together cancel.
"""

import functools
import heapq
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BITS = (1, 2, 4)
_QUANTILES = 1 << 16
_ROUNDS = 200
_PASSES = 6
_BLOCK = 64
_DAMPING = 0.01
"""Share of the moment's mean diagonal that is added to it: so much is every input taken to vary by itself."""


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


def rounding_errors(matrix: Tensor, moment: Tensor | None = None) -> tuple[float, ...]:
    """What leaving a matrix out, and rounding it to each of :data:`BITS`, costs; comparable between matrices.

    Args:
        matrix: [R, C].
        moment: as :func:`pack` takes it; then rounding to one bit is tried, and more bits are taken to gain what they
            do without.

    Returns:
        The errors' squared size; with a moment, tr(E M E') / R.
    """
    shares = [error_share(bits) for bits in BITS]
    if moment is None:
        size = float(matrix.double().square().sum())
        return size, *(size * share for share in shares)
    matrix = matrix.float()
    left = unpack(*pack(matrix, 1, moment), matrix.shape[1]) - matrix
    size, one = (float(((part @ moment) * part).sum()) / len(matrix) for part in (matrix, left))
    return size, *(one * share / shares[0] for share in shares)


def deal_bits(matrices: Mapping[str, tuple[int, Sequence[float]]], mean: float) -> dict[str, int]:
    """Bits for each matrix, `mean` an entry at most, so that the errors add up to least.

    The step that saves the most error a bit comes first: from 0 to 1 bits, from 1 to 2, from 2 to 4.

    Args:
        matrices: name -> (entries, errors of :func:`rounding_errors`).
        mean: bits an entry, over all matrices.

    Returns:
        Name -> 0 or one of :data:`BITS`.
    """
    rungs = (0, *BITS)
    steps: list[tuple[float, str, int, int]] = []

    def offer(name: str, rung: int) -> None:
        """The step of a matrix to its bits at `rung`."""
        if rung < len(rungs):
            entries, errors = matrices[name]
            cost = (rungs[rung] - rungs[rung - 1]) * entries
            heapq.heappush(steps, ((errors[rung] - errors[rung - 1]) / cost, name, rung, cost))

    for name in matrices:
        offer(name, 1)
    left = mean * sum(entries for entries, _ in matrices.values())
    dealt = dict.fromkeys(matrices, 0)
    while steps:
        _, name, rung, cost = heapq.heappop(steps)
        if cost <= left:
            dealt[name] = rungs[rung]
            left -= cost
            offer(name, rung + 1)
    return dealt


def pack(matrix: Tensor, bits: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round every entry to a level times its row's scale: the nearest, or those that leave the products alone.

    Scales are fitted by alternating least squares.

    Args:
        matrix: [R, C], any float dtype, finite.
        bits: one of :data:`BITS`.
        moment: float32 [C, C], symmetric, positive semi-definite: of what the matrix multiplies. Without it every entry
            gets the nearest level.

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
    if moment is not None:
        codes, scale = _settled(matrix, codes, scale, values, moment)
    places = 8 // bits
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -matrix.shape[1] % places))
    shifts = torch.arange(places, device=matrix.device, dtype=torch.uint8) * bits
    grouped = codes.view(len(codes), -1, places) << shifts
    return grouped.sum(dim=-1, dtype=torch.uint8), scale


def _settled(matrix: Tensor, codes: Tensor, scale: Tensor, values: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales after some rounds of coordinate descent on tr(E M E'), none of which makes it larger.

    A column's codes are set to what is best beside all others', column after column; then every row's scale.
    """
    columns = len(moment)
    tiny = torch.finfo(torch.float32).tiny
    moment = moment + (_DAMPING * moment.diagonal().mean() + tiny) * torch.eye(columns, device=moment.device)
    borders, rounded = _borders(values), values[codes]
    for _ in range(_PASSES):
        slope = (rounded * scale[:, None] - matrix) @ moment
        for begin in range(0, columns, _BLOCK):
            block = slice(begin, min(begin + _BLOCK, columns))
            inner, own, before = moment[block, block], slope[:, block].clone(), rounded[:, block].clone()
            for j in range(len(inner)):
                wanted = before[:, j] * scale - own[:, j] / inner[j, j]
                rounded[:, begin + j] = values[_nearest(wanted[:, None], scale, borders)[:, 0]]
                own += ((rounded[:, begin + j] - before[:, j]) * scale)[:, None] * inner[j]
            # The other columns hear of a block's changes at once: one large product instead of many thin ones.
            slope += ((rounded[:, block] - before) * scale[:, None]) @ moment[block]
        seen = rounded @ moment
        scale = ((seen * matrix).sum(dim=1) / (seen * rounded).sum(dim=1).clamp_min(tiny)).clamp_min(0)
    return torch.bucketize(rounded, borders), scale


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
