"""Matrices in few bits: what numbers take, what rounding does to products, the search for a step, what does not fit."""

import math

import pytest
import torch

from prunepath_vllm.training import packed
from prunepath_vllm.training.levels import from_levels, levels
from prunepath_vllm.training.packed import MOST, pack, pack_within, quantise, unpack


def correlated(columns, seed, outlier=1.0):
    """A moment of inputs that come together, one of them far larger."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(400, columns // 2, generator=generator)
    inputs = hidden @ torch.randn(columns // 2, columns, generator=generator)
    inputs += 0.3 * torch.randn(400, columns, generator=generator)
    inputs[:, 1] *= outlier
    return inputs.T @ inputs / 400


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product_error(rounded, matrix, moment):
    error = (rounded - matrix).double()
    return torch.trace(error @ moment.double() @ error.T).item()


def rounded(numbers, step):
    return numbers.float() * step.float()


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 64])
@pytest.mark.parametrize("largest", [[0], [1], [2], [7], [MOST], [0, 127, 1, 7, 8, 2, 3, 0]])
def test_numbers_come_back(rows, largest):
    generator = torch.Generator().manual_seed(rows)
    columns = [torch.randint(-most, most + 1, (rows,), generator=generator) for most in largest]
    numbers = torch.stack(columns, dim=1).to(torch.int8)
    numbers[0] = torch.tensor([-most for most in largest])
    assert torch.equal(unpack(pack(numbers), rows, len(largest)), numbers)


def test_numbers_of_another_shape_are_refused():
    content = pack(torch.ones(6, 4, dtype=torch.int8))
    for rows, columns in ((6, 5), (60, 4), (6, 3)):
        with pytest.raises(ValueError, match=f"expected those of {rows} rows and {columns} columns"):
            unpack(content, rows, columns)
    with pytest.raises(ValueError, match="no lzma stream"):
        unpack(torch.full((9,), 255, dtype=torch.uint8), 6, 4)
    for part in (content[:-1], content[:0]):
        with pytest.raises(ValueError, match="cut off"):
            unpack(part, 6, 4)
    with pytest.raises(ValueError, match="or are more than 1 rows and 2 columns take"):
        unpack(pack(torch.ones(1000, 1000, dtype=torch.int8)), 1, 2)


def test_without_a_moment_numbers_are_the_nearest():
    matrix = normal(40, 12)
    numbers, step = quantise(matrix, 0.5)
    assert numbers.dtype == torch.int8
    assert step.dtype == torch.bfloat16
    assert torch.equal(numbers, (matrix / 0.5).round().to(torch.int8))
    # Least squares move a column's step off delta.
    error = (numbers * 0.5 - matrix).square().sum(dim=0)
    assert ((rounded(numbers, step) - matrix).square().sum(dim=0) <= error * 1.001).all()


def test_large_entries_get_a_larger_step():
    matrix = normal(30, 4)
    matrix[3, 2] = -1000
    numbers, step = quantise(matrix, 0.1)
    assert numbers[3, 2] == -MOST
    assert (rounded(numbers, step) - matrix)[3, 2].abs() < 5
    assert (rounded(numbers, step) - matrix)[:, [0, 1, 3]].abs().max() < 0.06


@pytest.mark.parametrize("delta", [0.5, 1.0, 2.0])
def test_bits_and_errors_are_those_of_a_rounded_normal_variable(delta):
    edges = (torch.arange(-20, 20) + 0.5) * delta
    shares = torch.special.ndtr(edges.double()).diff()
    entropy = -float(torch.special.xlogy(shares, shares).sum()) / math.log(2)
    numbers, step = quantise(normal(512, 256), delta)
    bits = 8 * len(pack(numbers)) / numbers.numel()
    assert entropy < bits < 1.05 * entropy + 0.02
    error = (rounded(numbers, step) - normal(512, 256)).square().mean()
    assert error < delta**2 / 12


@pytest.mark.parametrize("outlier", [1.0, 50.0])
@pytest.mark.parametrize("bits", [0.8, 1.5, 3.0])
def test_with_a_moment_products_are_spared(bits, outlier):
    matrix, moment = normal(256, 64, seed=1), correlated(64, 2, outlier)
    errors = []
    for moments in ({}, {"a": moment}):
        ((number, step),) = pack_within(bits, lambda: [("a", matrix)], moments).values()
        assert 8 * len(number) <= bits * matrix.numel()
        errors.append(product_error(rounded(unpack(number, 256, 64), step), matrix, moment))
    assert errors[1] < (0.75 if outlier == 1 else 0.05) * errors[0]


def test_no_other_number_alone_would_be_better():
    matrix, moment = normal(6, 24, seed=6), correlated(24, 7)
    numbers, step = quantise(matrix, 2.0, moment)
    error = ((rounded(numbers, step) - matrix) @ moment * (rounded(numbers, step) - matrix)).sum(dim=1)
    for column in range(24):
        for change in (-1, 1):
            other = numbers.clone()
            other[:, column] += change
            changed = rounded(other, step) - matrix
            assert ((changed @ moment * changed).sum(dim=1) >= 0.95 * error).all(), (column, change)


def test_no_other_steps_would_be_better():
    matrix, moment = normal(50, 24, seed=8), correlated(24, 9)
    numbers, step = quantise(matrix, 3.0, moment)
    error = product_error(rounded(numbers, step), matrix, moment)
    for column in range(24):
        for factor in (0.97, 1.03):
            other = step.float().clone()
            other[column] *= factor
            assert product_error(numbers.float() * other, matrix, moment) > 0.999 * error


@pytest.mark.parametrize("moment", [None, torch.zeros(16, 16), correlated(16, 3)], ids=["none", "zeros", "some"])
def test_zeros_stay_zeros(moment):
    matrix = normal(4, 16)
    matrix[2] = 0
    matrix[:, 5] = 0
    numbers, step = quantise(matrix, 0.5, moment)
    assert not numbers[2].any()
    assert torch.isfinite(rounded(numbers, step)).all()
    numbers, step = quantise(torch.zeros(4, 16), 0.5, moment)
    assert not numbers.any()
    assert torch.isfinite(step).all()


@pytest.mark.parametrize("bits", [0.5, 1.0, 1.48, 2.0, 4.0])
def test_matrices_share_the_bits(bits):
    matrices = {"small": normal(128, 96), "large": 4 * normal(128, 96, seed=1), "wide": normal(64, 500, seed=2)}
    found = pack_within(bits, matrices.items, {})
    sizes = {name: 8 * len(number) / matrices[name].numel() for name, (number, _) in found.items()}
    entries = sum(matrix.numel() for matrix in matrices.values())
    taken = sum(sizes[name] * matrices[name].numel() for name in found)
    assert (0.95 if bits >= 1 else 0.7) * bits * entries <= taken <= bits * entries
    assert sizes["large"] > sizes.get("small", 0) + min(1.5, bits)


def test_more_bits_where_inputs_are_larger():
    matrices = {"a": normal(128, 64), "b": normal(128, 64, seed=1)}
    moments = {"a": correlated(64, 1), "b": 16 * correlated(64, 1)}
    found = pack_within(2.0, matrices.items, moments)
    # Inputs four times as large take two bits more; in few bits, and besides what lzma begins with, somewhat less.
    assert 1.4 < 8 * (len(found["b"][0]) - len(found["a"][0])) / (128 * 64) < 2.1


@pytest.mark.parametrize("bits", [0.8, 1.0, 2.0])
@pytest.mark.parametrize("fitted", [False, True])
def test_two_packings_are_enough(bits, fitted):
    matrices = {str(i): (1 + i % 3) * normal(384, 128, seed=i) for i in range(36)}
    moments = {name: correlated(128, 100 + int(name)) for name in matrices} if fitted else {}
    passes = []

    def counted():
        passes.append(len(passes))
        return matrices.items()

    found = pack_within(bits, counted, moments)
    taken = 8 * sum(len(numbers) for numbers, _ in found.values())
    assert 0.99 * bits <= taken / (36 * 384 * 128) <= bits
    assert len(passes) <= 1 + 2, "besides one that samples the matrices"
    again = pack_within(bits, matrices.items, moments)
    assert all(torch.equal(numbers, again[name][0]) for name, (numbers, _) in found.items())


def test_nothing_is_kept_of_what_the_bits_do_not_reach():
    matrices = {"tiny": 1e-6 * normal(64, 64), "large": normal(64, 64, seed=1)}
    assert set(pack_within(1.0, matrices.items, {})) == {"large"}
    assert pack_within(1.0, lambda: [("zeros", torch.zeros(8, 8))], {}) == {}
    assert pack_within(1.0, dict().items, {}) == {}


def test_the_smallest_is_taken_where_none_fits(monkeypatch):
    monkeypatch.setattr(packed, "_TRIES", 1)
    found = pack_within(1e-6, {"a": normal(64, 64)}.items, {})
    assert sum(len(number) for number, _ in found.values()) < 80


def test_levels_of_older_adapters():
    torch.testing.assert_close(levels(1), torch.tensor([-0.7979, 0.7979]), atol=1e-4, rtol=0)
    torch.testing.assert_close(levels(2), torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104]), atol=1e-3, rtol=0)
    assert levels(4)[-1] == pytest.approx(2.7326, abs=5e-3)
    # Lowest bits first: 0b11_10_01_00 are the levels in ascending order, of five columns one begins a second byte.
    got = from_levels(torch.tensor([[0b11100100, 0b01]], dtype=torch.uint8), torch.tensor([2.0]), 5)
    torch.testing.assert_close(got, 2 * levels(2)[[0, 1, 2, 3, 1]][None])
    with pytest.raises(ValueError, match="codes of 16 bytes a row; expected 100 columns"):
        from_levels(torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2), 100)
