"""Loss terms against computations written from the equations, token by token; which term moves which parameter."""

import math

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from transformers import AutoModelForCausalLM

from prunepath_vllm.config import PrunePathConfig, Split
from prunepath_vllm.modeling import register_auto_classes
from prunepath_vllm.modeling.routing import Router
from prunepath_vllm.training import head, losses
from prunepath_vllm.training.model import TrainingModel

BATCH, LENGTH, EXPERTS, SIZE, HIDDEN = 3, 5, 6, 4, 7


@pytest.fixture(scope="module")
def case():
    """Router logits, neurons, a second linear [F, H] and a mask that pads the ends of two sequences."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, LENGTH, EXPERTS, generator=generator) * 2
    neurons = torch.randn(BATCH, LENGTH, EXPERTS * SIZE, generator=generator)
    down = torch.randn(EXPERTS * SIZE, HIDDEN, generator=generator)
    mask = torch.ones(BATCH, LENGTH)
    mask[0, 3:] = 0
    mask[2, 1:] = 0
    return logits, neurons, down, mask


def tokens_of(values, mask):
    """What stands at the tokens that count, one list item a token."""
    return [values[b, s].double() for b in range(BATCH) for s in range(LENGTH) if mask is None or mask[b, s]]


def softmax(g):
    weights = [math.exp(float(value) - float(max(g))) for value in g]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("padded", [False, True])
def test_paper_terms(case, padded):
    logits, _, _, mask = case
    mask = mask if padded else None
    tokens = tokens_of(logits, mask)
    p = [softmax(g) for g in tokens]
    entropy = -sum(q * math.log(q + 1e-8) for row in p for q in row) / len(p)
    balance = EXPERTS * sum((sum(row[e] for row in p) / len(p)) ** 2 for e in range(EXPERTS))
    gate = sum(1 / (1 + math.exp(-float(value))) for g in tokens for value in g) / (len(tokens) * EXPERTS)
    assert losses.entropy_loss(logits, mask).item() == pytest.approx(entropy, rel=1e-5)
    assert losses.balance_loss(logits, mask).item() == pytest.approx(balance, rel=1e-5)
    assert losses.gate_loss(logits, mask).item() == pytest.approx(gate, rel=1e-5)


def test_balance_has_its_known_extremes():
    even = torch.zeros(2, 3, EXPERTS)
    one = torch.full((2, 3, EXPERTS), -40.0)
    one[..., 2] = 40.0
    assert losses.balance_loss(even).item() == pytest.approx(1)
    assert losses.balance_loss(one).item() == pytest.approx(EXPERTS)


@pytest.mark.parametrize("padded", [False, True])
def test_contribution_loss(case, padded):
    logits, neurons, down, mask = case
    mask = mask if padded else None
    expected = 0.0
    tokens = tokens_of(logits, mask)
    for g, h in zip(tokens, tokens_of(neurons, mask), strict=True):
        # Neuron by neuron: the cross terms inside an expert are left out by definition.
        parts = [float(h[n]) ** 2 * float((down[n].double() ** 2).sum()) for n in range(EXPERTS * SIZE)]
        cost = [sum(parts[e * SIZE : (e + 1) * SIZE]) for e in range(EXPERTS)]
        expected -= sum(c / sum(cost) * math.log(q) for c, q in zip(cost, softmax(g), strict=True))
    shares = losses.contribution_shares(neurons, down.norm(dim=1), EXPERTS)
    assert losses.contribution_loss(logits, shares, mask).item() == pytest.approx(expected / len(tokens), rel=1e-5)


def test_contribution_of_one_neuron_experts_is_exact():
    """With one neuron an expert there are no cross terms: shares are those of the true outputs' squared norms."""
    generator = torch.Generator().manual_seed(1)
    neurons, down = torch.randn(2, 3, 9, generator=generator), torch.randn(9, 5, generator=generator)
    outputs = torch.einsum("bsf,fh->bsfh", neurons, down).square().sum(-1)
    shares = losses.contribution_shares(neurons, down.norm(dim=1), 9)
    torch.testing.assert_close(shares, outputs / outputs.sum(-1, keepdim=True))


def test_a_dead_layers_shares_are_even():
    assert (losses.contribution_shares(torch.zeros(1, 2, 8), torch.ones(8), 2) == 0.5).all()


@pytest.mark.parametrize("sharpness", [0.1, 0.75, 2.0])
def test_shares_are_of_the_costs_power(case, sharpness):
    _, neurons, down, _ = case
    shares = losses.contribution_shares(neurons, down.norm(dim=1), EXPERTS, torch.tensor(sharpness))
    costs = (neurons.double() * down.double().norm(dim=1)).square().unflatten(-1, (EXPERTS, SIZE)).sum(-1)
    powers = costs**sharpness
    torch.testing.assert_close(shares.double(), powers / powers.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("teacher_share", [0.0, 0.3])
@pytest.mark.parametrize("positions", [5, 12])
def test_chunked_cross_entropy_and_its_gradients(monkeypatch, positions, teacher_share):
    monkeypatch.setattr(head, "CHUNK", 5)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(positions, 8, generator=generator, requires_grad=True)
    weight = torch.randn(31, 8, generator=generator, requires_grad=True)
    teacher = (torch.randn(positions, 6, generator=generator), torch.randn(31, 6, generator=generator))
    labels = torch.randint(31, (positions,), generator=generator)
    labels[1] = labels[3] = -100

    got = head.linear_cross_entropy(
        hidden, weight, labels, teacher=teacher if teacher_share else None, share=teacher_share
    )
    logits = hidden @ weight.T
    target = (teacher[0] @ teacher[1].T).softmax(-1)
    distilled = -(target * logits.log_softmax(-1)).sum(-1)[labels != -100].mean()
    want = (1 - teacher_share) * F.cross_entropy(logits, labels) + teacher_share * distilled
    torch.testing.assert_close(got, want)
    got_gradients = torch.autograd.grad(2 * got, (hidden, weight))
    want_gradients = torch.autograd.grad(2 * want, (hidden, weight))
    torch.testing.assert_close(got_gradients, want_gradients)

    frozen = head.linear_cross_entropy(
        hidden, weight.detach(), labels, teacher=teacher if teacher_share else None, share=teacher_share
    )
    torch.testing.assert_close(torch.autograd.grad(2 * frozen, hidden)[0], want_gradients[0])


def test_no_label_no_loss():
    loss = head.linear_cross_entropy(torch.randn(4, 3), torch.randn(5, 3), torch.full((4,), -100))
    assert loss.item() == 0


def test_labels_are_shifted_by_one():
    assert head.shifted(torch.tensor([[5, 6, 7], [8, 9, 4]])).tolist() == [6, 7, -100, 9, 4, -100]


def gradients(checkpoint, *, terms, gate, tau):
    """Norms of the gradients that reach the routers and everything else."""
    register_auto_classes()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    training = TrainingModel(model)
    training.set_terms(terms, threshold=0.5)
    training.set_routing(selection="cumulative_mass", gate=gate, threshold=None)
    tokens = torch.randint(4, 300, (2, 16), generator=torch.Generator().manual_seed(3))
    training(tokens, tokens, tau=tau)["loss"].backward()
    routers = [p.grad for name, p in model.named_parameters() if ".router." in name]
    others = [p.grad for name, p in model.named_parameters() if ".router." not in name]
    return routers, others


def test_the_task_loss_reaches_no_router_without_gates(prunepath_checkpoint):
    routers, others = gradients(prunepath_checkpoint("llama"), terms={}, gate="none", tau=0.6)
    assert all(gradient is None or not gradient.any() for gradient in routers)
    assert all(gradient is not None and gradient.any() for gradient in others)


@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_the_task_loss_reaches_every_router_through_its_gates(prunepath_checkpoint, tau):
    routers, _ = gradients(prunepath_checkpoint("llama"), terms={}, gate="sigmoid", tau=tau)
    assert all(gradient is not None and gradient.any() for gradient in routers)


def test_gates_of_experts_left_out_get_no_gradient(prunepath_checkpoint):
    """With a tau so low that one expert a token is left, a router row whose expert no token used stays as it is."""
    checkpoint = prunepath_checkpoint("llama")
    register_auto_classes()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    training = TrainingModel(model)
    training.set_routing(selection="cumulative_mass", gate="sigmoid", threshold=None)
    tokens = torch.randint(4, 300, (1, 4), generator=torch.Generator().manual_seed(3))
    training(tokens, tokens, tau=0.01)["loss"].backward()
    for router, used in zip(training.routers, training.usage() > 0, strict=True):
        assert router.weight.grad[~used].abs().max() == 0
        assert used.sum() <= 4


@pytest.mark.parametrize("term", ["entropy", "balance", "gate", "contribution", "efficiency", "separation"])
def test_every_router_term_reaches_every_router(prunepath_checkpoint, term):
    routers, others = gradients(prunepath_checkpoint("llama"), terms={term: 1.0}, gate="none", tau=0.6)
    assert all(gradient is not None and gradient.any() for gradient in routers)
    _, plain = gradients(prunepath_checkpoint("llama"), terms={}, gate="none", tau=0.6)
    same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(others, plain, strict=True))
    assert same == (term in ("contribution", "efficiency", "separation"))  # these end in the router


def test_terms_are_averaged_over_layers_and_ignore_padding(prunepath_checkpoint):
    register_auto_classes()
    model = AutoModelForCausalLM.from_pretrained(prunepath_checkpoint("llama"), dtype=torch.float32).eval()
    training = TrainingModel(model)
    weights = {"entropy": 0.3, "balance": 0.5}
    training.set_terms(weights, threshold=None)
    tokens = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    with torch.no_grad():
        got = training(tokens, labels, attention_mask=mask, tau=0.7)
        output = model(tokens, attention_mask=mask, tau=0.7, output_router_logits=True)
    layers = output.router_logits
    entropy = sum(losses.entropy_loss(g, mask.float()) for g in layers) / len(layers)
    balance = sum(losses.balance_loss(g, mask.float()) for g in layers) / len(layers)
    task = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(got["task"], task)
    torch.testing.assert_close(got["loss"], task + 0.3 * entropy + 0.5 * balance)
    with torch.no_grad():
        other = tokens.masked_fill(mask == 0, 17)
        again = training(other, labels, attention_mask=mask, tau=0.7)
    torch.testing.assert_close(again["loss"], got["loss"])


# Under torch.compile


class RoutedNeurons(torch.nn.Module):
    """A layer's routing with its terms, of experts of 4."""

    def __init__(self, hidden, experts, terms):
        super().__init__()
        split = Split(method="random", seed=0)
        block = PrunePathConfig(format_version=1, num_experts=experts, expert_size=4, gate="sigmoid", split=split)
        self.router = Router(hidden, block)
        torch.manual_seed(0)
        torch.nn.init.normal_(self.router.weight, std=hidden**-0.5)
        self.down = torch.nn.Parameter(torch.randn(experts * 4, hidden) * 0.02)
        self.router.observer = losses.RouterTerms(experts, lambda: self.down)
        self.router.observer.wanted = frozenset(terms)

    def forward(self, x, neurons):
        tau = torch.full(x.shape[:2], 1.05, device=x.device)
        return self.router.scale(x, neurons, tau) @ self.down.to(neurons.dtype), self.router.observer.terms

    def gradient(self, x, neurons, call):
        """The router's, of all terms and a task that likes large outputs."""
        self.zero_grad()
        self.router.observer.prepare(None)
        outputs, terms = call(x, neurons)
        (outputs.float().square().mean() + terms.sum()).backward()
        return self.router.weight.grad.clone()


TERMS_BESIDE_A_GATE = [("entropy", "balance"), ("contribution",), ("entropy", "balance", "gate", "contribution")]


@pytest.mark.parametrize("terms", TERMS_BESIDE_A_GATE, ids="+".join)
def test_sums_over_an_experts_neurons_are_kernels_of_their_own(terms):
    graphs = []

    def kept(graph, inputs):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    layer, x, neurons = RoutedNeurons(16, 12, terms), torch.randn(2, 5, 16), torch.randn(2, 5, 48, requires_grad=True)
    alone = layer.gradient(x, neurons, layer)
    call = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=kept, bw_compiler=kept))
    torch.testing.assert_close(layer.gradient(x, neurons, call), alone)

    sums = [
        node
        for graph in graphs
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
        if node.args[0].meta["val"].shape == (2, 5, 12, 4)
    ]
    assert len(sums) == 1 + ("contribution" in terms)
    for node in sums:
        users = list(node.users)
        while users[0].target in (torch.ops.aten.squeeze.dim, torch.ops.aten.view.default):
            (node,) = users
            users = list(node.users)
        assert [user.target for user in users] == [torch.ops.prunepath.kernel_boundary.default]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("terms", TERMS_BESIDE_A_GATE, ids="+".join)
@pytest.mark.parametrize("batch", [8, 16, 32])
def test_compiled_terms_on_a_gpu_have_the_gradients_of_eager_ones(terms, batch):
    torch._dynamo.reset()
    layer = RoutedNeurons(576, 384, terms).cuda()
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(batch, 1024, 576, device="cuda", generator=generator)
    neurons = torch.randn(batch, 1024, 1536, device="cuda", generator=generator).bfloat16().requires_grad_()
    alone = layer.gradient(x, neurons, layer)
    call = torch.compile(layer, fullgraph=True, dynamic=False)
    for _ in range(10):  # what one thread reads of another's depends on the moment
        assert (layer.gradient(x, neurons, call) - alone).norm() < 0.02 * alone.norm()
