"""The CPU kernel behind transformers' forward and generate: where it computes, where it must not, what it leaves."""

import pytest
import torch
from naive import load_naive, naive_logits
from tiny_models import CAUSAL_FAMILY_NAMES, LAYERS
from torch import nn
from transformers import AutoModelForCausalLM

from prunepath_vllm.kernels import cpu, native
from prunepath_vllm.modeling import register_auto_classes

TAU = 0.5


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_auto_classes()


@pytest.fixture
def calls(monkeypatch):
    """The tokens of every call of the kernel."""
    made, run = [], native.RoutedFFN.__call__

    def counted(self, x, tau, **options):
        made.append(len(x))
        return run(self, x, tau, **options)

    monkeypatch.setattr(native.RoutedFFN, "__call__", counted)
    return made


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def tokens(batch, length):
    return torch.randint(4, 300, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("family", CAUSAL_FAMILY_NAMES)
def test_generate_computes_every_layer_with_the_kernel(prunepath_checkpoint, calls, family):
    path = prunepath_checkpoint(family, gate="sigmoid")
    model = load(path)
    made = model.generate(tokens(2, 3), tau=[0.3, 0.9], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert calls == [2 * 3] * LAYERS + [2] * LAYERS * (made.shape[1] - 4)
    with torch.no_grad():
        result = model(made, tau=[0.3, 0.9]).logits
    for row, tau in enumerate((0.3, 0.9)):
        torch.testing.assert_close(
            result[row], naive_logits(load_naive(path), made[row].tolist(), tau), rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_close_to_float32_as_pytorch_is(prunepath_checkpoint, monkeypatch, dtype):
    path = prunepath_checkpoint("llama", gate="none")
    model, ids = load(path, dtype=dtype), tokens(2, 4)
    with torch.no_grad():
        exact = load(path, dtype=dtype).float()(ids, tau=1.0).logits
        by_kernel = model(ids, tau=1.0).logits
        monkeypatch.setattr(cpu, "native_tokens", lambda *_, **__: 0)
        by_pytorch = model(ids, tau=1.0).logits
    error, usual = ((one.float() - exact).norm() / exact.norm() for one in (by_kernel, by_pytorch))
    assert not torch.equal(by_kernel, by_pytorch)
    assert error <= usual * 1.1


def with_gradients(model, run):
    with torch.enable_grad():
        run()


def recorded(model, run):
    run(output_router_logits=True)


def in_training(model, run):
    model.train()
    run()


def under_autocast(model, run):
    with torch.autocast("cpu", torch.bfloat16):
        run()


def with_another_linear(model, run):
    class Adapted(nn.Linear):
        pass

    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Adapted
    run()


def with_a_hook(model, run):
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda *_: None)
    run()


def with_a_wrapped_forward(model, run):
    for layer in model.model.layers:
        layer.mlp.gate_proj.forward = layer.mlp.gate_proj.forward
    run()


def with_an_observer(model, run):
    for layer in model.model.layers:
        layer.mlp.router.observer = lambda *_: None
    run()


@pytest.mark.parametrize(
    "how",
    [
        with_gradients,
        recorded,
        in_training,
        under_autocast,
        with_another_linear,
        with_a_hook,
        with_a_wrapped_forward,
        with_an_observer,
    ],
    ids=lambda how: how.__name__,
)
def test_pytorch_computes_what_somebody_watches_or_changed(prunepath_checkpoint, calls, how):
    model = load(prunepath_checkpoint("llama"))
    with torch.no_grad():
        model(tokens(1, 3), tau=TAU)
        assert len(calls) == LAYERS
        how(model, lambda **options: model(tokens(1, 3), tau=TAU, **options))
    assert len(calls) == LAYERS


def test_recording_once_does_not_slow_the_model_for_good(prunepath_checkpoint, calls):
    model = load(prunepath_checkpoint("llama"))
    with torch.no_grad():
        model(tokens(1, 3), tau=TAU, output_router_logits=True)
        assert not calls
        model(tokens(1, 3), tau=TAU)
    assert len(calls) == LAYERS


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_weights_stay_the_models_own(prunepath_checkpoint, tmp_path, family):
    """After the kernel has had them laid out its way: one copy, the same values, saved and trained as before."""
    path = prunepath_checkpoint(family)
    model, before = load(path), load(path).state_dict()
    ids = tokens(1, 5)
    with torch.inference_mode():
        first = model(ids, tau=TAU).logits.clone()
        assert torch.equal(model(ids, tau=TAU).logits, first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(ids, tau=TAU).logits, first)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(ids, labels=ids, tau=TAU).loss.backward()
    optimizer.step()
    with torch.no_grad():
        changed = model(ids, tau=TAU).logits
        reference = load(path)
        reference.load_state_dict(model.state_dict())
        assert not torch.equal(changed, first)
        assert torch.equal(reference(ids, tau=TAU).logits, changed)
