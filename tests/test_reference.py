"""The PyTorch reference of routing and of the routed feed-forward layer, against the equations token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import active_experts

from prunepath_vllm.kernels import reference

logit = st.floats(-20, 20, width=32).map(lambda x: round(x, 3))
token_logits = st.lists(logit, min_size=1, max_size=24).map(torch.tensor)
tau_values = st.floats(0.01, 1.05)


def select(logits, tau):
    return reference.select_cumulative_mass(logits, torch.tensor(tau))


def from_probabilities(probabilities):
    return torch.tensor(probabilities).log()


def indices(active):
    return active.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("probabilities", "tau", "expected"),
    [
        ([0.1, 0.5, 0.4], 0.05, [1]),
        ([0.1, 0.5, 0.4], 0.6, [1]),
        ([0.1, 0.5, 0.4], 0.95, [1, 2]),
        ([0.1, 0.5, 0.4], 0.9999, [1, 2]),
        ([0.1, 0.5, 0.4], 1.0, [0, 1, 2]),
        ([0.1, 0.5, 0.4], 1.05, [0, 1, 2]),
        ([1.0], 0.01, [0]),
    ],
)
def test_the_crossing_expert_is_out_and_the_top_expert_stays(probabilities, tau, expected):
    assert indices(select(from_probabilities(probabilities), tau)) == expected


def test_a_cumulative_mass_equal_to_tau_is_out():
    """Four equal probabilities of exactly 0.25 sum exactly: 0.25 + 0.25 < 0.5 is false."""
    logits = torch.zeros(4)
    assert indices(select(logits, 0.5)) == [0]
    assert indices(select(logits, 0.5001)) == [0, 1]
    assert indices(select(logits, 0.75)) == [0, 1]


@pytest.mark.parametrize("num_experts", [4, 64, 592])
def test_ties_go_to_the_lower_index(num_experts):
    active = select(torch.zeros(3, num_experts), 0.5)
    count = int(active[0].sum())
    assert 0 < count < num_experts
    assert all(indices(row) == list(range(count)) for row in active)
    logits = torch.zeros(num_experts)
    logits[-1] = 0.5
    *rest, top = indices(select(logits, 0.7))
    assert top == num_experts - 1
    assert rest == list(range(len(rest)))
    assert rest


def test_from_tau_1_on_rounding_of_the_sum_does_not_matter():
    """Float32 sums of a softmax end above, at and below 1; by comparison some of these would drop experts."""
    logits = torch.randn(500, 48, generator=torch.Generator().manual_seed(0)) * 4
    logits[0] = torch.tensor([0.0] + [-40.0] * 47)
    mass = logits.softmax(-1).sort(descending=True).values.cumsum(-1)
    assert (mass >= 1).any(-1).any()
    assert (mass[:, -1] < 1).any()
    for tau in (1.0, 1.05):
        assert select(logits, tau).all()
    assert not select(logits, 0.99999).all()


@given(token_logits, tau_values)
@settings(max_examples=300, deadline=None)
def test_selection_equals_the_loop(logits, tau):
    tau = torch.tensor(tau).item()
    ranked = logits.softmax(0).sort(descending=True).values.cumsum(0)
    if (ranked - tau).abs().min() < 1e-5:  # the order of additions may decide
        return
    assert indices(select(logits, tau)) == active_experts(logits, tau, selection="cumulative_mass", threshold=None)


@given(token_logits, st.tuples(tau_values, tau_values).map(sorted))
@settings(max_examples=200, deadline=None)
def test_a_larger_tau_never_drops_an_expert(logits, taus):
    lower, upper = (select(logits, tau) for tau in taus)
    assert lower.any()
    assert lower[logits.argmax()]
    assert (upper | ~lower).all()


@given(token_logits, tau_values)
@settings(max_examples=100, deadline=None)
def test_active_experts_outrank_inactive_ones(logits, tau):
    active = select(logits, tau)
    if not active.all():
        assert logits[active].min() >= logits[~active].max()


def test_every_token_has_its_own_tau():
    logits = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    taus = torch.tensor([0.1, 0.5, 0.9, 1.0, 1.05, 0.3])
    together = reference.select_cumulative_mass(logits, taus)
    for row, tau in enumerate(taus.tolist()):
        assert torch.equal(together[row], select(logits[row], tau))
    nested = reference.select_cumulative_mass(logits.view(2, 3, 16), taus.view(2, 3))
    assert torch.equal(nested.view(6, 16), together)


def test_threshold_selection():
    logits = torch.tensor([[-1.0, 0.0, 1.0, 3.0], [-4.0, -4.0, -4.0, -4.0]])
    active = reference.select_threshold(logits, torch.tensor([0.5, 0.5]), 0.5)
    assert active.tolist() == [[False, False, True, True], [False] * 4]
    assert reference.select_threshold(logits, torch.tensor([1.0, 1.05]), 0.5).all()


@pytest.mark.parametrize("gate", ["sigmoid", "none"])
@pytest.mark.parametrize("selection", ["cumulative_mass", "threshold"])
def test_expert_weights(selection, gate):
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    threshold = 0.4 if selection == "threshold" else None
    weights = reference.expert_weights(
        logits, torch.full((5,), 0.7), selection=selection, threshold=threshold, gate=gate
    )
    for row in range(5):
        active = active_experts(logits[row], 0.7, selection=selection, threshold=threshold)
        expected = torch.zeros(8)
        expected[active] = torch.sigmoid(logits[row, active].detach()) if gate == "sigmoid" else 1.0
        torch.testing.assert_close(weights[row].detach(), expected)
    assert weights.requires_grad == (gate == "sigmoid")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_logits_are_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 5, 16, generator=generator).to(dtype), torch.randn(6, 16, generator=generator).to(dtype)
    bias = torch.randn(6, generator=generator).to(dtype)
    logits = reference.router_logits(x, weight, bias)
    assert logits.dtype == torch.float32
    expected = (x.double() @ weight.double().t() + bias.double()).float()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.router_logits(x, weight), expected - bias.float(), rtol=1e-5, atol=1e-5)


def test_scale_neurons_and_sparsity():
    neurons = torch.arange(1.0, 13.0).view(2, 6)
    weights = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 2.0]])
    scaled = reference.scale_neurons(neurons, weights)
    assert scaled.tolist() == [[1, 2, 0, 0, 2.5, 3], [0, 0, 0, 0, 22, 24]]
    assert reference.scale_neurons(neurons.bfloat16(), weights).dtype == torch.bfloat16
    torch.testing.assert_close(reference.ffn_sparsity(weights), torch.tensor([1 / 3, 2 / 3]))
    torch.testing.assert_close(reference.ffn_sparsity(weights > 0), torch.tensor([1 / 3, 2 / 3]))
