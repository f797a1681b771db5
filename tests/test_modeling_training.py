"""What training needs of the transformers models: gradients, routing statistics with gradient, checkpointing."""

import pytest
import torch
from tiny_models import CAUSAL_FAMILY_NAMES, FAMILY_NAMES
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prunepath_vllm.errors import UnsupportedFeatureError
from prunepath_vllm.modeling import register_auto_classes
from prunepath_vllm.modeling.routing import Router


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_auto_classes()


def load(path, family, seed=0):
    """A model in training mode, without dropout, so that runs can be compared."""
    auto = AutoModelForSequenceClassification if family == "roberta" else AutoModelForCausalLM
    model = auto.from_pretrained(path).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    return model


def batch(family, size=2, length=10):
    ids = torch.randint(4, 300, (size, length), generator=torch.Generator().manual_seed(1))
    return dict(input_ids=ids, labels=torch.arange(size) % 3 if family == "roberta" else ids)


def routers(model):
    return [module for module in model.modules() if isinstance(module, Router)]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_sigmoid_gate_trains_the_routers(prunepath_checkpoint, family):
    model = load(prunepath_checkpoint(family, gate="sigmoid", router_bias=True), family)
    model(**batch(family), tau=[0.5, 0.9]).loss.backward()
    for router in routers(model):
        assert router.weight.grad.abs().max() > 0
        assert router.bias.grad.abs().max() > 0
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_without_a_gate_only_the_router_logits_train_the_routers(prunepath_checkpoint, family):
    model = load(prunepath_checkpoint(family), family)
    outputs = model(**batch(family), tau=0.7, output_router_logits=True)
    outputs.loss.backward(retain_graph=True)
    assert all(router.weight.grad is None for router in routers(model))
    entropy = -sum((g.softmax(-1) * g.log_softmax(-1)).sum(-1).mean() for g in outputs.router_logits)
    entropy.backward()
    assert all(router.weight.grad.abs().max() > 0 for router in routers(model))


def test_only_active_experts_get_gradient(prunepath_checkpoint):
    model = load(prunepath_checkpoint("llama", gate="sigmoid"), "llama")
    outputs = model(**batch("llama", size=1, length=4), tau=0.3, output_router_logits=True)
    outputs.loss.backward()
    for layer, active in zip(model.model.layers, outputs.active_experts, strict=True):
        used = active[0, :-1].any(0)  # the last token has no label
        assert 0 < used.sum() < 8
        gate_grad = layer.mlp.gate_proj.weight.grad.unflatten(0, (8, 32)).abs().amax((1, 2))
        down_grad = layer.mlp.down_proj.weight.grad.unflatten(1, (8, 32)).abs().amax((0, 2))
        router_grad = layer.mlp.router.weight.grad.abs().amax(1)
        for grad in (gate_grad, down_grad, router_grad):
            assert torch.equal(grad > 0, used)


def test_every_expert_means_every_expert_gets_gradient(prunepath_checkpoint):
    model = load(prunepath_checkpoint("gpt2", gate="sigmoid"), "gpt2")
    model(**batch("gpt2"), tau=1.05).loss.backward()
    for block in model.transformer.h:
        assert (block.mlp.c_fc.weight.grad.unflatten(1, (8, 32)).abs().amax((0, 2)) > 0).all()


def test_router_gradient_equals_a_finite_difference(prunepath_checkpoint):
    model = load(prunepath_checkpoint("qwen2", gate="sigmoid"), "qwen2").double()
    inputs = batch("qwen2")
    model(**inputs, tau=0.8).loss.backward()
    weight = model.model.layers[1].mlp.router.weight
    row, column = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
    losses = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            weight[row, column] += step
            losses.append(model(**inputs, tau=0.8).loss.item())
            weight[row, column] -= step
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(weight.grad[row, column].item(), rel=0.02)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradient_checkpointing_changes_nothing(prunepath_checkpoint, family):
    """tau and the recorded logits must survive the second forward, also when another forward ran in between."""
    path = prunepath_checkpoint(family, gate="sigmoid")
    plain, checkpointed = load(path, family), load(path, family)
    checkpointed.gradient_checkpointing_enable()
    inputs = batch(family)
    for model in (plain, checkpointed):
        outputs = model(**inputs, tau=[0.4, 0.9], output_router_logits=True)
        model(**inputs, tau=1.0)
        penalty = sum(g.logsumexp(-1).square().mean() for g in outputs.router_logits)
        (outputs.loss + 0.1 * penalty).backward()
        assert len(outputs.router_logits) == len(routers(model))
    expected, found = gradients(plain), gradients(checkpointed)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_trains_but_refuses_router_logits(prunepath_checkpoint):
    path = prunepath_checkpoint("llama", gate="sigmoid")
    plain, reentrant = load(path, "llama"), load(path, "llama")
    reentrant.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    reentrant.enable_input_require_grads()
    for model in (plain, reentrant):
        model(**batch("llama"), tau=[0.4, 0.9]).loss.backward()
    expected, found = gradients(plain), gradients(reentrant)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
    with pytest.raises(UnsupportedFeatureError, match="use_reentrant"):
        reentrant(**batch("llama"), output_router_logits=True)


@pytest.mark.parametrize("family", CAUSAL_FAMILY_NAMES)
def test_a_few_steps_lower_the_loss(prunepath_checkpoint, family):
    model = load(prunepath_checkpoint(family, gate="sigmoid"), family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    inputs = batch(family, size=4)
    losses = []
    for _ in range(8):
        outputs = model(**inputs, tau=[0.4, 0.6, 0.8, 1.05])
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_labels_give_the_dense_loss(prunepath_checkpoint, dense_checkpoint):
    for family, auto in (("llama", AutoModelForCausalLM), ("roberta", AutoModelForSequenceClassification)):
        inputs = batch(family)
        with torch.no_grad():
            loss = auto.from_pretrained(prunepath_checkpoint(family))(**inputs).loss
            expected = auto.from_pretrained(dense_checkpoint(family))(**inputs).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
