"""A matrix as small whole numbers with a step for each column: how an adapter holds what full training changed.

Entry [r, c] is numbers[r, c] * step[c]. What counts is what rounding does to products, tr(E M E') for the error E and
the moment M of what the matrix multiplies, mean of x x'. So an error of one step is to cost as much in every column:
steps are delta / sqrt(M[c, c]), and numbers are chosen so that errors of inputs that come together cancel. Most numbers
are 0 or 1, which lzma writes in little more than their entropy.
"""

import functools
import lzma
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

MOST = 127
_PASSES = 4
_BLOCK = 64
_DAMPING = 0.01
"""Share of the moment's mean diagonal that is added to it: so much is every input taken to vary by itself."""
_TO_A_BYTE = ((0, 0), (1, 5), (2, 3), (7, 2), (MOST, 1))
"""(largest number, how many to a byte): a column's numbers are digits of bytes, as in the first row that holds them."""
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]
_SAMPLED = 32
"""Rows of each matrix, about, on which a delta is sought."""
_EVERY = 5
"""Of so many matrices, one is packed first; no factor of a layer's 4, 6 or 7, so that all kinds come up."""
_HALVINGS, _TRIES, _NEAR = 14, 6, 0.99
"""Of the range that a delta is sought in; packings until one takes between 99% and all of the bits."""


def quantise(matrix: Tensor, delta: float, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Whole numbers and steps whose products are near those of a matrix.

    Coordinate descent on tr(E M E'): a column's numbers are set to what is best beside all others', column after
    column. Then steps are fitted by least squares.

    Args:
        matrix: [R, C], any float dtype, finite.
        delta: the step of a column that is multiplied by inputs of size 1; larger ones take fewer bits.
        moment: float32 [C, C], symmetric, positive semi-definite; None for the identity, which rounds to the nearest.

    Returns:
        Numbers from -MOST to MOST: int8 [R, C]; steps: bfloat16 [C].
    """
    matrix = matrix.float()
    step = _steps(matrix, delta, _input_sizes(matrix, moment))
    wanted = matrix / step
    numbers = wanted.round()
    if moment is None:
        factors = (numbers * wanted).sum(dim=0) / numbers.square().sum(dim=0)
    else:
        moment = (moment + _damping(moment) * torch.eye(len(step), device=step.device)) * step[:, None] * step
        _descend(numbers, wanted, moment)
        factors = _fitted(numbers, wanted, moment)
    fits = numbers.any(dim=0) & factors.isfinite()
    return numbers.to(torch.int8), (step * torch.where(fits, factors, 1.0)).bfloat16()


def _damping(moment: Tensor) -> Tensor:
    """What is added to a moment's diagonal, a number."""
    return _DAMPING * moment.diagonal().mean() + torch.finfo(torch.float32).tiny


def _input_sizes(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """Root mean square of what each column is multiplied by, 1 without a moment: [C]."""
    if moment is None:
        return torch.ones(matrix.shape[1], device=matrix.device)
    return (moment.diagonal() + _damping(moment)).sqrt()


def _steps(matrix: Tensor, delta: float, sizes: Tensor) -> Tensor:
    """[C]: so that an error of one costs as much in every column, but large enough for the largest entry."""
    least = (matrix.abs().amax(dim=0) / MOST).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.maximum(delta / sizes, least)


def _descend(numbers: Tensor, wanted: Tensor, moment: Tensor) -> None:
    """Rounds of coordinate descent on tr(E M E') with E = numbers - wanted, none of which makes it larger: in place."""
    columns = len(moment)
    for _ in range(_PASSES):
        slope = (numbers - wanted) @ moment
        for begin in range(0, columns, _BLOCK):
            block = slice(begin, min(begin + _BLOCK, columns))
            inner, own, before = moment[block, block], slope[:, block].clone(), numbers[:, block].clone()
            for j in range(len(inner)):
                best = (before[:, j] - own[:, j] / inner[j, j]).round().clamp(-MOST, MOST)
                own += (best - before[:, j])[:, None] * inner[j]
                numbers[:, begin + j] = best
            # The other columns hear of a block's changes at once: one large product instead of many thin ones.
            slope += (numbers[:, block] - before) @ moment[block]


def _fitted(numbers: Tensor, wanted: Tensor, moment: Tensor) -> Tensor:
    """Factors f [C] with which tr(E M E') for E = numbers * f - wanted is least."""
    square = moment * (numbers.T @ numbers)
    square.diagonal().clamp_min_(torch.finfo(torch.float32).tiny)
    square.diagonal().mul_(1 + 1e-6)
    return torch.linalg.solve(square, (numbers * (wanted @ moment)).sum(dim=0))


def pack(numbers: Tensor) -> Tensor:
    """Numbers of :func:`quantise`, int8 [R, C] on the CPU, in as few bytes as lzma finds: uint8 [bytes]."""
    largest = numbers.abs().amax(dim=0)
    kinds = torch.bucketize(largest, torch.tensor([most for most, _ in _TO_A_BYTE], dtype=torch.int8))
    parts = [kinds.to(torch.uint8)]
    for kind, (most, count) in enumerate(_TO_A_BYTE):
        if count:
            digits = numbers[:, kinds == kind].T.int() + most
            digits = torch.nn.functional.pad(digits, (0, -digits.shape[1] % count)).unflatten(1, (-1, count))
            parts.append((digits * _places(most, count)).sum(dim=-1).to(torch.uint8).flatten())
    packed = lzma.compress(torch.cat(parts).numpy().tobytes(), format=lzma.FORMAT_RAW, filters=_FILTERS)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _places(most: int, count: int) -> Tensor:
    return (2 * most + 1) ** torch.arange(count, dtype=torch.int32)


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The numbers that :func:`pack` was given: int8 [rows, columns].

    Raises:
        ValueError: what is packed are not numbers of so many rows and columns.
    """
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_FILTERS)
    try:
        content = decoder.decompress(packed.numpy().tobytes(), max_length=columns * (rows + 1) + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"numbers are no lzma stream: {error}") from None
    if not decoder.eof:
        raise ValueError(f"numbers are cut off, or are more than {rows} rows and {columns} columns take")
    left = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    kinds, left = left[:columns], left[columns:]
    known = len(kinds) == columns and bool((kinds < len(_TO_A_BYTE)).all())
    lengths = [-(-rows // count) if count else 0 for _, count in _TO_A_BYTE]
    if not known or len(left) != int(torch.tensor(lengths)[kinds.long()].sum()):
        raise ValueError(f"numbers of {len(content)} bytes; expected those of {rows} rows and {columns} columns")
    numbers = torch.zeros(columns, rows, dtype=torch.int8)
    for kind, (most, count) in enumerate(_TO_A_BYTE):
        where = (kinds == kind).nonzero()[:, 0]
        size = len(where) * lengths[kind]
        if count and size:
            digits = left[:size].view(len(where), -1, 1) // _places(most, count) % (2 * most + 1) - most
            numbers[where] = digits.flatten(1)[:, :rows].to(torch.int8)
        left = left[size:]
    return numbers.T.contiguous()


def pack_within(
    bits: float, matrices: Callable[[], Iterable[tuple[str, Tensor]]], moments: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Matrices in `bits` an entry at most, mean over all, with one delta: more of them where errors cost more.

    Args:
        bits: of the packed numbers; steps come on top.
        matrices: called some times over, gives name -> [R, C]; a fifth of them is held at once.
        moments: name -> of what a matrix multiplies, per row of its own: all of the matrices have one, or none.

    Returns:
        Name -> packed numbers and steps; without matrices of which nothing is left.
    """
    sample, few = [], {}
    for place, (name, matrix) in enumerate(matrices()):
        sample.append((_some_rows(matrix.float()), _input_sizes(matrix, moments.get(name))))
        if place % _EVERY == 0:
            few[name] = matrix
    if not sample:
        return {}
    aim = 0.5 * (1 + _NEAR) * bits
    nearest = functools.cache(functools.partial(_nearest_bits, sample))
    # The nearest numbers of some rows are soon counted; how many bits less whole, fitted matrices take, a few tell.
    log = _log_delta(aim, sample, nearest)
    _, found = _packed(few.items(), len(few), 2**log, moments)
    goal = max(aim + _nearest_bits(sample[::_EVERY], log) - found, aim / 2)
    del few
    packed: dict[str, tuple[Tensor, Tensor]] = {}
    best, tried = math.inf, list[tuple[float, float]]()
    for _ in range(_TRIES):
        log = _log_delta(goal, sample, nearest)
        candidate, found = _packed(matrices(), len(sample), 2**log, moments)
        # The most of what fits; until something does, the least.
        if found < best if best > bits else best < found <= bits:
            packed, best = candidate, found
        if _NEAR * bits <= found <= bits or not candidate:
            break
        tried.append((goal, found))
        goal = _next(tried, aim)
    return packed


def _packed(
    matrices: Iterable[tuple[str, Tensor]], count: int, delta: float, moments: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Packed numbers and steps of so many matrices, but for those of which nothing is left; bits an entry."""
    parts: dict[str, tuple[Future[Tensor], Tensor]] = {}
    entries = 0
    with ThreadPoolExecutor() as pool:  # lzma takes as long as all else
        for name, matrix in tqdm(matrices, total=count, desc="packing", unit="matrix"):
            numbers, step = quantise(matrix, delta, moments.get(name))
            entries += numbers.numel()
            if numbers.any():
                parts[name] = pool.submit(pack, numbers.cpu()), step.cpu()
    packed = {name: (part.result(), step) for name, (part, step) in parts.items()}
    return packed, 8 * sum(part.numel() for part, _ in packed.values()) / entries


def _some_rows(matrix: Tensor) -> Tensor:
    return matrix[:: max(1, len(matrix) // _SAMPLED)].clone()


def _next(tried: Sequence[tuple[float, float]], bits: float) -> float:
    """The goal to try for so many bits: between two that were tried, or as many more as the last one lacked."""
    below = max((one for one in tried if one[1] <= bits), key=lambda one: one[1], default=None)
    above = min((one for one in tried if one[1] > bits), key=lambda one: one[1], default=None)
    if below and above:
        share = (above[1] - bits) / (above[1] - below[1])
        return above[0] + share * (below[0] - above[0])
    goal, found = tried[-1]
    return max(goal + bits - found, goal / 2)


def _nearest_bits(sample: Sequence[tuple[Tensor, Tensor]], log: float) -> float:
    """Bits an entry that the nearest numbers of some rows take with a delta of that binary logarithm.

    Args:
        sample: rows of each matrix, and its :func:`_input_sizes`.
        log: of delta.
    """
    taken = 0
    for rows, sizes in sample:
        taken += 8 * pack((rows / _steps(rows, 2**log, sizes)).round().to(torch.int8).cpu()).numel()
    return taken / sum(rows.numel() for rows, _ in sample)


def _log_delta(bits: float, sample: Sequence[tuple[Tensor, Tensor]], taken: Callable[[float], float]) -> float:
    """The binary logarithm of the delta at which a sample takes so many bits an entry, as `taken` tells."""
    square = sum(float((rows * sizes).square().sum()) for rows, sizes in sample)
    square /= sum(rows.numel() for rows, _ in sample)
    middle = 0.5 * math.log2(max(square, torch.finfo(torch.float32).tiny))
    low, high = middle - 8, middle + 8  # from all numbers large to all of them 0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) > bits else (low, middle)
    return high
