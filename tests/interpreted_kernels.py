"""Kernels under Triton's interpreter against the references; run by test_kernels_interpreted.py in its own process.

bf16 is left to the GPU checks: the interpreter's dot takes bf16 for integers.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import triton
from runners import remember_what_the_interpreter_looks_up
from torch import Tensor

from prunepath_vllm.activations import ACTIVATIONS as ACTIVATION_NAMES
from prunepath_vllm.errors import ConfigError
from prunepath_vllm.kernels import cpu, expand, reference, routing
from prunepath_vllm.kernels import tau as taus
from prunepath_vllm.kernels.decode import DownConfig, FusedConfig, UpConfig
from prunepath_vllm.kernels.dense import dense_ffn
from prunepath_vllm.kernels.ffn import Choice, Tuning, route_ahead, routed_ffn
from prunepath_vllm.kernels.grouped import GroupedConfig, grouped_ffn
from prunepath_vllm.kernels.layer import (
    Counters,
    LayerSpec,
    RouterWeights,
    RoutingRule,
    Weights,
    dequantise,
)
from prunepath_vllm.kernels.routing import RouterConfig, Routing, list_experts, route, select_mask

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda v: F.gelu(v, approximate="tanh"),
    "gelu_pytorch_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu": F.relu,
}
NAME_OF = {activation: name for name, activation in ACTIVATION_NAMES.items()}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
NO_TUNING = {
    path: Tuning(
        (
            (
                1,
                Choice(
                    path,
                    router=RouterConfig(split_k=2),
                    fused=FusedConfig(rows=4),
                    up=UpConfig(rows=16, block_k=32),
                    down=DownConfig(block_h=32, block_k=16, splits=3),
                    grouped=GroupedConfig(block_m=16, block_k=32, group=2),
                ),
            ),
        )
    )
    for path in ("fused", "split", "dense", "grouped")
}

EVERY_PATH = [("fused", 1), ("split", 1), ("split", 3), ("dense", 3), ("grouped", 3)]

SELECTS = {
    "radix": RouterConfig(block_e=2, split_k=2),
    "pairwise": RouterConfig(block_e=2, split_k=2, select="pairwise", select_block_e=4),
}


remember_what_the_interpreter_looks_up()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer the wrappers allocate starts as NaN (integers: a huge index), so that unwritten reads show."""
    empty = torch.empty

    def poisoned(*sizes: int, **kwargs: object) -> Tensor:
        tensor = empty(*sizes, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else min(2**30, torch.iinfo(tensor.dtype).max))

    monkeypatch.setattr(torch, "empty", poisoned)


def make_case(
    num_tokens: int,
    experts: int,
    size: int,
    hidden: int,
    *,
    dtype=torch.float32,
    glu=True,
    bias=True,
    activation="silu",
) -> tuple[Tensor, RouterWeights, Weights, LayerSpec]:
    gen = torch.Generator().manual_seed(num_tokens * 1000 + experts)

    def rand(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=gen) * scale).to(dtype)

    first = experts * size * (2 if glu else 1)
    weights = Weights(
        rand(first, hidden, scale=hidden**-0.5),
        rand(first) if bias else None,
        rand(experts * size, hidden, scale=0.1),
        rand(hidden) if bias else None,
    )
    router = RouterWeights(rand(experts, hidden, scale=0.3), rand(experts) if bias else None)
    spec = LayerSpec(hidden, experts, size, dtype, ACTIVATION_NAMES[activation], glu)
    return rand(num_tokens, hidden), router, weights, spec


def reference_ffn(x: Tensor, gates: Tensor, weights: Weights, activation: str, glu: bool) -> Tensor:
    w_in, w_out_t = (
        dequantise(rows, scale, torch.float32).float()
        for rows, scale in ((weights.w_in, weights.scale_in), (weights.w_out_t, weights.scale_out))
    )
    pre = F.linear(x.float(), w_in, None if weights.b_in is None else weights.b_in.float())
    act = ACTIVATIONS[activation]
    if glu:
        gate, value = pre.chunk(2, dim=-1)
        neurons = act(gate) * value
    else:
        neurons = act(pre)
    y = reference.scale_neurons(neurons, gates) @ w_out_t
    return y if weights.b_out is None else y + weights.b_out.float()


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


SHAPES = [
    (1, 37, 8, 48),
    (1, 5, 32, 80),
    (3, 20, 4, 64),
    (4, 24, 2, 48),
    (4, 9, 8, 48),
    (5, 37, 8, 48),
    (17, 9, 16, 96),
]
SHAPE_IDS = [f"T{t}_E{e}_D{d}_H{h}" for t, e, d, h in SHAPES]


def mixed_taus(num_tokens: int) -> Tensor:
    """All active, one active (a padding row), and in between; one token alone gets the middle."""
    return torch.tensor([0.6, 1.0, 1e-6, 0.95, 1.05, 0.2, 0.999])[torch.arange(num_tokens) % 7].contiguous()


@pytest.mark.parametrize("gate", ["sigmoid", "none"])
@pytest.mark.parametrize("selection", ["cumulative_mass", "threshold"])
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_route_matches_reference(shape, select, selection, gate):
    x, router, _, _ = make_case(*shape)
    tau = mixed_taus(shape[0])
    rule = RoutingRule(selection, 0.6 if selection == "threshold" else None, gate)
    counts = torch.full((shape[0],), 7, dtype=torch.int32)
    got = route(x, tau, router, rule, config=SELECTS[select], active_counts=counts)
    want = expected_gates(x, tau, router, rule)
    torch.testing.assert_close(got.gates, want, atol=1e-5, rtol=0)
    assert torch.equal(got.gates != 0, want != 0)
    assert torch.equal(got.flags != 0, (want != 0).any(0))
    assert torch.equal(counts - 7, (want != 0).sum(-1).int())


@pytest.mark.parametrize("num_tokens", [3, 17])
@pytest.mark.parametrize(("dtype", "tile", "taken"), [(torch.float16, 64, 64), (torch.float32, 64, 16)])
def test_experts_of_a_logits_program(num_tokens, dtype, tile, taken, monkeypatch):
    """As many as the configuration says, but of float32 weights, which would not fit a multiprocessor."""
    x, router, _, _ = make_case(num_tokens, 70, 8, 48, dtype=dtype)
    launched, kernel = [], routing.router_logits_kernel_dot

    class Watched:
        def __getitem__(self, grid):
            launched.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(routing, "router_logits_kernel_dot", Watched())
    tau = mixed_taus(num_tokens)
    got = route(x, tau, router, RoutingRule(), config=RouterConfig(split_k=2, tile_e=tile)).gates
    assert launched == [triton.cdiv(70, taken)]
    torch.testing.assert_close(got, expected_gates(x, tau, router, RoutingRule()), atol=1e-4, rtol=0)


MANY_EXPERTS = (1025, 4736, 8192)
"""One beyond a power of two; Qwen2-7B's experts of 4; 16,384 neurons in experts of 2."""


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("num_experts", MANY_EXPERTS)
def test_many_experts_are_routed_and_listed(num_experts, num_tokens, select):
    x, router, _, _ = make_case(num_tokens, num_experts, 1, 16)
    tau = torch.tensor([0.6, 1e-6, 0.95])[:num_tokens]
    rule = RoutingRule(gate="sigmoid")
    config = replace(SELECTS[select], block_e=256, tile_e=128, select_block_e=64)
    counts, read = torch.zeros(num_tokens, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    kept = num_experts - 100
    got = list_experts(route(x, tau, router, rule, config=config, active_counts=counts, kept=kept), read, resident=500)
    want = expected_gates(x, tau, router, rule)[:, :kept]
    torch.testing.assert_close(got.gates, want, atol=1e-5, rtol=0)
    assert torch.equal(got.gates != 0, want != 0)
    assert torch.equal(counts, (want != 0).sum(-1).int())
    (used,) = (want != 0).any(0).nonzero(as_tuple=True)
    assert got.experts[: len(used)].tolist() == used.tolist()
    assert got.experts[-1] == len(used)
    assert read.tolist() == [len(used), (used >= 500).sum()]


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("tau", [1.0, 0.5], ids=["dense", "some"])
def test_route_one_token_without_flags(tau, select):
    """A tau that takes every expert, alone in its batch, leaves the logits unread."""
    x, router, _, _ = make_case(1, 37, 8, 48)
    counts = torch.zeros(1, dtype=torch.int32)
    taus = torch.tensor([tau])
    got = route(x, taus, router, RoutingRule(), config=SELECTS[select], active_counts=counts, want_flags=False)
    want = expected_gates(x, taus, router, RoutingRule())
    assert got.flags is None
    assert torch.equal(got.gates, want)
    assert counts.item() == (want != 0).sum()


@pytest.mark.parametrize("select", SELECTS)
def test_ties_take_the_lower_index(select):
    x, found, _, _ = make_case(2, 24, 8, 48)
    x, router = (x * 8).round() / 8, (found.weight * 8).round() / 8  # exact sums: no order of addition parts a tie
    router = router[torch.arange(24) // 8]  # three groups of eight equal logits
    tau = torch.tensor([0.3, 0.7])
    got = route(x, tau, RouterWeights(router), RoutingRule(), config=SELECTS[select]).gates
    want = reference.select_cumulative_mass(reference.router_logits(x, router), tau)
    assert torch.equal(got != 0, want)
    for row, logits in zip(got, reference.router_logits(x, router), strict=True):
        best = logits.argmax()
        group = row[best // 8 * 8 : best // 8 * 8 + 8]
        assert torch.equal(group, group.sort(descending=True).values)


@pytest.mark.parametrize("path", ["fused", "split", "dense", "grouped"])
@pytest.mark.parametrize("tau", [1.0, 0.6, 1e-6], ids=["all", "some", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_one_token(path, tau, dtype):
    x, *layer = make_case(1, 37 if dtype == torch.float32 else 12, 8, 48, dtype=dtype)
    check_layer(path, x, torch.tensor([tau]), *layer)


@pytest.mark.parametrize(
    ("path", "shape"),
    [(path, shape) for shape in SHAPES[2:] for path in NO_TUNING if path != "fused"],
    ids=str,
)
def test_mixed_taus(path, shape):
    x, *layer = make_case(*shape)
    check_layer(path, x, mixed_taus(shape[0]), *layer)


def test_every_activation_has_a_reference():
    assert set(ACTIVATIONS) == set(ACTIVATION_NAMES)
    v = torch.linspace(-4, 4, 99)
    for name, function in ACTIVATIONS.items():
        spec = LayerSpec(1, 1, 1, torch.float32, ACTIVATION_NAMES[name])
        assert torch.equal(spec.activate(v), function(v))


@pytest.mark.parametrize(("activation", "glu"), [("silu", True), ("gelu_new", False), ("gelu", True), ("relu", False)])
@pytest.mark.parametrize(("path", "num_tokens"), EVERY_PATH)
def test_activations(path, num_tokens, activation, glu):
    for bias, gate in ((True, "sigmoid"), (False, "none")):
        x, *layer = make_case(num_tokens, 12, 8, 32, glu=glu, bias=bias, activation=activation)
        check_layer(path, x, torch.full((num_tokens,), 0.7), *layer, gates=(gate,))


@pytest.mark.parametrize(("path", "num_tokens"), EVERY_PATH)
def test_no_active_expert_leaves_the_bias(path, num_tokens):
    x, router, weights, spec = make_case(num_tokens, 12, 8, 32)
    router = RouterWeights(router.weight * 0, torch.full((12,), -9.0))
    spec = replace(spec, rule=RoutingRule("threshold", 0.5, "sigmoid"))
    y = routed_ffn(x, torch.full((num_tokens,), 0.5), router, weights, spec, tuning=NO_TUNING[path])
    torch.testing.assert_close(y, weights.b_out.expand_as(y))


@pytest.mark.parametrize("path", ["split", "dense", "grouped"])
def test_overflow_stays_in_its_token(path):
    """An expert that overflows for one token does not reach a token that did not choose it."""
    x, router, weights, spec = make_case(2, 12, 8, 32)
    router.weight[0] = 0.0
    router.bias[:] = torch.where(torch.arange(12) == 3, 5.0, 0.0)
    x[1] = 0.0
    weights.w_in[0:8] = 3e38  # expert 0: infinite for token 0, finite for token 1
    x[0] = x[0].abs() + 1
    spec = replace(spec, rule=RoutingRule(gate="sigmoid"))
    y = routed_ffn(x, torch.tensor([0.3, 1.0]), router, weights, spec, tuning=NO_TUNING[path])
    gates = expected_gates(x, torch.tensor([0.3, 1.0]), router, spec.rule)
    assert gates[0, 0] == 0
    assert gates[1, 0] != 0
    assert y.isfinite().all()


@pytest.mark.parametrize("path", ["split", "dense", "grouped"])
@pytest.mark.parametrize("selection", ["cumulative_mass", "threshold"])
@pytest.mark.parametrize("at_least", [False, True], ids=["exact", "at-least"])
def test_padding_rows_choose_nothing_and_move_nothing(path, selection, at_least):
    x, router, weights, spec = make_case(5, 12, 8, 48)
    spec = replace(spec, at_least=at_least, rule=RoutingRule(selection, 0.5 if selection == "threshold" else None))
    tau = torch.tensor([0.5, 0.3, 0.7, 0.0, 0.0])
    results = []
    for filler in (1.0, -7.0):
        counts = torch.zeros(5, dtype=torch.int32)
        x[3:] = filler
        y = routed_ffn(x, tau, router, weights, spec, tuning=NO_TUNING[path], counters=Counters(counts))
        results.append(y[:3])
        assert counts[3:].tolist() == [0, 0]
        assert (counts[:3] > 0).all()
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("path", "num_tokens"), EVERY_PATH)
def test_a_router_of_low_rank_that_reads_another_input(path, num_tokens, dtype):
    x, router, weights, spec = make_case(num_tokens, 12, 8, 32, dtype=dtype)
    seen, second, _, _ = make_case(num_tokens, 12, 8, 32, dtype=dtype)
    router = RouterWeights(
        second.weight[:, :20].contiguous(), router.bias, make_case(1, 20, 8, 32, dtype=dtype)[1].weight
    )
    seen = -seen  # other experts than x would choose
    tau = mixed_taus(num_tokens)
    spec = replace(spec, rule=RoutingRule(gate="sigmoid"))
    logits = seen.double() @ router.down.double().t() @ router.weight.double().t() + router.bias.double()
    gates = reference.expert_weights(logits.float(), tau, **vars(spec.rule))
    y = routed_ffn(x, tau, router, weights, spec, tuning=NO_TUNING[path], router_input=seen)
    assert error(y, reference_ffn(x, gates, weights, "silu", True)) < TOLERANCE[dtype]
    widened = replace(router, weight=router.weight.float())  # as the engine keeps it
    assert torch.equal(routed_ffn(x, tau, widened, weights, spec, tuning=NO_TUNING[path], router_input=seen), y)


@pytest.mark.parametrize(
    ("gate", "at_least", "host_dense"),  # every pair of values, on every path
    [("none", False, False), ("none", True, True), ("sigmoid", False, True), ("sigmoid", True, False)],
)
@pytest.mark.parametrize(("path", "num_tokens"), EVERY_PATH)
def test_routing_ahead_changes_no_bit_and_no_count(path, num_tokens, gate, at_least, host_dense):
    x, router, weights, spec = make_case(num_tokens, 37, 8, 48)
    seen = make_case(num_tokens, 36, 8, 48)[0]
    spec = replace(spec, rule=RoutingRule(gate=gate), at_least=at_least)
    tau = torch.ones(num_tokens) if host_dense else mixed_taus(num_tokens)
    results = []
    for is_ahead in (False, True):
        counters = Counters(torch.zeros(num_tokens, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
        options = dict(tuning=NO_TUNING[path], counters=counters, host_dense=host_dense)
        ahead = route_ahead(seen, tau, router, spec, **options) if is_ahead else None
        y = routed_ffn(x, tau, router, weights, spec, router_input=seen, routing=ahead, **options)
        results.append([y, counters.active, counters.read])
        assert (ahead is not None) == (is_ahead and path in ("fused", "split") and not host_dense)
    assert all(map(torch.equal, *results))
    assert results[0][2] > 0


@pytest.mark.parametrize(
    ("glu", "selection", "gate"),  # every pair of values, on every path
    [
        (True, "cumulative_mass", "none"),
        (True, "threshold", "sigmoid"),
        (False, "cumulative_mass", "sigmoid"),
        (False, "threshold", "none"),
    ],
)
@pytest.mark.parametrize(("path", "num_tokens"), [*EVERY_PATH, ("dense", 1), ("dense", 70)])
def test_at_least_its_tau_is_every_expert_on_the_dense_path(monkeypatch, path, num_tokens, glu, selection, gate):
    x, router, weights, spec = make_case(num_tokens, 37, 8, 48, glu=glu)
    rule = RoutingRule(selection, 0.6 if selection == "threshold" else None, gate)
    spec = replace(spec, rule=rule, at_least=True)
    tau = mixed_taus(num_tokens)
    if num_tokens > 1:
        tau[-1] = taus.PADDING_TAU
    least = (tau > 0).float() if path == "dense" else tau  # other paths compute what was chosen, as ever
    gates = expected_gates(x, least, router, rule)
    counts, read = torch.full((num_tokens,), 7, dtype=torch.int32), torch.tensor([5], dtype=torch.int64)
    if path == "dense" and gate == "none":
        monkeypatch.setattr("prunepath_vllm.kernels.ffn.route", None)  # nothing is routed
    y = routed_ffn(x, tau, router, weights, spec, tuning=NO_TUNING[path], counters=Counters(counts, read))
    assert torch.equal(counts - 7, (gates != 0).sum(1).int())
    assert read.item() - 5 == (37 if path == "dense" else (gates != 0).any(0).sum())
    want = reference_ffn(x, gates, weights, "silu", glu)
    real = tau > 0  # nobody reads what a padding row gets
    assert error(y[real], want[real]) < 1e-5
    assert y.isfinite().all()


@pytest.mark.parametrize("num_reqs", [1, 5, 150])
@pytest.mark.parametrize("dense_positions", [0, 2])
@pytest.mark.parametrize("prefill", [False, True], ids=["", "prefill"])
def test_expand_taus(num_reqs, dense_positions, prefill):
    gen = torch.Generator().manual_seed(num_reqs)
    lengths = torch.randint(1, 6, (num_reqs,), generator=gen)
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    padded = int(ends[-1]) + 70
    slots = torch.randperm(num_reqs + 9, generator=gen)[:num_reqs].int()
    positions = torch.randint(0, 4, (padded,), generator=gen)
    slot_taus = torch.rand(num_reqs + 9, generator=gen)
    prompt_lens = torch.randint(0, 5, (num_reqs,), generator=gen)
    options = dict(dense_positions=dense_positions)
    if prefill:
        options |= dict(prompt_lens=prompt_lens, prefill_tau=0.25)
    got, want = torch.empty(padded), torch.empty(padded)
    expand.expand_taus(slot_taus, slots, ends, positions, got, **options)
    taus.expand_taus(slot_taus, slots, ends, positions, want, **options)
    assert torch.equal(got, want)
    by_token = torch.stack([slot_taus[slot] for slot, n in zip(slots, lengths, strict=True) for _ in range(n)])
    in_prompt = positions[: ends[-1]] < prompt_lens.repeat_interleave(lengths)
    by_token = torch.where(in_prompt & prefill, 0.25, by_token)
    by_token = torch.where(positions[: ends[-1]] < dense_positions, 1.0, by_token)
    assert torch.equal(got, F.pad(by_token, (0, 70), value=taus.PADDING_TAU))


def test_dense_without_gates():
    x, _, weights, spec = make_case(5, 12, 8, 32)
    want = reference_ffn(x, torch.ones(5, 12), weights, "silu", True)
    assert error(dense_ffn(x, weights, spec), want) < 1e-5


@pytest.mark.parametrize("path", ["fused", "split", "dense", "grouped"])
def test_takes_the_weights_of_the_cpu(path):
    x, *layer = make_case(1, 12, 8, 32, glu=False, activation="gelu_new")
    tau = torch.tensor([0.7])
    got = routed_ffn(x, tau, *layer, tuning=NO_TUNING[path])
    torch.testing.assert_close(got, cpu.routed_ffn(x, tau, *layer), atol=1e-5, rtol=1e-5)


SIZES = [1, 2, 3, 5, 8, 12, 20, 28, 32, 48, 64]
"""Expert sizes: divisors of the tiles' rows, multiples of them, and neither."""

ROUTED_SIZE = 3
"""The one of them with which :func:`route` is run too: selection does not know the expert size."""


@pytest.fixture
def routed_by_reference(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Gates and flags of the reference for the other sizes: a program a token is most of a batch's time."""

    def reference_route(
        x, tau, router, rule, *, config, active_counts, want_flags=True, every=False, kept, pdl
    ) -> Routing:
        assert active_counts is None
        assert kept is None
        assert not every
        gates = expected_gates(x, tau, router, rule)
        return Routing(gates, (gates != 0).any(0).int() if want_flags else None)

    if size != ROUTED_SIZE:
        monkeypatch.setattr("prunepath_vllm.kernels.ffn.route", reference_route)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("path", "num_tokens"),
    [("fused", 1), *((path, n) for path in ("split", "dense", "grouped") for n in (1, 3, 8, 64))],
)
@pytest.mark.usefixtures("routed_by_reference")
def test_every_expert_size(path, num_tokens, size):
    """A neuron left out, or taken twice, is a hundred times the tolerance or more."""
    x, *layer = make_case(num_tokens, max(2, 24 // size), size, 33)  # no tile divides the hidden size
    check_layer(path, x, mixed_taus(num_tokens), *layer, gates=("sigmoid" if size % 2 else "none",))


def test_every_expert_size_in_a_long_batch():
    """5,000 tokens by the path that long batches take; selection, a program a token, does not know the expert size."""
    tau, rule = mixed_taus(5000), RoutingRule(gate="sigmoid")
    x, router, _, _ = make_case(5000, 4, 1, 17)
    gates = expected_gates(x, tau, router, rule)
    for size in SIZES:
        _, _, weights, spec = make_case(5000, 4, size, 17)
        config = GroupedConfig(block_m=128, block_k=32, group=8)
        y = grouped_ffn(x, weights, Routing(gates, None), spec, config)
        assert error(y, reference_ffn(x, gates, weights, "silu", True)) < 1e-5, size


@pytest.mark.parametrize("name", ["x", "weight", "dtype", "size"])
def test_tensors_of_another_layer_are_refused(name):
    x, router, weights, spec = make_case(3, 12, 8, 32)
    if name == "x":
        x = x[:, :31].contiguous()
    elif name == "weight":
        weights = replace(weights, w_out_t=weights.w_out_t[:-1])
    elif name == "dtype":
        x = x.half()
    else:
        spec = replace(spec, expert_size=4)
    for call in (partial(routed_ffn, tuning=NO_TUNING["split"]), cpu.routed_ffn):
        with pytest.raises(ConfigError, match="expected"):
            call(
                x,
                mixed_taus(3),
                router,
                weights,
                spec,
                **({"tuning": NO_TUNING["split"]} if call is routed_ffn else {}),
            )


def expected_gates(x: Tensor, tau: Tensor, router: RouterWeights, rule: RoutingRule) -> Tensor:
    logits = reference.router_logits(x, router.weight, router.bias)
    return reference.expert_weights(logits, tau, selection=rule.selection, threshold=rule.threshold, gate=rule.gate)


def check_layer(
    path: str,
    x: Tensor,
    tau: Tensor,
    router: RouterWeights,
    weights: Weights,
    spec: LayerSpec,
    gates=("sigmoid", "none"),
) -> None:
    for gate in gates:
        ruled = replace(spec, rule=RoutingRule(gate=gate))
        read = torch.tensor([5], dtype=torch.int32)
        y = routed_ffn(x, tau, router, weights, ruled, tuning=NO_TUNING[path], counters=Counters(read=read))
        scale = expected_gates(x, tau, router, ruled.rule)
        assert y.dtype == x.dtype
        # The spec's own activation is checked against ACTIVATIONS above.
        want = reference_ffn(x, scale, weights, NAME_OF[spec.activation], spec.glu)
        assert error(y, want) < TOLERANCE[x.dtype]
        assert read.item() - 5 == (spec.num_experts if path == "dense" else (scale != 0).any(0).sum())


@pytest.mark.parametrize("num_experts", [12, 592, *MANY_EXPERTS])
def test_select_mask_of_training(num_experts):
    """A warp a token; ties, tau at and above 1, and a tau that only the top expert stays below."""
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(2, 5, num_experts, generator=generator) * 3
    logits[0, 1] = logits[0, 1].round()
    taus = torch.tensor([[0.3, 0.6, 0.9, 1.0, 1.05], [1e-4, 0.5, 0.2, 0.99, 0.7]])
    assert torch.equal(select_mask(logits, taus), reference.select_cumulative_mass(logits, taus))


@pytest.mark.parametrize("kept", [None, 30])
@pytest.mark.parametrize(("path", "num_tokens"), [*EVERY_PATH, ("dense", 70)])
def test_reads_of_experts_in_host_memory_are_counted(path, num_tokens, kept):
    """Of 37 experts the first 14 lie on the GPU; a path that reads every expert reads all of the others."""
    x, router, weights, spec = make_case(num_tokens, 37, 8, 48)
    count = 37 if kept is None else kept
    part = Weights(
        weights.w_in.unflatten(0, (2, -1))[:, : 8 * count].flatten(0, 1).contiguous(), None,
        weights.w_out_t[: 8 * count].contiguous(), None,
    )  # fmt: skip
    spec = replace(spec, resident=14, kept=kept)
    tau = mixed_taus(num_tokens) if num_tokens > 1 else torch.tensor([0.97])
    used = (expected_gates(x, tau, router, spec.rule)[:, :count] != 0).any(0)
    assert used[14:].any()
    tuning, results = NO_TUNING[path], []
    for is_ahead in (False, True):
        counters = Counters(None, torch.zeros(2, dtype=torch.int64))
        options = dict(tuning=tuning, counters=counters)
        ahead = route_ahead(x, tau, router, spec, **options) if is_ahead else None
        results.append(routed_ffn(x, tau, router, part, spec, routing=ahead, **options))
        every = tuning.choice(num_tokens).reads_every_expert
        assert counters.read[0] == (count if path == "dense" else used.sum())
        assert counters.read[1] == (count - 14 if every else used[14:].sum())
    assert torch.equal(*results)


@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("glu", [True, False], ids=["glu", "plain"])
@pytest.mark.parametrize(("path", "num_tokens"), [*EVERY_PATH, ("dense", 70)])
def test_dropped_experts_are_selected_and_add_nothing(path, num_tokens, glu, gate, select):
    """The whole layer with gates of the first 14 of 37 experts alone, by kernels that have their rows alone."""
    x, router, weights, spec = make_case(num_tokens, 37, 8, 48, glu=glu)
    kept, halves = 14, 2 if glu else 1
    part = replace(
        weights,
        w_in=weights.w_in.unflatten(0, (halves, -1))[:, : 8 * kept].flatten(0, 1).contiguous(),
        b_in=weights.b_in.unflatten(0, (halves, -1))[:, : 8 * kept].flatten().contiguous(),
        w_out_t=weights.w_out_t[: 8 * kept].contiguous(),
    )
    spec = replace(spec, rule=RoutingRule(gate=gate), kept=kept)
    tau = mixed_taus(num_tokens) if num_tokens > 1 else torch.tensor([0.97])
    gates = expected_gates(x, tau, router, spec.rule)
    assert gates[:, kept:].any()
    gates[:, kept:] = 0
    tuning = Tuning(((1 << 30, replace(NO_TUNING[path].choices[0][1], router=SELECTS[select])),))
    results = []
    for is_ahead in (False, True):
        counters = Counters(torch.zeros(num_tokens, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
        options = dict(tuning=tuning, counters=counters)
        ahead = route_ahead(x, tau, router, spec, **options) if is_ahead else None
        y = routed_ffn(x, tau, router, part, spec, routing=ahead, **options)
        assert error(y, reference_ffn(x, gates, weights, "silu", glu)) < TOLERANCE[torch.float32]
        assert torch.equal(counters.active, (gates != 0).sum(1).int())
        assert counters.read.item() == (kept if path == "dense" else (gates != 0).any(0).sum())
        results.append(y)
    assert torch.equal(*results)
