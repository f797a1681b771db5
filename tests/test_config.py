"""The ``prunepath_config`` block: what parses, what is refused and how, and the family table."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FAMILY_NAMES, INTERMEDIATE, LAYERS, build_dense, split_gate_up

from prunepath_vllm.config import PrunePathConfig, check_dense_shape
from prunepath_vllm.errors import ConfigError
from prunepath_vllm.families import FAMILIES, family_of

FAMILY = {family.name: family for family in FAMILIES}


def block(**changes):
    fields = dict(
        format_version=1,
        num_experts=8,
        expert_size=32,
        selection="cumulative_mass",
        threshold=None,
        gate="none",
        dense_positions=0,
        default_tau=1.0,
        tau_curve=[[0.5, 0.8], [1.0, 0.0]],
        split=dict(method="kmeans", seed=0, source="weights"),
        base_model="tiny",
    )
    fields.update(changes)
    return {name: value for name, value in fields.items() if value is not ...}


def test_a_block_round_trips_through_json():
    parsed = PrunePathConfig.parse(json.loads(json.dumps(block())))
    assert parsed.to_json() == block()
    assert PrunePathConfig.parse(parsed.to_json()) == parsed
    assert PrunePathConfig.parse(parsed) is parsed
    assert parsed.intermediate_size == 256


def test_optional_fields_have_defaults():
    required = {name: block()[name] for name in ("format_version", "num_experts", "expert_size", "gate", "split")}
    parsed = PrunePathConfig.parse(required)
    assert (parsed.selection, parsed.dense_positions, parsed.default_tau) == ("cumulative_mass", 0, 1.0)
    assert parsed.tau_curve is None
    assert parsed.tau_for_sparsity(0.5) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format_version=3), "format_version: 3 .* expected 1 or 2"),
        (dict(format_version=...), "format_version: None"),
        (dict(format_version=True), "format_version: True"),
        (dict(format_version="1"), "format_version: '1'"),
        (dict(num_experts=0), "num_experts: .*got 0"),
        (dict(num_experts=8.0), r"num_experts: .*got 8\.0"),
        (dict(num_experts=True), "num_experts: .*got True"),
        (dict(expert_size=-1), "expert_size: .*got -1"),
        (dict(expert_size=...), "expert_size: Field required"),
        (dict(selection="top_k"), "selection: .*got 'top_k'"),
        (dict(gate="softmax"), "gate: .*got 'softmax'"),
        (dict(gate=...), "gate: Field required"),
        (dict(dense_positions=-1), "dense_positions: .*got -1"),
        (dict(default_tau=0.0), r"default_tau: .*got 0\.0"),
        (dict(default_tau=1e-300), r"default_tau: .*got 1e-300"),
        (dict(default_tau=1e-40), r"default_tau: .*got 1e-40"),
        (dict(default_tau=1.06), r"default_tau: .*got 1\.06"),
        (dict(default_tau=float("nan")), "default_tau: .*got nan"),
        (dict(threshold=0.5), "threshold is 0.5; expected null with selection 'cumulative_mass'"),
        (dict(selection="threshold"), "threshold is None; expected a number in"),
        (dict(selection="threshold", threshold=1.0), r"threshold is 1\.0; expected"),
        (dict(selection="threshold", threshold=float("nan")), "threshold is nan; expected"),
        (dict(selection="threshold", threshold=1e-50), r"threshold is 1e-50; expected .* in float32 too"),
        (dict(selection="threshold", threshold=1 - 1e-9), r"threshold is 0\.999999999; expected .* in float32 too"),
        (dict(tau_curve=[[1e-300, 0.5], [0.5, 0.1]]), r"\[1e-300, 0\.5\]: expected tau in \[1\.17"),
        (dict(tau_curve=[]), "tau_curve: is empty"),
        (dict(tau_curve=[[0.5, 0.5], [0.4, 0.3]]), "ascending tau"),
        (dict(tau_curve=[[0.4, 0.3], [0.5, 0.5]]), "non-increasing sparsity"),
        (dict(tau_curve=[[0.5, 1.0]]), r"\[0.5, 1.0\]: expected"),
        (dict(tau_curve=[[float("nan"), 0.5]]), r"\[nan, 0.5\]: expected"),
        (dict(tau_curve=[[0.5, 0.5, 0.5]]), "tau_curve.0"),
        (dict(tau_curve=[["0.5", 0.5]]), "tau_curve.0.0"),
        (dict(split=dict(method="magic", seed=0)), "split.method: .*got 'magic'"),
        (dict(split=dict(method="random")), "split.seed: Field required"),
        (dict(split=...), "split: Field required"),
        (dict(router="mlp"), "router: Extra inputs are not permitted"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_a_bad_field_is_named(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        PrunePathConfig.parse(block(**changes))
    assert str(caught.value).startswith("prunepath_config")
    assert "\n" not in str(caught.value)


def test_a_default_that_is_1_in_float32_is_1():
    assert PrunePathConfig.parse(block(default_tau=0.99999999)).default_tau == 1.0


@pytest.mark.parametrize("data", [None, [], "x", 3], ids=repr)
def test_only_an_object_parses(data):
    with pytest.raises(ConfigError, match="prunepath_config: expected an object, got"):
        PrunePathConfig.parse(data)


def test_the_intermediate_size_must_match():
    PrunePathConfig.parse(block()).check_intermediate_size(256)
    with pytest.raises(ConfigError, match=r"8 \* expert_size 32 = 256; expected .* 512"):
        PrunePathConfig.parse(block()).check_intermediate_size(512)


@given(st.integers(1, 4096), st.integers(-2, 128))
def test_expert_size_must_divide(intermediate_size, expert_size):
    if expert_size > 0 and intermediate_size % expert_size == 0:
        assert check_dense_shape(intermediate_size, expert_size) * expert_size == intermediate_size
    else:
        with pytest.raises(ConfigError, match=f"expert_size {expert_size} does not divide .* {intermediate_size}"):
            check_dense_shape(intermediate_size, expert_size)


@pytest.mark.parametrize(
    ("changes", "tau"),
    [
        (dict(default_tau=0.8), 0.8),
        (dict(default_tau=1.05), 1.05),
        (dict(selection="threshold", threshold=0.5), 0.5),
        (dict(selection="threshold", threshold=0.5, default_tau=0.3), 0.3),
    ],
    ids=["set", "dense", "threshold", "threshold below"],
)
def test_unset_tau(changes, tau):
    assert PrunePathConfig.parse(block(**changes)).unset_tau == tau


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_family_table_describes_the_dense_models(family):
    row, model = FAMILY[family], build_dense(family)
    config, shapes = model.config.to_dict(), {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if row.merged is not None:
        shapes = {name: tuple(t.shape) for name, t in split_gate_up(model.state_dict()).items()}
        assert {row.merged.format(layer) for layer in range(LAYERS)} <= {name for name, _ in model.named_modules()}
    if row.gate is not None:
        assert model.get_submodule(row.attention.format(0)) is model.model.layers[0].self_attn
    config["architectures"] = [type(model).__name__]
    assert family_of(config, converted=False) is row
    assert row.intermediate_size(config) == INTERMEDIATE
    assert row.num_layers(config) == LAYERS
    neurons, hidden = INTERMEDIATE, row.hidden_size(config)
    for layer in range(LAYERS):
        for name in row.inputs(layer):
            assert shapes[f"{name}.weight"] == ((hidden, neurons) if row.conv1d else (neurons, hidden))
        assert shapes[f"{row.output(layer)}.weight"] == ((neurons, hidden) if row.conv1d else (hidden, neurons))
    config.update(model_type=row.model_type, architectures=[row.architecture])
    assert family_of(config, converted=True) is row
    with pytest.raises(ConfigError, match=f"'{row.model_type}' is not a dense family"):
        family_of(config, converted=False)
    with pytest.raises(ConfigError, match="architectures"):
        family_of({**config, "architectures": ["Other"]}, converted=True)
