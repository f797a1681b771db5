"""The knob: which values are valid, what a target sparsity means, and what the errors say."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunepath_vllm.errors import PrunePathError, TauError
from prunepath_vllm.tau import MAX_TAU, parse_sparsity, parse_tau, resolve_tau, tau_for_sparsity

CURVE = [(0.4, 0.9), (0.6, 0.7), (0.8, 0.4), (1.0, 0.0)]
NOT_NUMBERS = [True, False, None, "0.5", [0.5], (0.5,), {}, 1j, float("nan"), float("inf"), -float("inf"), 10**400]


@st.composite
def curves(draw):
    """Ascending distinct taus with non-increasing sparsities, as a checkpoint may carry them."""
    size = draw(st.integers(1, 8))
    taus = sorted(draw(st.lists(st.floats(0.01, 1.05), min_size=size, max_size=size, unique=True)))
    sparsities = sorted(draw(st.lists(st.floats(0, 0.99), min_size=size, max_size=size)), reverse=True)
    return list(zip(taus, sparsities, strict=True))


@given(st.floats(0, MAX_TAU, exclude_min=True))
def test_taus_in_range_are_kept(value):
    assert parse_tau(value) == value


@pytest.mark.parametrize("value", [1, 1.0, 1.05, 5e-324, 0.8])
def test_tau_is_a_float(value):
    assert parse_tau(value) == value
    assert type(parse_tau(value)) is float


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
