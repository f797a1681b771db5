"""Matrices in few bits: levels, rounding, packing, what rounding does to products, what does not fit."""

import itertools

import pytest
import torch

from prunepath_vllm.training.packed import BITS, deal_bits, error_share, levels, pack, rounding_errors, unpack


def test_levels_are_lloyd_max():
    torch.testing.assert_close(levels(1), torch.tensor([-0.7979, 0.7979]), atol=1e-4, rtol=0)
    torch.testing.assert_close(levels(2), torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104]), atol=1e-3, rtol=0)
    assert levels(4)[-1] == pytest.approx(2.7326, abs=5e-3)


@pytest.mark.parametrize("columns", [5, 7, 64])
@pytest.mark.parametrize("bits", BITS)
def test_every_entry_gets_the_nearest_level_of_its_row(bits, columns):
    matrix = torch.randn(9, columns, generator=torch.Generator().manual_seed(columns))
    matrix *= torch.logspace(-6, 2, 9)[:, None]
    codes, scale = pack(matrix, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (9, -(-columns * bits // 8))
    allowed = levels(bits) * scale[:, None]
    got = unpack(codes, scale, columns)
    choices = (matrix[:, :, None] - allowed[:, None, :]).abs()
    nearest = allowed.gather(1, choices.argmin(dim=-1))
    torch.testing.assert_close(got, nearest)


def test_error_is_that_of_a_normal_variable():
    matrix = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    shares = []
    for bits in BITS:
        shares.append(((unpack(*pack(matrix, bits), 512) - matrix).square().sum() / matrix.square().sum()).item())
    assert shares == pytest.approx([0.363, 0.1175, 0.0095], rel=0.03)
    assert [error_share(bits) for bits in BITS] == pytest.approx([0.3634, 0.1175, 0.0095], rel=0.02)


@pytest.mark.parametrize("mean", [0.3, 1.0, 1.6, 2.0, 3.1, 4.0])
def test_bits_are_dealt_where_they_save_most(mean):
    sizes = torch.tensor([64, 64, 256, 128, 1024, 16])
    squares = torch.tensor([1.0, 40.0, 2.0, 300.0, 9.0, 0.0])
    left = torch.tensor([error_share(bits) for bits in (0, *BITS)])
    dealt = deal_bits({str(i): (int(sizes[i]), (left * squares[i]).tolist()) for i in range(6)}, mean)

    def error(bits):
        rung = torch.bucketize(bits, torch.tensor(BITS), right=True)  # 0, 1, 2 and 4 are rungs 0 to 3
        return (left[rung] * squares).sum(dim=-1)

    got = torch.tensor(list(dealt.values()))
    budget = mean * int(sizes.sum())
    assert (got * sizes).sum() <= budget
    # Steps come whole: what is dealt is as good as the best with one step less.
    choices = torch.cartesian_prod(*[torch.tensor([0, *BITS])] * 6)
    affordable = choices[(choices * sizes).sum(dim=1) <= budget - 2 * int(sizes.max())]
    if len(affordable):
        assert error(got) <= error(affordable).min() + 1e-4
    assert mean < 4 or (got == 4).all()


def test_matrices_alike_get_the_same_bits():
    alike = dict.fromkeys("abcd", (100, rounding_errors(torch.randn(10, 10))))
    for bits in BITS:
        assert deal_bits(alike, bits) == dict.fromkeys("abcd", bits)
    assert sorted(deal_bits(alike, 1.5).values()) == [1, 1, 2, 2]
    assert set(deal_bits(alike, 0.2).values()) == {0}


def correlated(columns, seed, outlier=1.0):
    """A moment of inputs that come together, one of them far larger."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(400, columns // 2, generator=generator)
    inputs = hidden @ torch.randn(columns // 2, columns, generator=generator)
    inputs += 0.3 * torch.randn(400, columns, generator=generator)
    inputs[:, 1] *= outlier
    return inputs.T @ inputs / 400


def product_error(rounded, matrix, moment):
    error = (rounded - matrix).double()
    return torch.trace(error @ moment.double() @ error.T).item() / len(matrix)


@pytest.mark.parametrize("outlier", [1.0, 50.0])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [32, 100])
def test_rounding_with_a_moment_spares_the_products(columns, bits, outlier):
    matrix = torch.randn(24, columns, generator=torch.Generator().manual_seed(1))
    matrix[5] = 0
    moment = correlated(columns, 2, outlier)
    nearest, fitted = (unpack(*pack(matrix, bits, m), columns) for m in (None, moment))
    assert not fitted[5].any()
    share = product_error(fitted, matrix, moment) / product_error(nearest, matrix, moment)
    assert share < (0.75 if outlier == 1 else 0.05)


@pytest.mark.parametrize("bits", [1, 2])
def test_no_other_code_alone_would_be_better(bits):
    matrix, moment = torch.randn(6, 24, generator=torch.Generator().manual_seed(6)), correlated(24, 7)
    codes, scale = pack(matrix, bits, moment)
    rounded = unpack(codes, scale, 24)
    error = ((rounded - matrix) @ moment * (rounded - matrix)).sum(dim=1)
    for column, level in itertools.product(range(24), levels(bits)):
        other = rounded.clone()
        other[:, column] = level * scale
        changed = ((other - matrix) @ moment * (other - matrix)).sum(dim=1)
        assert (changed >= 0.98 * error).all(), (column, level)


def test_moments_that_say_nothing_do_no_harm():
    matrix = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    assert torch.isfinite(unpack(*pack(matrix, 2, torch.zeros(16, 16)), 16)).all()
    nearest, alike = (unpack(*pack(matrix, 2, moment), 16) for moment in (None, torch.eye(16)))
    assert (alike - matrix).square().sum() <= (nearest - matrix).square().sum() * (1 + 1e-5)


def test_errors_are_those_that_packing_leaves():
    matrix, moment = torch.randn(12, 64, generator=torch.Generator().manual_seed(4)), correlated(64, 5)
    plain, fitted = rounding_errors(matrix), rounding_errors(matrix, moment)
    assert plain[0] == pytest.approx(matrix.square().sum().item(), rel=1e-5)
    assert fitted[0] == pytest.approx(product_error(torch.zeros_like(matrix), matrix, moment), rel=1e-4)
    assert fitted[1] == pytest.approx(product_error(unpack(*pack(matrix, 1, moment), 64), matrix, moment), rel=1e-4)
    assert list(fitted) == sorted(fitted, reverse=True)


def test_zero_rows_stay_zero():
    codes, scale = pack(torch.zeros(2, 5), 2)
    assert torch.equal(unpack(codes, scale, 5), torch.zeros(2, 5))


def test_codes_of_another_width_are_refused():
    codes, scale = pack(torch.randn(2, 64), 2)
    with pytest.raises(ValueError, match="matrix of 4 columns; expected at least 5"):
        pack(torch.randn(2, 4), 2)
    with pytest.raises(ValueError, match="codes of 16 bytes a row; expected 100 columns"):
        unpack(codes, scale, 100)
