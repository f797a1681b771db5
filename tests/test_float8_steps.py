"""The emulation of a GPU's steps with float8 experts, against dequantised weights; the whole on a tiny checkpoint."""

import json

import pytest
import torch
from tiny_models import HIDDEN, tokens
from transformers import AutoModelForCausalLM

from prunepath_vllm.benchmarks import float8_steps
from prunepath_vllm.benchmarks.float8_steps import REFERENCE, STEPS, computed_as, divergences
from prunepath_vllm.errors import UsageError
from prunepath_vllm.modeling.inference import RoutedFeedForward
from prunepath_vllm.modeling.quantised import QuantisedLinear

pytestmark = pytest.mark.usefixtures("registered")

TAUS = [1.0, 0.5]


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(model, tau, step=None):
    ids = tokens(2, 12)
    if step is None:
        return model(ids, tau=tau, output_router_logits=True).logits.flatten(0, 1)  # which the CPU kernel stays out of
    with computed_as(model, *step):
        return model(ids, tau=tau).logits.flatten(0, 1)


def dequantise(model, plain):
    """`plain`, the same model before it was quantised, with the weights that `model` stores."""
    for name, linear in model.named_modules():
        if isinstance(linear, QuantisedLinear):
            plain.get_submodule(name).weight.data = linear.dequantised().clone()
    return plain


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # weights in rows and in columns, with biases
def test_w8a16_is_the_dequantised_model(family, tau, quantised, prunepath_checkpoint):
    model = load(quantised(family, "float8_e4m3fn"))
    plain = dequantise(model, load(prunepath_checkpoint(family)))
    assert torch.equal(logits(model, tau), logits(plain, tau))
    torch.testing.assert_close(logits(model, tau, STEPS[REFERENCE]), logits(plain, tau), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tau", TAUS)
def test_w8a8_differs_by_what_float8_rounds(tau, quantised):
    model = load(quantised("llama", "float8_e4m3fn"))
    wanted = logits(model, tau, STEPS[REFERENCE])
    first, both = (divergences(wanted, logits(model, tau, STEPS[name]))[0].mean() for name in [*STEPS][1:])
    assert 1e-7 < first < both < 0.01
    assert torch.equal(wanted, logits(model, tau, STEPS[REFERENCE]))
    assert not any("forward" in vars(module) for module in model.modules())  # as it was


@pytest.mark.parametrize("step", [name for name in STEPS if name != REFERENCE])
def test_only_what_float8_cannot_hold_is_changed(step, quantised):
    module = next(m for m in load(quantised("llama", "float8_e4m3fn")).modules() if isinstance(m, RoutedFeedForward))
    x = torch.randint(-8, 9, (1, 5, HIDDEN), generator=torch.Generator().manual_seed(0)).float()
    x[..., 0] = 448 / 32  # so that the scale is a power of two, and every quotient a float8
    taus = torch.full((1, 5), 0.6)
    first, second = STEPS[step]

    def outputs(x):
        found = []
        for inputs in ((False, False), (first, second)):
            with computed_as(module, *inputs):
                found.append(module(x, taus))
        wanted, changed = found
        return ((wanted - changed).norm() / wanted.norm()).item()

    held, not_held = outputs(x), outputs(x * (1 + torch.arange(HIDDEN) / 100))
    assert 0.01 < not_held < 0.1
    assert 0.01 < held < 0.1 if second else held < 1e-6  # neurons are what they are


def test_divergences_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 9, generator=generator) for _ in range(2))
    b[0] = a[0] + 3
    kl, same = divergences(a, b)
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x.double()) for x in (a, b)))
    torch.testing.assert_close(kl, expected)
    assert kl[0].abs() < 1e-6
    assert same.tolist() == [int(x) == int(y) for x, y in zip(a.argmax(-1), b.argmax(-1), strict=True)]


@pytest.mark.parametrize(
    ("dtype", "yardstick"), [("float32", float8_steps.ROUNDED), ("bfloat16", float8_steps.ROUNDED_ELSEWHERE)]
)
def test_a_checkpoint_is_measured(dtype, yardstick, quantised, prunepath_checkpoint, text, tmp_path, capsys):
    output = tmp_path / "steps.json"
    argv = [quantised("llama", "float8_e4m3fn"), "--unquantised", prunepath_checkpoint("llama"), "--text", text]
    argv += ["--tau", "1.0,0.5", "--length", 32, "--max-tokens", 64, "--dtype", dtype, "--output", output]
    float8_steps.run([str(part) for part in argv])
    result = json.loads(output.read_text())
    assert (result["dtype"], result["sequences"], result["length"]) == (dtype, 2, 32)
    assert str(tmp_path) not in output.read_text()
    for row, tau in zip(result["rows"], TAUS, strict=True):
        assert row["tau"] == tau
        assert set(row["perplexity"]) == {*row["from_w8a16"], REFERENCE} == {*STEPS, yardstick, "not quantised"}
        for found in row["from_w8a16"].values():
            assert 0 < found["kl_mean"] < found["kl_p99"] < 1  # below tau 1 a token may get another expert
            assert 0.5 < found["same_argmax"] <= 1
    assert "W8A8 both linears" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stored", "unquantised", "message"),
    [
        (None, None, "experts in no quantised dtype; expected float8_e4m3fn"),
        ("int8", None, "experts in int8; expected float8_e4m3fn"),
        ("float8_e4m3fn", "float8_e4m3fn", "expected a checkpoint whose experts are not quantised"),
    ],
)
def test_other_checkpoints_are_refused(stored, unquantised, message, quantised, prunepath_checkpoint, text):
    def path(dtype):
        return str(quantised("llama", dtype) if dtype else prunepath_checkpoint("llama"))

    argv = [path(stored), "--text", str(text)]
    if unquantised:
        argv += ["--unquantised", path(unquantised)]
    with pytest.raises(UsageError, match=message):
        float8_steps.run(argv)
