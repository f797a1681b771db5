"""Matrices in few bits: levels, rounding, packing, what does not fit."""

import pytest
import torch

from prunepath_vllm.training.packed import BITS, levels, pack, unpack


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


def test_zero_rows_stay_zero():
    codes, scale = pack(torch.zeros(2, 5), 2)
    assert torch.equal(unpack(codes, scale, 5), torch.zeros(2, 5))


def test_codes_of_another_width_are_refused():
    codes, scale = pack(torch.randn(2, 64), 2)
    with pytest.raises(ValueError, match="matrix of 4 columns; expected at least 5"):
        pack(torch.randn(2, 4), 2)
    with pytest.raises(ValueError, match="codes of 16 bytes a row; expected 100 columns"):
        unpack(codes, scale, 100)
