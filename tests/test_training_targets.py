"""What routers are taught: costs measured before training, against computations written from their definition."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CAUSAL_FAMILY_NAMES
from transformers import AutoModelForCausalLM

from prunepath_vllm.conversion.costs import ANCHOR_SPARSITY, ANCHOR_TAU, SHARPNESS, evenly_spread
from prunepath_vllm.modeling import register_auto_classes
from prunepath_vllm.training.low_rank import add_low_rank
from prunepath_vllm.training.model import TrainingModel, family_of_model
from prunepath_vllm.training.targets import LENGTH, SEQUENCES, LayerCosts, layer_costs

SKIP, SEED = 1, 3


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(4, 300, (length,), generator=generator) for length in (40, 24, 33, 40)]


def load(checkpoint):
    register_auto_classes()
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()


def fisher(model, sequences):
    """The gradients' mean outer product at every layer's output, a zero added there to differentiate by."""
    family = family_of_model(model)
    generator = torch.Generator().manual_seed(SEED)
    sums = [torch.zeros(model.config.hidden_size, model.config.hidden_size) for _ in range(3)]
    for sequence in sequences[::2]:
        zeros = [torch.zeros(1, len(sequence), model.config.hidden_size, requires_grad=True) for _ in sums]
        handles = [
            model.get_submodule(family.output(layer)).register_forward_hook(lambda _, __, y, zero=zero: y + zero)
            for layer, zero in enumerate(zeros)
        ]
        logits = model(sequence[None], tau=1.0).logits[0]
        for handle in handles:
            handle.remove()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        gradients = torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), zeros)
        for layer, gradient in enumerate(gradients):
            for g in gradient[0, SKIP:]:
                sums[layer] += torch.outer(g, g)
    return sums


@pytest.mark.parametrize("family", CAUSAL_FAMILY_NAMES)
def test_metrics_are_the_fisher_matrices_and_the_model_stays_as_it_was(prunepath_checkpoint, family, sequences):
    model = load(prunepath_checkpoint(family, expert_size=8))
    model.get_input_embeddings().requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    experts = model.config.prunepath_config["num_experts"]
    found = layer_costs(model, family_of_model(model), experts, sequences, skip=SKIP, seed=SEED)
    assert model.training
    assert len(found) == 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    for one, expected in zip(found, fisher(model.eval(), sequences), strict=True):
        expected = expected / expected.diagonal().mean()
        torch.testing.assert_close(one.metric, expected, rtol=1e-3, atol=1e-4)
        assert one.sharpness in SHARPNESS


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_routers_are_taught_shares_of_what_leaving_out_costs(prunepath_checkpoint, family, rank):
    """With experts of one neuron no cross terms are left out, so the target is known from the outputs themselves."""
    model = load(prunepath_checkpoint(family, expert_size=1)).eval()
    if rank:
        torch.manual_seed(0)
        for module in add_low_rank(model, rank).values():
            torch.nn.init.normal_(module.up, std=0.1)
    hidden = model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    costs = []
    for sharpness in (0.3, 1.0, 0.75):
        root = torch.randn(hidden, hidden, generator=generator)
        costs.append(LayerCosts(root @ root.T, sharpness))
    training = TrainingModel(model, costs=costs)
    training.set_terms({"contribution": 1.0}, threshold=None)
    seen = []
    row = family_of_model(model)
    for layer in range(3):
        model.get_submodule(row.router(layer)).register_forward_hook(lambda _, __, out: seen.append([out[1]]))
        model.get_submodule(row.output(layer)).register_forward_pre_hook(lambda _, args: seen[-1].append(args[0]))
    tokens = torch.randint(4, 300, (2, 6), generator=generator)
    with torch.no_grad():
        got = training(tokens, tokens, tau=1.0)  # every expert: what the second linear reads is what the router saw
    losses = []
    for layer, (logits, neurons) in enumerate(seen):
        weight = model.get_submodule(row.output(layer)).weight
        columns = weight if row.conv1d else weight.T
        outputs = neurons.double().unsqueeze(-1) * columns.double()  # [B, S, F, H]
        spent = torch.einsum("bsfh,hk,bsfk->bsf", outputs, costs[layer].metric.double(), outputs)
        powers = spent ** costs[layer].sharpness
        shares = powers / powers.sum(-1, keepdim=True)
        losses.append(-(shares * logits.double().log_softmax(-1)).sum(-1).mean())
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(got["loss"].double() - got["task"].double(), expected, rtol=1e-5, atol=1e-5)


def test_no_other_sharpness_leaves_out_as_much_for_less(prunepath_checkpoint, sequences):
    """Every choice for three layers is tried: none with that sparsity at the anchor tau has a lower cost."""
    model = load(prunepath_checkpoint("llama", expert_size=8)).eval()
    row = family_of_model(model)
    experts = model.config.prunepath_config["num_experts"]
    chosen = layer_costs(model, row, experts, sequences, skip=SKIP, seed=SEED)
    neurons = [[] for _ in chosen]
    for layer, seen in enumerate(neurons):
        model.get_submodule(row.output(layer)).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0][0, SKIP:].double())
        )
    with torch.no_grad():
        for sequence in sequences:
            model(sequence[None], tau=1.0)
    table = []  # by layer: {sharpness: (sparsity, cost)}
    for layer, (seen, one) in enumerate(zip(neurons, chosen, strict=True)):
        columns = model.get_submodule(row.output(layer)).weight.detach().double()
        outputs = torch.cat(seen).unflatten(-1, (experts, -1)).unsqueeze(-1) * columns.T.unflatten(0, (experts, -1))
        outputs = outputs.sum(2)  # [N, E, H]
        spent = torch.einsum("neh,hk,nek->ne", outputs, one.metric.double(), outputs)
        rows = {}
        for sharpness in SHARPNESS:
            p = spent**sharpness
            p, order = (p / p.sum(-1, keepdim=True)).sort(-1, descending=True)
            out = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p >= ANCHOR_TAU)
            missing = (outputs * out.unsqueeze(-1)).sum(1)
            rows[sharpness] = (
                out.double().mean(),
                torch.einsum("nh,hk,nk->n", missing, one.metric.double(), missing).mean(),
            )
        table.append(rows)
    # layer_costs gives metrics of mean diagonal 1; between layers they count as they were.
    scale = [float(matrix.diagonal().mean()) for matrix in fisher(model, sequences)]

    def total(choice):
        return (
            float(sum(table[layer][s][0] for layer, s in enumerate(choice))),
            float(sum(scale[layer] * table[layer][s][1] for layer, s in enumerate(choice))),
        )

    sparsity, cost = total([one.sharpness for one in chosen])
    assert sparsity / 3 >= ANCHOR_SPARSITY - 0.01
    for choice in itertools.product(SHARPNESS, repeat=3):
        other_sparsity, other_cost = total(choice)
        assert other_sparsity < sparsity + 1e-6 or other_cost > cost * (1 - 1e-3), choice


def test_little_is_read():
    assert evenly_spread(3, SEQUENCES).tolist() == [0, 1, 2]
    spread = evenly_spread(1000, SEQUENCES).tolist()
    assert len(spread) == SEQUENCES
    assert spread[0] == 0
    assert spread[-1] == 999


def test_long_sequences_are_cut(prunepath_checkpoint):
    model = load(prunepath_checkpoint("llama", expert_size=8))
    generator = torch.Generator().manual_seed(2)
    long = [torch.randint(4, 300, (LENGTH + 64,), generator=generator) for _ in range(2)]
    experts = model.config.prunepath_config["num_experts"]
    whole, cut = (
        layer_costs(model, family_of_model(model), experts, texts, skip=SKIP, seed=SEED)
        for texts in (long, [text[:LENGTH] for text in long])
    )
    assert all(torch.equal(a.metric, b.metric) for a, b in zip(whole, cut, strict=True))
