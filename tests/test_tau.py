"""The knob: which values are valid, what a target sparsity means, and what the errors say."""

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunepath_vllm.errors import PrunePathError, TauError
from prunepath_vllm.tau import (
    MAX_TAU,
    MIN_FLOAT32,
    parse_sparsity,
    parse_tau,
    parse_tau_list,
    parse_tau_range,
    resolve_tau,
    tau_for_sparsity,
)

CURVE = [(0.4, 0.9), (0.6, 0.7), (0.8, 0.4), (1.0, 0.0)]
NOT_NUMBERS = [True, False, None, "0.5", [0.5], (0.5,), {}, 1j, float("nan"), float("inf"), -float("inf"), 10**400]
NOT_NUMBERS += [np.bool_(True), np.array(True), np.array([0.5]), np.array("0.5"), np.complex64(0.5), np.float32("nan")]
NOT_NUMBERS += [torch.tensor(True), torch.tensor([0.5]), torch.tensor(0.5, device="meta"), torch.tensor(float("inf"))]


@st.composite
def curves(draw):
    """Ascending distinct taus with non-increasing sparsities, as a checkpoint may carry them."""
    size = draw(st.integers(1, 8))
    taus = sorted(draw(st.lists(st.floats(0.01, 1.05), min_size=size, max_size=size, unique=True)))
    sparsities = sorted(draw(st.lists(st.floats(0, 0.99), min_size=size, max_size=size)), reverse=True)
    return list(zip(taus, sparsities, strict=True))


@given(st.floats(MIN_FLOAT32, MAX_TAU))
def test_taus_in_range_are_kept(value):
    """Where float32 tells them from 1."""
    assert parse_tau(value) == (1.0 if np.float32(value) == 1 else value)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (1, 1.0),
        (1.05, 1.05),
        (0.8, 0.8),
        (Fraction(4, 5), 0.8),
        (np.float64(0.8), 0.8),
        (np.float32(0.8), float(np.float32(0.8))),
        (np.float16(0.5), 0.5),
        (np.float32(1.05), float(np.float32(1.05))),
        (np.int64(1), 1.0),
        (np.array(0.8), 0.8),
        (torch.tensor(0.8), float(np.float32(0.8))),
        (torch.tensor(0.8, dtype=torch.float64, requires_grad=True), 0.8),
        (torch.tensor(1), 1.0),
    ],
    ids=repr,
)
def test_tau_is_a_float(value, number):
    assert parse_tau(value) == resolve_tau({"tau": value}, default_tau=0.5, tau_curve=None) == number
    assert type(parse_tau(value)) is float


@pytest.mark.parametrize("sparsity", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)], ids=repr)
def test_a_sparsity_is_any_number_too(sparsity):
    assert parse_sparsity(sparsity) == 0.5
    assert resolve_tau({"sparsity": sparsity}, default_tau=1.0, tau_curve=CURVE) == pytest.approx(0.7333, abs=1e-4)


def test_neither_numpy_nor_torch_is_imported_to_know_their_numbers():
    code = "import sys, prunepath_vllm.tau; sys.exit(bool({'numpy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "value", [5e-324, 1e-300, 1e-40, math.nextafter(MIN_FLOAT32, 0), np.float32(1e-45), torch.tensor(1e-40)], ids=repr
)
def test_what_float32_may_take_for_padding_is_refused(value):
    """Workers hold taus in float32; one of 0 marks padding, for which no expert runs."""
    message = r"^tau must be at least 1.1754943508222875e-38, the smallest normal float32, got "
    with pytest.raises(TauError, match=message):
        parse_tau(value)
    with pytest.raises(TauError, match=message):
        parse_tau_list(f"0.5,{float(value)!r}")
    with pytest.raises(TauError, match=r"tau\.min must be at least"):
        parse_tau_range({"min": value, "max": 0.5})
    assert parse_tau(MIN_FLOAT32) == MIN_FLOAT32 == np.finfo(np.float32).tiny
    assert resolve_tau({"sparsity": 1e-300}, default_tau=0.5, tau_curve=CURVE) == 1.0


@pytest.mark.parametrize("value", [0.99999999, 1 - 2**-25, math.nextafter(1, 0), 1 + 1e-12], ids=repr)
def test_what_is_1_in_float32_is_dense_for_everybody(value):
    assert parse_tau(value) == 1.0
    assert parse_tau(1 - 2**-24) == 1 - 2**-24 == np.float32(1 - 2**-24)
    assert tau_for_sparsity([(0.5, 0.5), (1.0, 0.0)], 1e-9) == 1.0
    assert tau_for_sparsity([(0.5, 0.5), (value, 0.0)], 0.0) == 1.0


@given(st.one_of(st.floats(max_value=0), st.floats(min_value=math.nextafter(MAX_TAU, 2)), st.integers(2), st.just(0)))
def test_taus_out_of_range_are_refused(value):
    with pytest.raises(TauError) as caught:
        parse_tau(value)
    assert str(caught.value).startswith("tau must be a number in (0, 1.05], got ")
    assert caught.value.parameter == "tau"
    assert caught.value.value is value
    assert isinstance(caught.value, PrunePathError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: repr(value)[:12])
def test_only_plain_numbers(value):
    for parse, name in ((parse_tau, "tau"), (parse_sparsity, "sparsity")):
        with pytest.raises(TauError, match=f"^{name} must be") as caught:
            parse(value)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999])
def test_sparsity_in_range(value):
    assert parse_sparsity(value) == value


@pytest.mark.parametrize("value", [1, 1.0, -0.001, 2])
def test_sparsity_out_of_range(value):
    with pytest.raises(TauError, match=r"sparsity must be a number in \[0, 1\), got"):
        parse_sparsity(value)


@pytest.mark.parametrize(
    ("sparsity", "tau"), [(0.9, 0.4), (0.7, 0.6), (0.8, 0.5), (0.55, 0.7), (0.0, 1.0), (0.95, 0.4), (0.2, 0.9)]
)
def test_interpolation(sparsity, tau):
    assert tau_for_sparsity(CURVE, sparsity) == pytest.approx(tau)


def test_a_flat_piece_gives_its_largest_tau():
    assert tau_for_sparsity([(0.4, 0.5), (0.6, 0.5), (1.0, 0.0)], 0.5) == 0.6
    assert tau_for_sparsity([(0.5, 0.0), (0.9, 0.0)], 0.3) == 0.9


@given(curves(), st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted))
def test_more_sparsity_never_means_a_larger_tau(curve, targets):
    less, more = (tau_for_sparsity(curve, target) for target in targets)
    assert more <= less + 1e-12
    assert curve[0][0] - 1e-12 <= more
    assert less <= curve[-1][0] + 1e-12


@given(curves())
def test_measured_points_are_met(curve):
    for _, sparsity in curve:
        same_cost = [tau for tau, other in curve if other == sparsity]
        assert tau_for_sparsity(curve, sparsity) == pytest.approx(max(same_cost))


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        (None, 0.7),
        ({}, 0.7),
        ({"tau": None, "sparsity": None}, 0.7),
        ({"other": "x"}, 0.7),
        ({"tau": 0.3}, 0.3),
        ({"tau": 1}, 1.0),
        ({"sparsity": 0.4}, 0.8),
        ({"sparsity": 0}, 1.0),
    ],
    ids=str,
)
def test_resolve(requested, expected):
    assert resolve_tau(requested, default_tau=0.7, tau_curve=CURVE) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("requested", "curve", "message", "parameter"),
    [
        ({"tau": 0.5, "sparsity": 0.5}, CURVE, r"tau \(0.5\) and sparsity \(0.5\) were both given", "sparsity"),
        ({"sparsity": 0.5}, None, r"sparsity \(0.5\) needs a checkpoint with a measured tau_curve", "sparsity"),
        ({"sparsity": 1.0}, CURVE, "sparsity must be", "sparsity"),
        ({"sparsity": "high"}, None, "sparsity must be", "sparsity"),
        ({"tau": False}, CURVE, "tau must be", "tau"),
    ],
    ids=["both", "no curve", "range", "type before curve", "bool"],
)
def test_resolve_refuses(requested, curve, message, parameter):
    with pytest.raises(TauError, match=message) as caught:
        resolve_tau(requested, default_tau=1.0, tau_curve=curve)
    assert caught.value.parameter == parameter
