"""The CPU path of the routed layer against the reference: gathered, masked, packed products, nothing selected."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from prunepath_vllm.activations import ACTIVATIONS
from prunepath_vllm.benchmarks.float32 import layer_output
from prunepath_vllm.errors import ConfigError
from prunepath_vllm.kernels import cpu, native, reference
from prunepath_vllm.kernels.layer import (
    QUANTISED_DTYPES,
    Counters,
    LayerSpec,
    RouterWeights,
    RoutingRule,
    Weights,
    dequantise,
)

HIDDEN, EXPERTS, SIZE = 48, 12, 8
NEURONS = EXPERTS * SIZE


@pytest.fixture(params=[True, False], ids=["native", "pytorch"])
def native_kernel(request, monkeypatch) -> bool:
    """Whether the native kernel is there."""
    if request.param:
        assert cpu.native_tokens(torch.float32) == cpu.NATIVE_TOKENS
    else:
        monkeypatch.setattr(cpu, "native_tokens", lambda *_, **__: 0)
    return request.param


def layer(glu: bool, bias: bool, activation: str, rule: RoutingRule) -> tuple[Weights, LayerSpec]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    rows = 2 * NEURONS if glu else NEURONS
    b_in, b_out = (random(rows), random(HIDDEN)) if bias else (None, None)
    spec = LayerSpec(HIDDEN, EXPERTS, SIZE, torch.float32, ACTIVATIONS[activation], glu, rule)
    return Weights(random(rows, HIDDEN), b_in, random(NEURONS, HIDDEN), b_out), spec


def expected(x: torch.Tensor, scale: torch.Tensor, w: Weights, glu: bool, activation: str) -> torch.Tensor:
    """Expert by expert."""
    act = {"silu": F.silu, "gelu_new": lambda v: F.gelu(v, approximate="tanh"), "relu": F.relu}[activation]
    y = torch.zeros_like(x) if w.b_out is None else w.b_out.expand_as(x).clone()
    pre = F.linear(x, w.w_in, w.b_in)
    h = act(pre[:, :NEURONS]) * pre[:, NEURONS:] if glu else act(pre)
    for expert in range(EXPERTS):
        rows = slice(expert * SIZE, (expert + 1) * SIZE)
        y = y + scale[:, expert, None] * (h[:, rows] @ w.w_out_t[rows])
    return y


@pytest.mark.parametrize("gather", [True, False], ids=["gather", "no-host-reads"])
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("taus", [[0.05], [0.2, 0.3], [0.5, 1.0, 0.9, 1e-6], [1.0, 1.05]], ids=str)
@pytest.mark.parametrize(("glu", "bias", "activation"), [(True, False, "silu"), (False, True, "gelu_new")])
def test_every_share_equals_the_experts_one_by_one(native_kernel, glu, bias, activation, taus, gate, gather):
    routing = dict(selection="cumulative_mass", threshold=None, gate=gate)
    w, spec = layer(glu, bias, activation, RoutingRule(**routing))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(taus), HIDDEN, generator=generator)
    router = torch.randn(EXPERTS, HIDDEN, generator=generator) * 0.3
    tau = torch.tensor(taus)
    scale = reference.expert_weights(reference.router_logits(x, router), tau, **routing)
    read = torch.tensor([5], dtype=torch.int32)
    y = cpu.routed_ffn(x, tau, RouterWeights(router), w, spec, gather=gather, counters=Counters(read=read))
    touched = int((scale != 0).any(0).sum())
    by_touch = touched if native_kernel or touched < cpu.GATHER_BELOW * EXPERTS else EXPERTS
    assert read.item() - 5 == (by_touch if gather else EXPERTS)
    torch.testing.assert_close(y, expected(x, scale, w, glu, activation), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gather", [True, False], ids=["gather", "no-host-reads"])
@pytest.mark.parametrize("rule", [RoutingRule(), RoutingRule(gate="sigmoid"), RoutingRule("threshold", 0.6)], ids=str)
@pytest.mark.parametrize(("glu", "activation"), [(True, "silu"), (False, "gelu_new")], ids=["glu", "plain"])
@pytest.mark.parametrize("tokens", [1, cpu.NATIVE_TOKENS, cpu.NATIVE_TOKENS + 1])
def test_at_least_its_tau_is_every_expert_of_a_large_batch(
    native_kernel, monkeypatch, tokens, glu, activation, rule, gather
):
    """Up to 16 tokens each gets its tau, with the native kernel and without."""
    w, spec = layer(glu, True, activation, rule)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    router = torch.randn(EXPERTS, HIDDEN, generator=generator) * 0.3
    tau = torch.tensor([0.05, 0.3, 1e-6]).repeat(tokens)[:tokens].contiguous()
    if tokens > 1:
        tau[-1] = 0  # padding
    every = not gather or tokens > cpu.NATIVE_TOKENS
    least = (tau > 0).float() if every else tau
    scale = reference.expert_weights(reference.router_logits(x, router), least, **vars(rule))
    active = torch.full((tokens,), 3, dtype=torch.int32)
    read, full = torch.zeros(1, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    if every:
        monkeypatch.setattr(cpu, "select_experts", None)  # nothing is selected
        monkeypatch.setattr(cpu.native, "select_cumulative_mass", None)
        if rule.gate == "none":
            monkeypatch.setattr(cpu, "router_logits", None)
    y = cpu.routed_ffn(
        x, tau, RouterWeights(router), w, replace(spec, at_least=True), gather=gather,
        counters=Counters(active, read, full),
    )  # fmt: skip
    assert torch.equal(active - 3, (scale != 0).sum(1).int())
    if every:
        assert (read.item(), full.item()) == (EXPERTS, 1)
    real = tau > 0
    torch.testing.assert_close(y[real], expected(x, scale, w, glu, activation)[real], atol=1e-5, rtol=1e-5)


def test_a_dtype_that_the_native_kernel_computes_at_any_size_stays_exact(monkeypatch):
    _, spec = layer(True, False, "silu", RoutingRule())
    spec = replace(spec, at_least=True)
    assert [cpu.takes_every_expert(tokens, spec) for tokens in (1, 16, 17, 5000)] == [False, False, True, True]
    monkeypatch.setattr(cpu, "native_tokens", lambda *_, **__: float("inf"))
    assert not cpu.takes_every_expert(5000, spec)


@pytest.mark.parametrize("bias", [True, False])
def test_threshold_may_select_nothing(native_kernel, bias):
    w, spec = layer(False, bias, "relu", RoutingRule("threshold", 0.5))
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    router = RouterWeights(torch.zeros(EXPERTS, HIDDEN), torch.full((EXPERTS,), -5.0))
    y = cpu.routed_ffn(x, torch.full((3,), 0.5), router, w, spec)
    torch.testing.assert_close(y, torch.zeros_like(x) if w.b_out is None else w.b_out.expand_as(x))


@pytest.mark.parametrize("how", ["native", "gathered", "dense", "no host reads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", QUANTISED_DTYPES, ids=str)
@pytest.mark.parametrize("glu", [True, False])
def test_cpu_paths_equal_the_widened_layer(monkeypatch, how, dtype, stored, glu):
    generator = torch.Generator().manual_seed(0)
    spec = LayerSpec(32, 12, 8, dtype, glu=glu)

    def rows(count):
        weight = torch.randn(count, 32, generator=generator) / 6
        scales = weight.abs().amax(1) / 100
        return (weight / scales[:, None]).round().to(stored), scales

    (w_in, scale_in), (w_out, scale_out) = rows(spec.input_rows), rows(spec.neurons)
    bias = None if glu else torch.randn(spec.neurons, generator=generator).to(dtype)
    weights = Weights(w_in, bias, w_out, None, scale_in, scale_out)
    x = torch.randn(5, 32, generator=generator).to(dtype)
    tau = torch.tensor([1.0, 0.5, 0.9, 0.3, 0.7]) if how != "gathered" else torch.full((5,), 1e-6)
    router = RouterWeights(torch.randn(12, 32, generator=generator).to(dtype) * (how != "gathered"))
    gates = reference.expert_weights(
        reference.router_logits(x, router.weight), tau, selection="cumulative_mass", threshold=None, gate="none"
    )
    pre = x.double() @ dequantise(w_in, scale_in, torch.float32).double().T + (0 if bias is None else bias.double())
    neurons = F.silu(pre[:, : spec.neurons]) * pre[:, spec.neurons :] if glu else F.silu(pre)
    expected = reference.scale_neurons(neurons, gates) @ dequantise(w_out, scale_out, torch.float32).double()
    torch.testing.assert_close(layer_output(x, gates, weights, spec).double(), expected, rtol=1e-4, atol=1e-4)
    if how in ("gathered", "dense"):
        monkeypatch.setattr(cpu, "native_tokens", lambda *_, **__: 0)
    monkeypatch.setattr(cpu, "WIDENED_ROWS", 20)  # several blocks, the last a smaller one
    y = cpu.routed_ffn(x, tau, router, weights, spec, gather=how != "no host reads")
    assert (y.double() - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", QUANTISED_DTYPES, ids=str)
def test_every_stored_value_is_widened_exactly(monkeypatch, stored, dtype):
    """All bytes but those that stand for no number, subnormal ones too, in blocks that do not divide the rows."""
    monkeypatch.setattr(cpu, "WIDENED_ROWS", 3)
    values = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(stored)
    rows = values[values.float().isfinite()].view(-1, 2)
    scale = 2.0 ** -torch.arange(len(rows)).remainder(5)
    blocks = [(part, block.clone()) for part, block in cpu._widened(rows, scale, dtype)]
    assert [part.start for part, _ in blocks] == list(range(0, len(rows), 3))
    expected = (rows.float() * scale[:, None]).to(dtype)
    assert torch.equal(torch.cat([block for _, block in blocks]), expected)


@pytest.mark.parametrize("stored", QUANTISED_DTYPES, ids=str)
def test_sums_are_float32_whatever_the_default_dtype(stored):
    """vLLM makes models under another default."""
    rows = torch.randn(600, 8).clamp(-3, 3).mul(20).to(stored)
    h, scale = torch.randn(4, 600), torch.rand(600)
    expected = cpu._product(h, rows, scale)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(cpu._product(h, rows, scale), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_wrong_scales_are_named():
    spec = LayerSpec(8, 2, 4, torch.float32, glu=False)
    int8, ones = torch.ones(8, 8, dtype=torch.int8), torch.ones(8)
    router, x = RouterWeights(torch.zeros(2, 8)), torch.zeros(1, 8)
    for weights, message in (
        (Weights(int8, None, int8, None), "int8.* without scales; expected torch.float32, or linears in torch.int8"),
        (Weights(int8.float(), None, int8.float(), None, ones, ones), "with scales; expected torch.float32, or"),
        (Weights(int8, None, int8.float(), None, ones, ones), "expected torch.float32, torch.int8 and torch.int8"),
        (Weights(int8, None, int8, None, ones[:3], ones), r"scales of the first linear: shape \[3\]; expected \[8\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            cpu.routed_ffn(x, torch.ones(1), router, weights, spec, gather=False)


def test_which_steps_take_the_native_kernel():
    """Those that leave experts out at any size; those of every expert while a library first reorders weights."""
    wide = native.chosen_isa().startswith("avx512")
    for dtype, measured in [
        (torch.float32, True),
        (torch.bfloat16, not torch.cpu._is_amx_tile_supported()),
        (torch.float16, False),
    ]:
        small = cpu.native_tokens(dtype)
        if not cpu.has_fast_product(dtype):
            assert small == float("inf")
            continue
        assert small == cpu.NATIVE_TOKENS
        every, some = torch.ones(17), torch.tensor([0.5] + [1.0] * 16)
        dense = cpu.DENSE_NATIVE_TOKENS if measured and wide else small
        assert cpu.step_tokens(every, dtype, quantised=False) == dense
        assert cpu.step_tokens(some, dtype, quantised=False, at_least=True) == dense
        assert cpu.step_tokens(some, dtype, quantised=False) == (float("inf") if measured else small)
        assert cpu.step_tokens(torch.ones(129), dtype, quantised=True) == cpu.QUANTISED_NATIVE_TOKENS
        assert cpu.step_tokens(torch.full((129,), 0.5), dtype, quantised=True) == float("inf")
