"""Properties of selection, configuration and the knob over generated input, beside the examples of their own tests."""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import ConfigError, TauError
from prunepath_vllm.kernels.reference import ffn_sparsity, select_experts
from prunepath_vllm.tau import resolve_tau, tau_for_sparsity

LOGITS = npst.arrays(
    np.float32, npst.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.floats(-30, 30, width=32)
)
MARGIN = 1e-5
"""Nothing is asked of a sum this close to tau: in float32 the order of additions decides."""


def select(logits: np.ndarray, taus: np.ndarray, **rule: Any) -> np.ndarray:
    rule = {"selection": "cumulative_mass", "threshold": None, **rule}
    return select_experts(torch.from_numpy(logits), torch.from_numpy(taus), **rule).numpy()


def taus_for(data: st.DataObject, logits: np.ndarray) -> np.ndarray:
    shape = len(logits)
    return data.draw(npst.arrays(np.float32, shape, elements=st.floats(0, np.float32(1.05).item(), width=32)))


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


@given(LOGITS, st.data())
@settings(deadline=None)
def test_active_experts_hold_less_than_tau_and_one_more_would_not(logits, data):
    """As many experts as fit below tau, and the top one always."""
    taus = taus_for(data, logits)
    active = select(logits, taus)
    for row, tau in enumerate(taus.tolist()):
        mass = softmax(logits[row])
        assert active[row].any() == (tau > 0)
        if not 0 < tau < 1:
            assert active[row].all() == (tau >= 1)
            continue
        assert mass[active[row]].max() >= mass.max() - MARGIN
        if active[row].sum() > 1:
            assert mass[active[row]].sum() < tau + MARGIN
        if not active[row].all():
            assert mass[active[row]].sum() + mass[~active[row]].max() >= tau - MARGIN


@given(LOGITS, st.data())
@settings(deadline=None, max_examples=50)
def test_no_row_minds_the_others(logits, data):
    taus = taus_for(data, logits)
    rule = data.draw(st.sampled_from([{}, {"selection": "threshold", "threshold": 0.4}]))
    together = select(logits, taus, **rule)
    order = np.array(data.draw(st.permutations(range(len(logits)))))
    np.testing.assert_array_equal(select(logits[order], taus[order], **rule), together[order])
    for row in range(len(logits)):
        np.testing.assert_array_equal(select(logits[row : row + 1], taus[row : row + 1], **rule)[0], together[row])


@given(LOGITS, st.data())
@settings(deadline=None, max_examples=50)
def test_sparsity_falls_with_tau(logits, data):
    taus = np.sort(taus_for(data, logits))
    for row in logits:
        spread = np.repeat(row[None], len(taus), axis=0)
        sparsity = ffn_sparsity(torch.from_numpy(select(spread, taus)))
        assert (sparsity.diff() <= 0).all()


@given(LOGITS, st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.data())
@settings(deadline=None, max_examples=50)
def test_threshold_selection_is_the_sigmoid_above_it(logits, low, high, data):
    assume(low < high)
    taus = taus_for(data, logits)
    wide, narrow = (select(logits, taus, selection="threshold", threshold=value) for value in (low, high))
    assert (wide | ~narrow).all()
    assert wide[taus >= 1].all()
    assert not wide[taus == 0].any()
    routed = (taus > 0) & (taus < 1)
    gates = 1 / (1 + np.exp(-logits[routed].astype(np.float64)))
    clear = np.abs(gates - low) > MARGIN
    np.testing.assert_array_equal(wide[routed][clear], (gates > low)[clear])


@st.composite
def curves(draw) -> list[list[float]]:
    taus = sorted(draw(st.lists(st.floats(0.01, 1.05), min_size=1, max_size=6, unique=True)))
    size = len(taus)
    sparsities = sorted(draw(st.lists(st.floats(0, 0.99), min_size=size, max_size=size)), reverse=True)
    return [list(point) for point in zip(taus, sparsities, strict=True)]


@st.composite
def blocks(draw) -> dict[str, Any]:
    """A valid prunepath_config block, every field given."""
    selection = draw(st.sampled_from(["cumulative_mass", "threshold"]))
    source = st.none() | st.text(max_size=5)
    return {
        "format_version": 1,
        "num_experts": draw(st.integers(1, 10**6)),
        "expert_size": draw(st.integers(1, 10**6)),
        "selection": selection,
        "threshold": draw(st.floats(0.001, 0.999)) if selection == "threshold" else None,
        "gate": draw(st.sampled_from(["sigmoid", "none"])),
        "dense_positions": draw(st.integers(0, 10**6)),
        "default_tau": draw(st.floats(0.001, 1.05)),
        "tau_curve": draw(st.none() | curves()),
        "split": {
            "method": draw(st.sampled_from(["kmeans", "coactivation", "random"])),
            "seed": draw(st.integers(-(2**40), 2**40)),
            "source": draw(source),
        },
        "base_model": draw(source),
    }


def is_int(low: float) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= low


def is_number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low < value <= high


def is_tau(value: Any) -> bool:
    return type(value) in (int, float) and 2.0**-126 <= value <= 1.05


def is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def right_curve(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, list) or not value:
        return False
    if not all(isinstance(point, list) and len(point) == 2 for point in value):
        return False
    in_range = all(is_tau(tau) and type(s) in (int, float) and 0 <= s < 1 for tau, s in value)
    return in_range and all(a[0] < b[0] and a[1] >= b[1] for a, b in itertools.pairwise(value))


RIGHT: dict[tuple[str, ...], Callable[[Any], bool]] = {
    ("format_version",): lambda value: type(value) in (int, float) and value in (1, 2),
    ("num_experts",): is_int(1),
    ("expert_size",): is_int(1),
    ("selection",): lambda value: value in ("cumulative_mass", "threshold"),
    ("threshold",): lambda value: value is None or is_number(0, 1)(value),
    ("gate",): lambda value: value in ("sigmoid", "none"),
    ("dense_positions",): is_int(0),
    ("default_tau",): is_tau,
    ("tau_curve",): right_curve,
    ("split",): lambda value: False,
    ("split", "method"): lambda value: value in ("kmeans", "coactivation", "random"),
    ("split", "seed"): is_int(-math.inf),
    ("split", "source"): is_text_or_null,
    ("base_model",): is_text_or_null,
}
"""What each field may be."""


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


JSON_VALUES = st.one_of(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    st.sampled_from([10**400, -(10**400), "1", "x" * 10**5, nested(900), {}, [[0.5, 0.5, 0.5]], [["0.5", 0.5]]]),
    st.lists(st.floats() | st.lists(st.floats() | st.text(max_size=2), max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=3),
)


@given(blocks())
def test_a_configuration_round_trips_through_json(block):
    parsed = PrunePathConfig.parse(json.loads(json.dumps(block)))
    assert parsed.to_json() == block
    assert PrunePathConfig.parse(json.loads(json.dumps(parsed.to_json()))) == parsed


@given(blocks(), st.sampled_from(list(RIGHT)), JSON_VALUES)
@settings(max_examples=300, deadline=None)
def test_every_wrong_value_is_refused_by_its_fields_name(block, path, value):
    assume(not RIGHT[path](value))
    *outer, name = path
    (block[outer[0]] if outer else block)[name] = value
    message = refusal(block)
    assert ".".join(path) in message
    assert len(message) < 300


@given(blocks(), st.sampled_from(["selection", "threshold"]), st.floats(0.1, 0.9))
def test_selection_and_threshold_go_together(block, changed, threshold):
    other = {"cumulative_mass": "threshold", "threshold": "cumulative_mass"}
    if changed == "selection":
        block["selection"] = other[block["selection"]]
    else:
        block["threshold"] = threshold if block["threshold"] is None else None
    assert "threshold is" in refusal(block)


@given(blocks(), st.sampled_from(["format_version", "num_experts", "expert_size", "gate", "split"]))
def test_no_needed_field_may_be_missing(block, name):
    del block[name]
    assert f"prunepath_config.{name}" in refusal(block)


@given(blocks(), st.text(max_size=10), st.integers(), st.booleans())
def test_no_field_may_be_unknown(block, name, value, inner):
    place = block["split"] if inner else block
    assume(name not in place)
    place[name] = value
    assert "Extra inputs are not permitted" in refusal(block)


def refusal(block: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        PrunePathConfig.parse(block)
    return str(caught.value)


@given(st.none() | JSON_VALUES, st.none() | JSON_VALUES, st.none() | curves())
@settings(max_examples=300, deadline=None)
def test_a_request_gets_a_tau_in_range_or_an_error_that_names_the_parameter(tau, sparsity, curve):
    requested = {"tau": tau, "sparsity": sparsity}
    right = {name: value for name, value in requested.items() if value is not None}
    good = {"tau": is_tau, "sparsity": lambda value: type(value) in (int, float) and 0 <= value < 1}
    if len(right) < 2 and all(good[name](value) for name, value in right.items()) and (sparsity is None or curve):
        resolved = resolve_tau(requested, default_tau=0.7, tau_curve=curve)
        assert type(resolved) is float
        if sparsity is None:
            expected = 0.7 if tau is None else tau
            assert resolved == (1 if np.float32(expected) == 1 else expected)
        else:
            assert resolved == tau_for_sparsity(curve, sparsity)
            assert curve[0][0] <= resolved <= curve[-1][0] or math.isclose(resolved, curve[-1][0])
        return
    with pytest.raises(TauError) as caught:
        resolve_tau(requested, default_tau=0.7, tau_curve=curve)
    assert caught.value.parameter in right
    assert caught.value.parameter in str(caught.value)
