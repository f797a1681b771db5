"""Kernels on int8 and float8 weights under Triton's interpreter; run by test_quantised_kernels.py in its own process.

The references multiply by the dequantised weights; those of products that quantise their inputs quantise them too.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from interpreted_kernels import (
    EVERY_PATH,
    NO_TUNING,
    SHAPES,
    TOLERANCE,
    check_layer,
    error,
    expected_gates,
    make_case,
    mixed_taus,
    poisoned_memory,  # noqa: F401  in use here too
    reference_ffn,
    routed_by_reference,  # noqa: F401
)

from prunepath_vllm.benchmarks import float32
from prunepath_vllm.config import EXPERT_DTYPES
from prunepath_vllm.conversion.quantize import quantised_weights
from prunepath_vllm.conversion.rounding import LARGEST
from prunepath_vllm.errors import ConfigError
from prunepath_vllm.kernels import common, ffn, float8, quantised
from prunepath_vllm.kernels.common import widen
from prunepath_vllm.kernels.dense import dense_ffn
from prunepath_vllm.kernels.ffn import routed_ffn
from prunepath_vllm.kernels.grouped import GroupedConfig, grouped_ffn
from prunepath_vllm.kernels.layer import LayerSpec, RoutingRule, Weights, dequantise
from prunepath_vllm.kernels.routing import Routing

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture(params=["int8", "float8_e4m3fn", "float8_e4m3fn-converted"])
def stored(request, monkeypatch) -> str:
    """An expert_dtype; float8 by its bits, as GPUs before compute capability 8.9 read it, and converted."""
    name, _, converted = request.param.partition("-")
    monkeypatch.setattr(common, "converts_float8", lambda device: bool(converted))
    return name


def quantised_case(stored: str, *shape: int, **options):
    """:func:`make_case` with weights in `stored`, every neuron's rows of another size."""
    x, router, weights, spec = make_case(*shape, **options)
    for rows in (weights.w_in, weights.w_out_t):
        rows.mul_(torch.linspace(0.25, 2, len(rows))[:, None])
    return x, router, quantised_weights(weights, stored), replace(spec, expert_dtype=getattr(torch, stored))


@triton.jit
def widen_kernel(w, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, widen(tl.load(w + i), out.dtype.element_ty))


@DTYPES
def test_every_stored_value_is_widened_exactly(stored, dtype):
    values = torch.arange(256).to(torch.uint8).view(getattr(torch, stored))
    values = torch.where(values.float().isfinite(), values.float(), 0.0).to(values.dtype)
    out = torch.empty(256, dtype=dtype)
    widen_kernel[(1,)](common.readable(values), out, N=256)
    assert torch.equal(out.float(), values.float())


@DTYPES
@pytest.mark.parametrize("path", NO_TUNING)
def test_one_token(path, stored, dtype):
    x, *layer = quantised_case(stored, 1, 12, 8, 48, dtype=dtype)
    check_layer(path, x, torch.tensor([0.6]), *layer)


@pytest.mark.parametrize(
    ("path", "shape"),
    [(path, shape) for shape in (SHAPES[2], SHAPES[-1]) for path in NO_TUNING if path != "fused"],
    ids=str,
)
def test_mixed_taus(path, shape, stored):
    x, *layer = quantised_case(stored, *shape)
    check_layer(path, x, mixed_taus(shape[0]), *layer)


@pytest.mark.parametrize(("glu", "bias"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("path", "num_tokens"), EVERY_PATH)
def test_with_and_without_biases(path, num_tokens, glu, bias, stored):
    x, *layer = quantised_case(stored, num_tokens, 6, 8, 32, glu=glu, bias=bias, activation="gelu", dtype=torch.float16)
    check_layer(path, x, torch.full((num_tokens,), 0.7), *layer, gates=("sigmoid",))


@pytest.mark.parametrize("size", [1, 3, 12, 28])
@pytest.mark.parametrize(("path", "num_tokens"), [("fused", 1), ("split", 8), ("dense", 8), ("grouped", 8)])
@pytest.mark.usefixtures("routed_by_reference")
def test_every_expert_size(path, num_tokens, size, stored):
    x, *layer = quantised_case(stored, num_tokens, max(2, 24 // size), size, 33)
    check_layer(path, x, mixed_taus(num_tokens), *layer, gates=("sigmoid" if size % 2 else "none",))


@pytest.mark.parametrize("size", [3, 20])
def test_every_expert_size_in_a_long_batch(size, stored):
    x, router, weights, spec = quantised_case(stored, 700, 4, size, 17)
    gates = expected_gates(x, mixed_taus(700), router, RoutingRule(gate="sigmoid"))
    y = grouped_ffn(x, weights, Routing(gates, None), spec, GroupedConfig(block_m=128, block_k=32, group=8))
    assert error(y, reference_ffn(x, gates, weights, "silu", True)) < 1e-5


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize(("path", "num_tokens"), EVERY_PATH)
def test_weights_of_any_size_stay_within_float16(path, num_tokens, size, stored):
    """A neuron times its scale alone would be subnormal in float16 with the first size, and with usual weights near."""
    x, router, weights, spec = quantised_case(stored, num_tokens, 6, 8, 32, bias=False, dtype=torch.float16)
    weights.scale_out.mul_(size / (LARGEST[stored] * weights.scale_out.max()))
    check_layer(path, x, mixed_taus(num_tokens), router, weights, spec, gates=("sigmoid",))


@pytest.mark.parametrize(
    ("num_tokens", "sms", "dtype"),  # every pair of values, of every stored dtype
    [
        (1, 1, torch.float32), (1, 132, torch.float16), (17, 1, torch.float16), (17, 132, torch.float32),
        (70, 1, torch.float32), (70, 132, torch.float16),
    ],
)  # fmt: skip
def test_products(monkeypatch, num_tokens, sms, stored, dtype):
    monkeypatch.setattr(quantised, "num_sms", lambda device: sms)
    x, _, weights, _ = quantised_case(stored, num_tokens, 75, 4, 290, glu=False, dtype=dtype)
    first, second = (
        dequantise(*pair, torch.float32)
        for pair in ((weights.w_in, weights.scale_in), (weights.w_out_t, weights.scale_out))
    )
    for bias in (weights.b_in, None):
        got = quantised.product(x, weights.w_in, weights.scale_in, bias)
        want = F.linear(x.float(), first, None if bias is None else bias.float())
        assert error(got, want) < TOLERANCE[dtype]
    neurons = torch.randn(num_tokens, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    folded = (neurons.float() * weights.scale_out * common.FOLDED.value).to(dtype)
    for bias in (weights.b_out, None):
        got = quantised.product(folded, weights.w_out_t, None, bias)
        want = neurons.float() @ second + (0 if bias is None else bias.float())
        assert got.dtype == dtype
        assert error(got, want) < TOLERANCE[dtype]


def test_transposed():
    weight = torch.randn(70, 130).to(torch.float8_e4m3fn)
    assert torch.equal(quantised.transposed(weight).float(), weight.float().t())


@DTYPES
def test_tokens_are_quantised_by_their_largest_value(dtype):
    """On values that float8 has: the interpreter's own rounding to it loses carries."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 5000, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn).to(dtype)
    x[:, 4999] = -448
    factors = torch.tensor([1, 0.25, 0, 2, 2**-6])
    got, scale = float8.quantise_tokens(x * factors[:, None].to(dtype))
    assert torch.equal(scale, factors.clamp(min=1e-12 / 448)[:, None])
    assert torch.equal(got.float(), torch.where(factors[:, None] == 0, 0.0, x.float()))
    most, scale = float8.quantise_tokens(torch.full((1, 3), 3.3, dtype=dtype))
    assert most.float().eq(448).all()


def float8_tokens(x):
    """``float8.quantise_tokens`` with PyTorch's rounding: the interpreter's own loses carries."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


@pytest.fixture
def float8_products(monkeypatch) -> list[tuple[int, ...]]:
    """W8A8 in float16, which the interpreter rounds to as it should, with the library's products in float32.

    The rest is for a GPU: bfloat16, the library's product, rounding to float8.
    """
    calls: list[tuple[int, ...]] = []

    def scaled_mm(a, b, scale_a, scale_b, out_dtype, bias=None):
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        calls.append((*b.shape, scale_a.numel(), scale_b.numel()))
        return ((a.float() @ b.float()) * scale_a * scale_b + (0 if bias is None else bias.float())).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    for module in (quantised, ffn):
        monkeypatch.setattr(module, "quantise_tokens", float8_tokens)
    monkeypatch.setattr(quantised, "quantises_activations", lambda spec, weights: True)
    monkeypatch.setattr(quantised, "WIDENED_TOKENS", 16)
    return calls


@pytest.mark.parametrize("unscaled", [True, False], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("glu", [True, False], ids=["glu", "plain"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "all"])
def test_float8_products(float8_products, monkeypatch, glu, gated, unscaled):
    monkeypatch.setattr(quantised, "UNSCALED_TOKENS", 20 if unscaled else 19)
    x, router, weights, spec = quantised_case("float8_e4m3fn", 20, 12, 8, 48, glu=glu, dtype=torch.float16)
    gates = expected_gates(x, mixed_taus(20), router, RoutingRule(gate="sigmoid"))
    # What has no scales yet leaves float16's range, not bfloat16's: the library's output is the latter.
    y = dense_ffn(x, weights, spec, gates if gated else None)
    rows = 96 * (1 + glu)
    assert float8_products == [(48, rows, 1, 1) if unscaled else (48, rows, 20, rows), (96, 48, 20, 48)]
    gates = gates if gated else torch.ones_like(gates)
    want = float32.layer_output(x, gates, weights, spec, (True, True, True))
    assert error(y, want) < 1e-2
    # It is another function than that of the inputs as they are, by about what the inputs' rounding makes.
    assert 0.01 < error(want, reference_ffn(x, gates, weights, "silu", glu)) < 0.08


@pytest.mark.parametrize("glu", [True, False], ids=["glu", "plain"])
@pytest.mark.parametrize("num_tokens", [3, 20])
@pytest.mark.usefixtures("float8_products")
def test_float8_products_of_few_experts(glu, num_tokens):
    x, router, weights, spec = quantised_case("float8_e4m3fn", num_tokens, 12, 8, 48, glu=glu, dtype=torch.float16)
    tau = mixed_taus(num_tokens)
    gates = expected_gates(x, tau, router, RoutingRule(gate="sigmoid"))
    gated = replace(spec, rule=RoutingRule(gate="sigmoid"))
    y = routed_ffn(x, tau, router, weights, gated, tuning=NO_TUNING["split"])
    want = float32.layer_output(x, gates, weights, spec, (True, False, False))
    assert error(y, want) < 5e-3
    assert 0.005 < error(want, reference_ffn(x, gates, weights, "silu", glu)) < 0.08


def test_where_activations_are_quantised(monkeypatch):
    monkeypatch.setattr(float8, "converts_float8", lambda device: True)
    spec = LayerSpec(48, 12, 8, torch.bfloat16, expert_dtype=torch.float8_e4m3fn)
    weights = quantised_weights(Weights(torch.ones(192, 48), None, torch.ones(96, 48), None), "float8_e4m3fn")
    for path, tokens, expected in (
        ("fused", 1, (False, False, False)),
        ("split", 8, (True, False, False)),
        ("dense", 16, (True, False, True)),
        ("dense", 128, (True, False, True)),
        ("dense", 129, (True, True, True)),
        ("grouped", 5000, (False, True, False)),
    ):
        assert quantised.float8_inputs(spec, weights, tokens, path) == expected
    for changes in (
        dict(quantise_activations=False), dict(dtype=torch.float16), dict(dtype=torch.float32), dict(hidden=40),
        dict(expert_size=2),
    ):  # fmt: skip
        assert quantised.float8_inputs(replace(spec, **changes), weights, 5000, "dense") == (False, False, False)
    weights = quantised_weights(Weights(torch.ones(192, 48), None, torch.ones(96, 48), None), "int8")
    assert not float8.quantises_activations(spec, weights)
    monkeypatch.setattr(float8, "converts_float8", lambda device: False)
    assert not float8.quantises_activations(spec, weights)


def test_weights_of_another_dtype_are_refused(stored):
    x, router, weights, spec = quantised_case(stored, 3, 12, 8, 32)
    other = replace(spec, expert_dtype=next(getattr(torch, name) for name in EXPERT_DTYPES if name != stored))
    tau = mixed_taus(3)
    with pytest.raises(ConfigError, match=r"x and both linears: .*expected torch\.float32, torch"):
        routed_ffn(x, tau, router, weights, other, tuning=NO_TUNING["split"])
    _, _, plain, _ = make_case(3, 12, 8, 32)
    with pytest.raises(ConfigError, match=r"x and both linears: .*without scales"):
        routed_ffn(x, tau, router, plain, spec, tuning=NO_TUNING["split"])
    with pytest.raises(ConfigError, match=r"expert_dtype torch\.int16; expected None or"):
        replace(spec, expert_dtype=torch.int16)
