"""The C++ kernel of the routed layer against the reference in float64, on every instruction set this processor has."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prunepath_vllm.kernels import cpu, native, reference
from prunepath_vllm.kernels.native import Router
from prunepath_vllm.kernels.weights import Weights

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
) -> tuple[Router, Weights]:
    g = torch.Generator().manual_seed(seed)
    neurons, read = experts * size, dtype if router_dtype is None else router_dtype
    rows, narrow = (2 * neurons if glu else neurons), hidden**-0.5
    weights = Weights(
        random(g, dtype, rows, hidden, scale=narrow),
        random(g, dtype, rows) if bias else None,
        random(g, dtype, neurons, hidden, scale=neurons**-0.5),
        random(g, dtype, hidden) if bias else None,
        activation,
        glu,
    )
    down = None if rank is None else random(g, read, rank, hidden, scale=narrow)
    width = hidden if rank is None else rank
    router = Router(
        random(g, read, experts, width, scale=2 * width**-0.5), down, random(g, read, experts) if bias else None
    )
    return router, weights


def expected(
    x: Tensor, router_input: Tensor, tau: Tensor, router: Router, w: Weights, routing: dict
) -> tuple[Tensor, Tensor]:
    """Output in float64, and the float32 weight [T, E] of every expert."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    narrow = router_input.float() if router.down is None else F.linear(router_input.float(), router.down.float())
    logits = reference.router_logits(narrow, router.weight, router.bias)
    scale = reference.expert_weights(logits, tau, **routing)
    neurons = w.w_out_t.shape[0]
    pre = F.linear(x.double(), w.w_in.double(), wide(w.b_in))
    h = cpu.ACTIVATIONS[w.activation](pre[:, :neurons])
    if w.glu:
        h = h * pre[:, neurons:]
    y = reference.scale_neurons(h, scale) @ w.w_out_t.double()
    return (y if w.b_out is None else y + w.b_out.double()), scale


def routing(gate: str = "none", threshold: float | None = None) -> dict:
    return dict(gate=gate, threshold=threshold, selection="cumulative_mass" if threshold is None else "threshold")


def check(
    x: Tensor, tau: Tensor, router: Router, w: Weights, rule: dict, isa: str, router_input: Tensor | None = None
) -> None:
    """Output, counts and experts read; the output's memory was NaN before."""
    read = x if router_input is None else router_input
    y, scale = expected(x, read, tau, router, w, rule)
    counts = torch.arange(len(x), dtype=torch.int32)
    experts_read = torch.tensor([7], dtype=torch.int64)
    out = torch.full_like(x, torch.nan)
    native.RoutedFFN(router, w, isa=isa, **rule)(
        x, tau, router_input=read, active_counts=counts, experts_read=experts_read, out=out
    )
    assert torch.equal(counts - torch.arange(len(x)), (scale != 0).sum(1))
    assert experts_read.item() - 7 == (scale != 0).any(0).sum()
    error = (out.double() - y).norm(dim=1)
    assert (error <= LIMITS[x.dtype] * y.norm(dim=1) + 1e-30).all(), error / y.norm(dim=1)


def test_the_kernel_was_built_and_every_machine_has_the_plain_path():
    assert native.unavailable() is None
    assert ISAS[-1] == "plain"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5, 19])
def test_sizes(isa, dtype, tokens):
    """Hidden sizes with and without a rest, every expert size, one expert, fewer columns than a vector."""
    shapes = [(33, 7, 3), (576, 12, 8), (64, 40, 1), (100, 13, 4), (8, 5, 32), (48, 1, 6), (1, 3, 2), (130, 21, 3)]
    for hidden, experts, size in shapes:
        for glu in (True, False):
            router, w = layer(hidden, experts, size, dtype, glu=glu, bias=not glu, seed=experts)
            x = random(torch.Generator().manual_seed(tokens), dtype, tokens, hidden)
            for first in range(len(TAUS) if tokens == 1 else 1):
                tau = torch.tensor((TAUS[first:] + TAUS * 3)[:tokens])
                check(x, tau, router, w, routing(), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", sorted(cpu.ACTIVATIONS))
@pytest.mark.parametrize("rule", [routing("sigmoid"), routing(threshold=0.6), routing("sigmoid", 0.4)], ids=str)
def test_rules_activations_and_biases(isa, activation, rule):
    for dtype in LIMITS:
        for glu in (True, False):
            router, w = layer(40, 10, 4, dtype, glu=glu, bias=True, activation=activation)
            x = random(torch.Generator().manual_seed(1), dtype, 8, 40, scale=3)
            check(x, torch.tensor(TAUS), router, w, rule, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_routers_of_another_type_input_and_rank(isa):
    for dtype in LIMITS:
        for router_dtype in LIMITS:
            for rank in (None, 1, 7, 40, 70):
                router, w = layer(36, 50, 2, dtype, bias=True, router_dtype=router_dtype, rank=rank)
                g = torch.Generator().manual_seed(2)
                x, other = random(g, dtype, 8, 36), random(g, router_dtype, 8, 36)
                check(x, torch.tensor(TAUS), router, w, routing(), isa, router_input=other)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("experts", [1, 2, 300])
def test_ties_go_to_the_lower_index(isa, experts):
    """All logits equal, and pairs of equal ones."""
    _, w = layer(24, experts, 1, torch.float32)
    x = random(torch.Generator().manual_seed(3), torch.float32, 5, 24)
    tau = torch.tensor([0.1, 0.35, 0.503, 0.7, 0.0])
    pairs = (torch.arange(experts) // 2 % 5).float()
    for bias in (torch.zeros(experts), pairs, -pairs):
        check(x, tau, Router(torch.zeros(experts, 24), None, bias), w, routing(), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_selection_of_many_experts(isa):
    """8,192 experts, flat and peaked: what is selected, seen through the counts and the union."""
    router, w = layer(16, 8192, 1, torch.float32)
    for sharpness in (0.01, 1.0, 8.0):
        x = random(torch.Generator().manual_seed(4), torch.float32, 6, 16, scale=sharpness)
        _, scale = expected(x, x, torch.full((6,), 0.5), router, w, routing())
        counts = torch.zeros(6, dtype=torch.int32)
        native.routed_ffn(x, x, torch.full((6,), 0.5), router, w, isa=isa, active_counts=counts, **routing())
        # Where a cumulative probability falls within float32's rounding of tau, an expert more or less is right.
        assert (counts - (scale != 0).sum(1)).abs().max() <= 1
        assert counts.min() >= 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bias", [True, False])
def test_threshold_may_select_nothing(isa, bias):
    router, w = layer(24, 6, 4, torch.float32, bias=bias)
    router = Router(torch.zeros_like(router.weight), None, torch.full((6,), -5.0))
    x = random(torch.Generator().manual_seed(5), torch.float32, 3, 24)
    read = torch.zeros(1, dtype=torch.int32)
    y = native.routed_ffn(x, x, torch.full((3,), 0.5), router, w, isa=isa, experts_read=read, **routing(threshold=0.5))
    assert torch.equal(y, torch.zeros_like(x) if w.b_out is None else w.b_out.expand_as(x))
    assert read.item() == 0


@pytest.mark.parametrize("isa", ISAS)
def test_a_gate_that_underflows_leaves_its_expert_out(isa):
    router, w = layer(24, 6, 4, torch.float32)
    router = Router(torch.zeros_like(router.weight), None, torch.tensor([0.0, -200.0, 1.0, -95.0, 200.0, -80.0]))
    x = random(torch.Generator().manual_seed(6), torch.float32, 2, 24)
    check(x, torch.tensor([1.0, 0.9]), router, w, routing("sigmoid"), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_numbers_at_the_ends_of_the_types(isa):
    """Subnormal float16 weights and inputs, large activations, infinities and NaN end where PyTorch's do."""
    small = torch.full((8, 4), 6e-8, dtype=torch.float16)
    w = Weights(small, None, torch.ones_like(small), None, "relu", False)
    router = Router(torch.zeros(2, 4))
    y = native.routed_ffn(w.w_in[:1] * 0 + 6e4, w.w_in[:1], torch.ones(1), router, w, isa=isa, **routing())
    assert torch.equal(y, torch.full_like(y, 8 * 4 * 2.0**-24 * 6e4))
    values = torch.tensor([1e-7, 3e-8, 65519.0, 65520.0, -0.0, -1e-7, 6.1e-5, torch.inf, -torch.inf, torch.nan, 2049.0])
    for dtype in (torch.float16, torch.bfloat16):
        n = len(values)
        w = Weights(torch.eye(1, n), None, torch.zeros(1, n), values, "relu", False)
        x = torch.zeros(1, n, dtype=dtype)
        y = native.routed_ffn(x, x, torch.ones(1), Router(torch.zeros(1, n)), w, isa=isa, **routing())
        torch.testing.assert_close(y[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)
    router, w = layer(33, 7, 3, torch.float32)
    for bad in (torch.nan, torch.inf):
        x = torch.zeros(2, 33)
        x[1, 5] = bad
        y = native.routed_ffn(x, x, torch.full((2,), 0.5), router, w, isa=isa, **routing())
        assert torch.equal(y[0], torch.zeros(33))
        assert not y[1].isfinite().any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["silu", "gelu_new"])
def test_activations_far_from_zero(isa, activation):
    values = torch.linspace(-120, 120, 481)
    w = Weights(torch.ones(1, 1), None, torch.ones(1, 1), None, activation, False)
    layer = native.RoutedFFN(Router(torch.zeros(1, 1)), w, isa=isa, **routing())
    y = layer(values[:, None].contiguous(), torch.ones(481))
    right = cpu.ACTIVATIONS[activation](values.double()).float()
    torch.testing.assert_close(y[:, 0], right, rtol=2e-6, atol=1e-30 if activation == "silu" else 2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
def test_a_token_depends_neither_on_threads_nor_on_its_batch(isa, dtype, gate):
    router, w = layer(200, 30, 3, dtype, bias=True)
    layer_ = native.RoutedFFN(router, w, isa=isa, **routing(gate))
    x = random(torch.Generator().manual_seed(7), dtype, 21, 200)
    tau = torch.tensor((TAUS * 3)[:21])
    alone = torch.cat([layer_(x[t : t + 1], tau[t : t + 1], num_threads=1) for t in range(21)])
    for threads in (1, 2, 3, 5, 16):
        for tokens in (1, 2, 3, 4, 7, 16, 21):
            assert torch.equal(layer_(x[:tokens], tau[:tokens], num_threads=threads), alone[:tokens]), (threads, tokens)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("glu", [True, False])
def test_int8_rows_with_scales(isa, dtype, glu):
    router, w = layer(77, 9, 5, torch.float32, glu=glu, bias=True)

    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = rows.abs().amax(1) / 127
        return (rows / scale[:, None]).round().to(torch.int8), scale

    (w_in, scale_in), (w_out, scale_out) = quantize(w.w_in), quantize(w.w_out_t)
    narrow = Weights(w_in, w.b_in, w_out, w.b_out, w.activation, glu)
    wide = Weights(w_in * scale_in[:, None], w.b_in, w_out * scale_out[:, None], w.b_out, w.activation, glu)
    x = random(torch.Generator().manual_seed(8), dtype, 8, 77)
    tau = torch.tensor(TAUS)
    y, _ = expected(x, x, tau, router, wide, routing())
    out = native.routed_ffn(x, x, tau, router, narrow, scale_in=scale_in, scale_out=scale_out, isa=isa, **routing())
    assert (out.double() - y).norm() <= LIMITS[dtype] * y.norm()


def test_no_tokens():
    router, w = layer(24, 6, 4, torch.float32)
    x = torch.empty(0, 24)
    assert native.routed_ffn(x, x, torch.empty(0), router, w, **routing()).shape == (0, 24)


def test_same_as_the_pytorch_path():
    router, w = layer(64, 12, 8, torch.float32, bias=True)
    x = random(torch.Generator().manual_seed(9), torch.float32, 4, 64)
    tau = torch.tensor([0.3, 0.5, 1e-6, 0.8])
    y = native.routed_ffn(x, x, tau, router, w, **routing("sigmoid"))
    torch.testing.assert_close(y, cpu.routed_ffn(x, tau, router.weight, router.bias, w, **routing("sigmoid")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(isa="sse9"), "isa is 'sse9', but this installation on this processor has"),
        (dict(gate="tanh"), "gate is 'tanh', expected 'sigmoid' or 'none'"),
        (dict(selection="threshold"), "selection is 'threshold' with threshold None"),
        (dict(x=torch.zeros(2, 25)), r"x is \[2, 25\] float32 on cpu, expected \[2, 24\]"),
        (dict(x=torch.zeros(24, 2).t()), "x is .* not contiguous"),
        (dict(tau=torch.ones(2, dtype=torch.float64)), r"tau is \[2\] float64"),
        (dict(router=Router(torch.zeros(5, 24))), "w_out_t has 24 rows, expected a multiple of the router's 5 experts"),
        (dict(router=Router(torch.zeros(6, 24), torch.zeros(3, 24))), r"router_down is \[3, 24\] float32 .*\[24, 24\]"),
        (dict(active_counts=torch.zeros(2)), r"active_counts is \[2\] float32 on cpu, expected \[2\] int32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(change, message):
    router, w = layer(24, 6, 4, torch.float32)
    arguments = dict(x=torch.zeros(2, 24), tau=torch.ones(2), router=router, weights=w, **routing()) | change
    with pytest.raises(ValueError, match=message):
        native.routed_ffn(router_input=torch.zeros(2, 24), **arguments)


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
    assert "ValueError: PRUNEPATH_CPU_ISA is 'none', but" in error.value.stderr


def test_threads_are_those_of_pytorch():
    """No thread more than PyTorch's pool, and its threads keep the cores they were bound to."""
    code = """
import os, torch
from prunepath_vllm.kernels import native
from prunepath_vllm.kernels.weights import Weights
torch.set_num_threads(3)
torch.zeros(1 << 20).exp_()  # starts the pool
tasks = lambda: {int(task): frozenset(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}
for task in tasks():
    os.sched_setaffinity(task, {min(os.sched_getaffinity(0))})
before = tasks()
w = Weights(torch.randn(64, 32), None, torch.randn(64, 32), None, "relu", False)
layer = native.RoutedFFN(native.Router(torch.randn(8, 32)), w, selection="cumulative_mass", threshold=None, gate="none")
for threads in (None, 1, 2, 3):
    layer(torch.randn(2, 32), torch.tensor([0.5, 1.0]), num_threads=threads)
    assert tasks() == before, (threads, before, tasks())
torch.zeros(1 << 20).exp_()
assert tasks() == before
print(len(before), "threads")
"""
    assert int(python(code, OMP_NUM_THREADS="3").split()[0]) >= 3
