"""Moments of linears' inputs against gradients that autograd gives, and what they are not taken of."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from prunepath_vllm.modeling import register_auto_classes
from prunepath_vllm.training.moments import input_moments

TOKENS = [7, 30, 11, 52, 9]


def load(path):
    register_auto_classes()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("lowest", [1.0, 0.3])
def test_moments_of_single_tokens_are_their_gradients_products(prunepath_checkpoint, lowest):
    """Of one token the gradient of a weight is g x', so that (g x')' (g x') is |g|^2 x x'."""
    model = load(prunepath_checkpoint("llama", router_input="attention"))
    sequences = [torch.tensor([token]) for token in TOKENS]
    got = input_moments(model.requires_grad_(False), sequences, lowest_tau=lowest, seed=5)

    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(5)
    want = {}
    for sequence in sequences:
        tau = 1 - (1 - lowest) * float(torch.rand((), generator=generator))
        logits = model(sequence[None], tau=tau).logits[0]
        label = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[0]
        model.zero_grad()
        F.cross_entropy(logits, label).backward()
        for name in got:
            gradient = model.get_parameter(name).grad
            want[name] = want.get(name, 0) + gradient.T @ gradient / len(TOKENS)
    for name, moment in got.items():
        torch.testing.assert_close(moment, want[name], rtol=1e-3, atol=1e-6 * want[name].abs().max().item() + 1e-12)
    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-2] for name in got} == linears
    assert len(got) == len(linears) * model.config.num_hidden_layers


def test_a_longer_sequence_adds_up_its_tokens(prunepath_checkpoint):
    model = load(prunepath_checkpoint("llama")).requires_grad_(False)
    sequence = torch.tensor(TOKENS * 4)
    seen = []
    name = "model.layers.0.self_attn.q_proj"
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(args[0][0]))
    moment = input_moments(model, [sequence], lowest_tau=1.0, seed=0)[f"{name}.weight"]
    handle.remove()
    assert moment.shape == (model.config.hidden_size,) * 2
    # Inputs of rank at most the distinct tokens', and nothing outside their span.
    _, values, basis = torch.linalg.svd(seen[0])
    outside = basis[int((values > 1e-4 * values[0]).sum()) :]
    assert (outside @ moment @ outside.T).abs().max() <= 1e-4 * moment.diagonal().max()
    assert torch.linalg.eigvalsh(moment)[0] >= -1e-5 * moment.diagonal().max()


def test_linears_of_another_layout_are_left_out(prunepath_checkpoint):
    """GPT-2's weights lie [inputs, outputs]; they are rounded to the nearest."""
    model = load(prunepath_checkpoint("gpt2")).requires_grad_(False)
    assert input_moments(model, [torch.tensor(TOKENS)], lowest_tau=1.0, seed=0) == {}
