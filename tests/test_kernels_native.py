"""The C++ kernel of the routed layer against the reference in float64, on every instruction set this processor has."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prunepath_vllm.activations import ACTIVATIONS, Activation
from prunepath_vllm.errors import ConfigError
from prunepath_vllm.kernels import cpu, native, reference
from prunepath_vllm.kernels.layer import (
    QUANTISED_DTYPES,
    Counters,
    LayerSpec,
    RouterWeights,
    RoutingRule,
    Weights,
)
from prunepath_vllm.kernels.native import memory

ISAS = native.isas()
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
TAUS = (0.5, 0.0, 0.9, 1.0, 1e-6, 0.2, 1.05, 0.99999)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where nothing else is said: the threads of so small layers mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(generator: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def layer(
    hidden: int,
    experts: int,
    size: int,
    dtype: torch.dtype,
    *,
    glu: bool = True,
    bias: bool = False,
    activation: str = "silu",
    router_dtype: torch.dtype | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> tuple[RouterWeights, Weights, LayerSpec]:
    g = torch.Generator().manual_seed(seed)
    neurons, read = experts * size, dtype if router_dtype is None else router_dtype
    rows, narrow = (2 * neurons if glu else neurons), hidden**-0.5
    weights = Weights(
        random(g, dtype, rows, hidden, scale=narrow),
        random(g, dtype, rows) if bias else None,
        random(g, dtype, neurons, hidden, scale=neurons**-0.5),
        random(g, dtype, hidden) if bias else None,
    )
    down = None if rank is None else random(g, read, rank, hidden, scale=narrow)
    width = hidden if rank is None else rank
    router = RouterWeights(
        random(g, read, experts, width, scale=2 * width**-0.5), random(g, read, experts) if bias else None, down
    )
    return router, weights, LayerSpec(hidden, experts, size, dtype, ACTIVATIONS[activation], glu)


PYTORCH = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda v: F.gelu(v, approximate="tanh"),
    Activation.RELU: F.relu,
}


def expected(
    x: Tensor,
    router_input: Tensor,
    tau: Tensor,
    router: RouterWeights,
    w: Weights,
    spec: LayerSpec,
    *,
    rounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output in float64, and the float32 weight [T, E] of every expert; neurons are rounded to bfloat16 or not."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    narrow = router_input.float() if router.down is None else F.linear(router_input.float(), router.down.float())
    logits = reference.router_logits(narrow, router.weight, router.bias)
    scale = reference.expert_weights(logits, tau, **asdict(spec.rule))
    neurons = w.w_out_t.shape[0]
    pre = F.linear(x.double(), w.w_in.double(), wide(w.b_in))
    h = PYTORCH[spec.activation](pre[:, :neurons])
    if spec.glu:
        h = h * pre[:, neurons:]
    h = reference.scale_neurons(h, scale)
    if rounded:
        h = h.bfloat16().double()
    y = h @ w.w_out_t.double()
    return (y if w.b_out is None else y + w.b_out.double()), scale


def rule(gate: str = "none", threshold: float | None = None) -> RoutingRule:
    return RoutingRule("cumulative_mass" if threshold is None else "threshold", threshold, gate)


def check(
    x: Tensor,
    tau: Tensor,
    layer: tuple[RouterWeights, Weights, LayerSpec],
    isa: str,
    router_input: Tensor | None = None,
) -> None:
    """Output, counts and experts read; the output's memory was NaN before."""
    read = x if router_input is None else router_input
    # Products of pairs want neurons in bfloat16, as PyTorch's bfloat16 layer gives them.
    y, scale = expected(x, read, tau, *layer, rounded=isa == "avx512_bf16" and x.dtype == torch.bfloat16)
    counts = torch.arange(len(x), dtype=torch.int32)
    experts_read = torch.tensor([7], dtype=torch.int64)
    out = torch.full_like(x, torch.nan)
    native.RoutedFFN(*layer, isa=isa)(x, tau, router_input=read, counters=Counters(counts, experts_read), out=out)
    assert torch.equal(counts - torch.arange(len(x)), (scale != 0).sum(1))
    assert experts_read.item() - 7 == (scale != 0).any(0).sum()
    error = (out.double() - y).norm(dim=1)
    assert (error <= LIMITS[x.dtype] * y.norm(dim=1) + 1e-30).all(), error / y.norm(dim=1)


def test_the_kernel_was_built_and_every_machine_has_the_plain_path():
    assert native.unavailable() is None
    assert ISAS[-1] == "plain"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 19, 70])
def test_sizes(isa, dtype, tokens):
    """Hidden sizes with and without a rest, every expert size, one expert, fewer columns than a vector."""
    shapes = [(33, 7, 3), (576, 12, 8), (64, 40, 1), (100, 13, 4), (8, 5, 32), (48, 1, 6), (1, 3, 2), (130, 21, 3)]
    for hidden, experts, size in shapes:
        for glu in (True, False):
            made = layer(hidden, experts, size, dtype, glu=glu, bias=not glu, seed=experts)
            x = random(torch.Generator().manual_seed(tokens), dtype, tokens, hidden)
            for first in range(len(TAUS) if tokens == 1 else 1):
                tau = torch.tensor((TAUS[first:] + TAUS * tokens)[:tokens])
                check(x, tau, made, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("chosen", [rule("sigmoid"), rule(threshold=0.6), rule("sigmoid", 0.4)], ids=str)
def test_rules_activations_and_biases(isa, activation, chosen):
    for dtype in LIMITS:
        for glu in (True, False):
            router, w, spec = layer(40, 10, 4, dtype, glu=glu, bias=True, activation=activation)
            x = random(torch.Generator().manual_seed(1), dtype, 8, 40, scale=3)
            check(x, torch.tensor(TAUS), (router, w, replace(spec, rule=chosen)), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_routers_of_another_type_input_and_rank(isa):
    for dtype in LIMITS:
        for router_dtype in LIMITS:
            for rank in (None, 1, 7, 40, 70):
                made = layer(36, 50, 2, dtype, bias=True, router_dtype=router_dtype, rank=rank)
                g = torch.Generator().manual_seed(2)
                x, other = random(g, dtype, 8, 36), random(g, router_dtype, 8, 36)
                check(x, torch.tensor(TAUS), made, isa, router_input=other)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("experts", [1, 2, 300])
def test_ties_go_to_the_lower_index(isa, experts):
    """All logits equal, and pairs of equal ones."""
    _, w, spec = layer(24, experts, 1, torch.float32)
    x = random(torch.Generator().manual_seed(3), torch.float32, 5, 24)
    tau = torch.tensor([0.1, 0.35, 0.503, 0.7, 0.0])
    pairs = (torch.arange(experts) // 2 % 5).float()
    for bias in (torch.zeros(experts), pairs, -pairs):
        check(x, tau, (RouterWeights(torch.zeros(experts, 24), bias), w, spec), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_selection_of_many_experts(isa):
    """8,192 experts, flat and peaked: what is selected, seen through the counts and the union."""
    made = layer(16, 8192, 1, torch.float32)
    for sharpness in (0.01, 1.0, 8.0):
        x = random(torch.Generator().manual_seed(4), torch.float32, 6, 16, scale=sharpness)
        _, scale = expected(x, x, torch.full((6,), 0.5), *made)
        counts = torch.zeros(6, dtype=torch.int32)
        native.routed_ffn(x, torch.full((6,), 0.5), *made, isa=isa, counters=Counters(counts))
        # Where a cumulative probability falls within float32's rounding of tau, an expert more or less is right.
        assert (counts - (scale != 0).sum(1)).abs().max() <= 1
        assert counts.min() >= 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("experts", [1, 5, 192, 560, 4736])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_selection_alone(isa, experts, tokens):
    generator = torch.Generator().manual_seed(experts + tokens)
    logits = 3 * torch.randn(tokens, experts, generator=generator)
    tau = torch.rand(tokens, generator=generator)
    if tokens > 3:
        tau[:3] = torch.tensor([0.0, 1.0, 1.05])
    got = native.select_cumulative_mass(logits, tau, isa=isa)
    want = reference.select_experts(logits, tau, selection="cumulative_mass", threshold=None)
    # Where a cumulative probability falls within float32's rounding of tau, an expert more or less is right.
    assert (got != want).sum(dim=1).max() <= 1
    assert (got != want).sum() <= 0.1 * tokens
    assert torch.equal(got[tau >= 1], want[tau >= 1])
    assert not got[tau == 0].any()


@pytest.mark.parametrize("isa", ISAS)
def test_selection_alone_of_equal_logits(isa):
    logits = (torch.arange(300) // 2 % 5).float().expand(4, -1).contiguous()
    tau = torch.tensor([0.1, 0.35, 0.503, 0.9])
    want = reference.select_experts(logits, tau, selection="cumulative_mass", threshold=None)
    assert torch.equal(native.select_cumulative_mass(logits, tau, isa=isa), want)


def test_selection_alone_refuses_other_tensors():
    with pytest.raises(ConfigError, match=r"logits is \[2, 4\] float64"):
        native.select_cumulative_mass(torch.zeros(2, 4, dtype=torch.float64), torch.ones(2))
    with pytest.raises(ConfigError, match=r"tau is \[3\] float32 .*expected \[2\]"):
        native.select_cumulative_mass(torch.zeros(2, 4), torch.ones(3))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bias", [True, False])
def test_threshold_may_select_nothing(isa, bias):
    router, w, spec = layer(24, 6, 4, torch.float32, bias=bias)
    router = RouterWeights(torch.zeros_like(router.weight), torch.full((6,), -5.0))
    spec = replace(spec, rule=rule(threshold=0.5))
    x = random(torch.Generator().manual_seed(5), torch.float32, 3, 24)
    read = torch.zeros(1, dtype=torch.int32)
    y = native.routed_ffn(x, torch.full((3,), 0.5), router, w, spec, isa=isa, counters=Counters(read=read))
    assert torch.equal(y, torch.zeros_like(x) if w.b_out is None else w.b_out.expand_as(x))
    assert read.item() == 0


@pytest.mark.parametrize("isa", ISAS)
def test_a_gate_that_underflows_leaves_its_expert_out(isa):
    router, w, spec = layer(24, 6, 4, torch.float32)
    router = RouterWeights(torch.zeros_like(router.weight), torch.tensor([0.0, -200.0, 1.0, -95.0, 200.0, -80.0]))
    x = random(torch.Generator().manual_seed(6), torch.float32, 2, 24)
    check(x, torch.tensor([1.0, 0.9]), (router, w, replace(spec, rule=rule("sigmoid"))), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_numbers_at_the_ends_of_the_types(isa):
    """Subnormal float16 weights and inputs, large activations, infinities and NaN end where PyTorch's do."""
    small = torch.full((8, 4), 6e-8, dtype=torch.float16)
    w = Weights(small, None, torch.ones_like(small), None)
    spec = LayerSpec(4, 2, 4, torch.float16, Activation.RELU, glu=False)
    router = RouterWeights(torch.zeros(2, 4))
    y = native.routed_ffn(small[:1] * 0 + 6e4, torch.ones(1), router, w, spec, router_input=small[:1], isa=isa)
    assert torch.equal(y, torch.full_like(y, 8 * 4 * 2.0**-24 * 6e4))
    values = torch.tensor([1e-7, 3e-8, 65519.0, 65520.0, -0.0, -1e-7, 6.1e-5, torch.inf, -torch.inf, torch.nan, 2049.0])
    for dtype in (torch.float16, torch.bfloat16):
        n = len(values)
        w = Weights(torch.eye(1, n, dtype=dtype), None, torch.zeros(1, n, dtype=dtype), values)
        x = torch.zeros(1, n, dtype=dtype)
        spec = LayerSpec(n, 1, 1, dtype, Activation.RELU, glu=False)
        y = native.routed_ffn(x, torch.ones(1), RouterWeights(torch.zeros(1, n)), w, spec, isa=isa)
        torch.testing.assert_close(y[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)
    made = layer(33, 7, 3, torch.float32)
    for bad in (torch.nan, torch.inf):
        x = torch.zeros(2, 33)
        x[1, 5] = bad
        y = native.routed_ffn(x, torch.full((2,), 0.5), *made, isa=isa)
        assert torch.equal(y[0], torch.zeros(33))
        assert not y[1].isfinite().any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["silu", "gelu_new"])
def test_activations_far_from_zero(isa, activation):
    values = torch.linspace(-120, 120, 481)
    w = Weights(torch.ones(1, 1), None, torch.ones(1, 1), None)
    spec = LayerSpec(1, 1, 1, torch.float32, ACTIVATIONS[activation], glu=False)
    router = RouterWeights(torch.zeros(1, 1))
    layer = native.RoutedFFN(router, w, spec, isa=isa)
    y = layer(values[:, None].contiguous(), torch.ones(481))
    right = PYTORCH[ACTIVATIONS[activation]](values.double()).float()
    torch.testing.assert_close(y[:, 0], right, rtol=2e-6, atol=1e-30 if activation == "silu" else 2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
def test_a_token_depends_neither_on_threads_nor_on_its_batch(isa, dtype, gate):
    router, w, spec = layer(200, 30, 3, dtype, bias=True)
    layer_ = native.RoutedFFN(router, w, replace(spec, rule=rule(gate)), isa=isa)
    x = random(torch.Generator().manual_seed(7), dtype, 140, 200)
    tau = torch.tensor((TAUS * 140)[:140])
    alone = torch.cat([layer_(x[t : t + 1], tau[t : t + 1], num_threads=1) for t in range(140)])
    for threads in (1, 2, 3, 5, 16):
        for tokens in (1, 2, 3, 4, 7, 16, 17, 64, 65, 140):
            assert torch.equal(layer_(x[:tokens], tau[:tokens], num_threads=threads), alone[:tokens]), (threads, tokens)


def quantised(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows in int8 or float8, and their scales."""
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = rows.abs().amax(1) / largest
    narrow = rows / scale[:, None]
    return (narrow.round() if dtype == torch.int8 else narrow).to(dtype), scale


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("stored", QUANTISED_DTYPES, ids=str)
@pytest.mark.parametrize("glu", [True, False])
def test_quantised_rows_with_scales(isa, dtype, stored, glu):
    for hidden, experts, size in ((77, 9, 5), (64, 12, 4), (5, 3, 2)):
        router, w, spec = layer(hidden, experts, size, torch.float32, glu=glu, bias=True)
        (w_in, scale_in), (w_out, scale_out) = quantised(w.w_in, stored), quantised(w.w_out_t, stored)
        narrow = Weights(w_in, w.b_in, w_out, w.b_out, scale_in, scale_out)
        wide = Weights(w_in.float() * scale_in[:, None], w.b_in, w_out.float() * scale_out[:, None], w.b_out)
        spec = replace(spec, dtype=dtype)
        x = random(torch.Generator().manual_seed(8), dtype, 8, hidden)
        tau = torch.tensor(TAUS)
        y, _ = expected(x, x, tau, router, wide, spec)
        out = native.routed_ffn(x, tau, router, narrow, spec, isa=isa)
        assert (out.double() - y).norm() <= LIMITS[dtype] * y.norm()
        if glu:  # the two halves as tensors of their own
            (first, up), (scale, scale_up) = w_in.clone().chunk(2), scale_in.clone().chunk(2)
            split = replace(narrow, w_in=first, w_up=up, scale_in=scale, scale_up=scale_up)
            assert torch.equal(native.routed_ffn(x, tau, router, split, spec, isa=isa), out)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stored", QUANTISED_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_quantised_value_is_read_exactly(isa, stored, dtype):
    """By the first linear, whose row meets one token's only 1, and by the second. bfloat16 holds all of them."""
    values = torch.arange(256, dtype=torch.uint8).view(stored)
    values = values[values.float().isfinite()]
    n = len(values)
    spec = LayerSpec(n, 1, n, dtype, Activation.RELU, glu=False)
    router, ones, eye = RouterWeights(torch.zeros(1, n)), torch.ones(n), torch.eye(n).to(stored)
    diagonal = torch.zeros(n, n, dtype=stored).diagonal_scatter(values.abs() if stored == torch.int8 else values)
    for first, second in ((diagonal, eye), (eye, diagonal)):
        weights = Weights(first, None, second, None, ones, ones)
        y = native.routed_ffn(torch.ones(1, n, dtype=dtype), ones[:1], router, weights, spec, isa=isa)
        right = diagonal.diagonal().float()
        assert torch.equal(y[0].float(), right.relu() if first is diagonal else right)


def test_quantised_weights_need_scales_and_others_have_none():
    router, w, spec = layer(24, 6, 4, torch.float32)
    (w_in, scale_in), (w_out, scale_out) = quantised(w.w_in, torch.int8), quantised(w.w_out_t, torch.int8)
    for bad in (
        Weights(w_in, None, w_out, None),
        Weights(w_in, None, w_out, None, scale_in),
        Weights(w.w_in, None, w.w_out_t, None, scale_in, scale_out),
        Weights(w_in[:24].clone(), None, w_out, None, scale_in[:24], scale_out, w_up=w_in[24:].clone()),
    ):
        with pytest.raises(ConfigError, match="scale_in and scale_out; expected one scale per row"):
            native.RoutedFFN(router, bad, spec)
    with pytest.raises(ConfigError, match=r"first linear is .*int8.*; expected .*float8_e4m3fn"):
        native.RoutedFFN(
            router, Weights(w_in, None, w_out.float().to(torch.float8_e4m3fn), None, scale_in, scale_out), spec
        )


@pytest.mark.parametrize("stored", QUANTISED_DTYPES, ids=str)
def test_quantised_layers_made_ready_are_told_apart_by_their_scales(stored):
    router, w, spec = layer(24, 6, 4, torch.float32)
    (w_in, scale_in), (w_out, scale_out) = quantised(w.w_in, stored), quantised(w.w_out_t, stored)
    x, tau = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.5)
    for factor in (1.0, 2.0):
        scales = scale_in, scale_out * factor
        layer_ = native.ready(router, Weights(w_in, None, w_out, None, *scales), spec)
        wide = Weights(w_in.float() * scales[0][:, None], None, w_out.float() * scales[1][:, None], None)
        wanted, _ = expected(x, x, tau, router, wide, spec)
        torch.testing.assert_close(layer_(x, tau).double(), wanted, rtol=0, atol=1e-5)


def test_no_tokens():
    x = torch.empty(0, 24)
    assert native.routed_ffn(x, torch.empty(0), *layer(24, 6, 4, torch.float32)).shape == (0, 24)


def test_same_as_the_pytorch_path():
    router, w, spec = layer(64, 12, 8, torch.float32, bias=True)
    made = router, w, replace(spec, rule=rule("sigmoid"))
    x = random(torch.Generator().manual_seed(9), torch.float32, 4, 64)
    tau = torch.tensor([0.3, 0.5, 1e-6, 0.8])
    torch.testing.assert_close(native.routed_ffn(x, tau, *made), cpu.routed_ffn(x, tau, *made))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(isa="sse9"), "isa is 'sse9'; expected one that this processor has"),
        (dict(x=torch.zeros(2, 25)), r"x is \[2, 25\] float32 on cpu; expected \[2, 24\]"),
        (dict(x=torch.zeros(24, 2).t()), "x is .* not contiguous"),
        (dict(tau=torch.ones(2, dtype=torch.float64)), r"tau is \[2\] float64"),
        (dict(router=RouterWeights(torch.zeros(5, 24))), r"router weight is \[5, 24\] float32 .*\[6, 24\]"),
        (
            dict(router=RouterWeights(torch.zeros(6, 24), None, torch.zeros(3, 24))),
            r"router_down is \[3, 24\] float32 .*\[24, 24\]",
        ),
        (dict(counters=Counters(torch.zeros(2))), r"active counts is \[2\] float32 on cpu; expected \[2\] int32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(change, message):
    router, w, spec = layer(24, 6, 4, torch.float32)
    arguments = dict(x=torch.zeros(2, 24), tau=torch.ones(2), router=router, weights=w, spec=spec) | change
    with pytest.raises(ConfigError, match=message):
        native.routed_ffn(**arguments)


def test_a_router_of_another_rank_in_the_same_memory_is_another_layer():
    """As a second model's, which is given what the first one had."""
    _, w, spec = layer(24, 6, 4, torch.float32)
    x, tau = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.5)
    weight, down = (random(torch.Generator().manual_seed(seed), torch.float32, 500) for seed in (1, 2))
    for rank in (3, 20):
        router = RouterWeights(weight[: 6 * rank].view(6, rank), None, down[: 24 * rank].view(rank, 24))
        wanted, _ = expected(x, x, tau, router, w, spec)
        torch.testing.assert_close(native.ready(router, w, spec)(x, tau).double(), wanted, rtol=0, atol=1e-5)


def python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout


def test_the_environment_picks_the_instruction_set():
    code = """
from prunepath_vllm.kernels import native
print(native._function(None).__name__)
"""
    assert python(code, PRUNEPATH_CPU_ISA="plain").split() == ["prunepath_routed_ffn_plain"]
    with pytest.raises(subprocess.CalledProcessError) as error:
        python(code, PRUNEPATH_CPU_ISA="none")
    assert "ConfigError: PRUNEPATH_CPU_ISA is 'none'; expected" in error.value.stderr


def test_threads_are_those_of_pytorch():
    """No thread more than PyTorch's pool, and its threads keep the cores they were bound to."""
    code = """
import os, torch
from prunepath_vllm.kernels import native
from prunepath_vllm.activations import Activation
from prunepath_vllm.kernels.layer import LayerSpec, RouterWeights, Weights
torch.set_num_threads(3)
torch.zeros(1 << 20).exp_()  # starts the pool
tasks = lambda: {int(task): frozenset(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}
for task in tasks():
    os.sched_setaffinity(task, {min(os.sched_getaffinity(0))})
before = tasks()
w = Weights(torch.randn(64, 32), None, torch.randn(64, 32), None)
router, spec = RouterWeights(torch.randn(8, 32)), LayerSpec(32, 8, 8, torch.float32, Activation.RELU, glu=False)
layer = native.RoutedFFN(router, w, spec)
for threads in (None, 1, 2, 3):
    layer(torch.randn(2, 32), torch.tensor([0.5, 1.0]), num_threads=threads)
    assert tasks() == before, (threads, before, tasks())
torch.zeros(1 << 20).exp_()
assert tasks() == before
print(len(before), "threads")
"""
    assert int(python(code, OMP_NUM_THREADS="3").split()[0]) >= 3


@pytest.mark.parametrize(
    ("shape", "dtype"), [((7, 3), torch.float32), ((3072, 576), torch.bfloat16), ((1500, 1001), torch.int8)]
)
def test_memory_in_huge_pages_is_memory(shape, dtype):
    tensor = memory.empty(*shape, dtype=dtype)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == (shape, dtype, "cpu")
    assert tensor.is_contiguous()
    wanted = torch.arange(tensor.numel()).view(shape).to(dtype)
    assert torch.equal(tensor.copy_(wanted), wanted)
    large = tensor.nbytes >= memory.HUGE_PAGE // 2 and sys.platform == "linux"
    assert not large or tensor.data_ptr() % memory.HUGE_PAGE == 0
