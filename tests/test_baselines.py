"""Wanda, static expert pruning and LTE against independent computations, on every family."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from naive import load_naive, naive_logits
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_NAMES, HIDDEN, INTERMEDIATE, LAYERS, build_dense
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prunepath_vllm.checkpoint import WEIGHTS_FILE, validate_checkpoint
from prunepath_vllm.conversion.calibrate import load_model
from prunepath_vllm.entrypoints.cli import main
from prunepath_vllm.errors import UsageError
from prunepath_vllm.families import FAMILIES
from prunepath_vllm.modeling import register_auto_classes
from prunepath_vllm.modeling.routing import Router
from prunepath_vllm.training.baselines.common import calibration_sequences
from prunepath_vllm.training.baselines.static import mean_shares, prune_experts
from prunepath_vllm.training.baselines.wanda import prune_model, prune_rows, prune_with_wanda
from prunepath_vllm.training.losses import efficiency_loss, separation_loss


def family_row(name):
    return next(family for family in FAMILIES if family.name == name)


def load_dense(path, family):
    auto = AutoModelForSequenceClassification if family == "roberta" else AutoModelForCausalLM
    (row,) = (row for row in FAMILIES if row.name == family)
    return auto.from_pretrained(path, **row.dense_options).eval()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog; 0123456789 times or more. " * 40)
    return path


def tokens(sequences=3, length=12):
    return torch.randint(4, 300, (sequences, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["wanda", "static"])
def test_models_that_cannot_be_pruned_are_named(method, dense_checkpoint, prunepath_checkpoint, text, tmp_path, capsys):
    good, other = dense_checkpoint("llama"), prunepath_checkpoint("llama")
    good, other = (good, other) if method == "wanda" else (other, good)

    def copied(name):
        shutil.copytree(good, tmp_path / name)
        return tmp_path / name

    tensors = load_file(copied("nan") / WEIGHTS_FILE)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan" / WEIGHTS_FILE, metadata={"format": "pt"})
    weights = copied("truncated") / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:5000])
    torch.save(load_file(copied("pickle") / WEIGHTS_FILE), tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "pickle" / WEIGHTS_FILE).unlink()
    for file in copied("words").glob("tokenizer*"):
        file.unlink()
    before = sorted(tmp_path.iterdir())
    for source, named in (
        (tmp_path / "nan", "up_proj.weight: 1 of 16384 values are NaN or infinite"),
        (tmp_path / "truncated", "truncated"),
        (
            tmp_path / "pickle",
            f"{tmp_path}/pickle: no weights; expected {WEIGHTS_FILE} or model.safetensors.index.json",
        ),
        (tmp_path / "pickle", "found only pytorch_model.bin, a pickle, which is never loaded"),
        (tmp_path / "words", f"{tmp_path}/words: expected a tokenizer"),
        (other, f"{other}"),
    ):
        line = ["prune", source, tmp_path / "out", "--method", method, "--sparsity", "0.5", "--text", text]
        assert main([*map(str, line)]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("prunepath prune: ")
        assert named in said
        assert "--debug" not in said
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("method", ["wanda", "static"])
def test_a_sparsity_that_removes_nothing_is_refused_with_the_smallest_that_does(
    method, dense_checkpoint, prunepath_checkpoint, text, tmp_path, capsys
):
    source, least, of = (
        (dense_checkpoint("llama"), "0.00391", f"the {INTERMEDIATE} weights in the longest rows of ")
        if method == "wanda"
        else (prunepath_checkpoint("llama"), "0.0626", "8 experts in a layer")
    )

    def prune(sparsity, name):
        line = ["prune", source, tmp_path / name, "--method", method, "--sparsity", sparsity, "--text", text]
        return main([*map(str, line), "--sequences", "1"])

    for nothing in ("0.0001", str(float(least) * 0.99)):
        assert prune(nothing, "out") == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"sparsity: {float(nothing):g} rounds to none of {of}" in said
        assert said.endswith(f"; expected {least} or more")
        assert not list(tmp_path.iterdir())
    assert prune(least, "some") == 0
    assert json.loads((tmp_path / "some" / "pruning.json").read_text())["sparsity"] > 0


# --- Wanda -----------------------------------------------------------------------------------------------------------


def test_wanda_zeroes_the_lowest_products_of_each_row():
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(7, 20, generator=generator), torch.rand(20, generator=generator)
    pruned = weight.clone()
    prune_rows(pruned, norms, 0.37)
    for row, kept in zip(weight.tolist(), pruned.tolist(), strict=True):
        ranked = sorted(range(20), key=lambda column: abs(row[column]) * norms[column].item())
        assert kept == [0.0 if column in ranked[:7] else row[column] for column in range(20)]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_wanda_prunes_every_feed_forward_linear_by_its_own_inputs(name):
    family, model = family_row(name), build_dense(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    linears = prune_model(model, family, LAYERS, tokens(), 0.5)
    names = [linear for layer in range(LAYERS) for linear in (*family.dense_inputs(layer), family.output(layer))]
    assert len(linears) == len(names)
    for key, tensor in model.state_dict().items():
        if key.removesuffix(".weight") not in names:
            assert torch.equal(tensor, before[key]), key
            continue
        rows = tensor.T if family.conv1d else tensor
        dense = before[key].T if family.conv1d else before[key]
        assert ((rows == 0).sum(dim=1) == rows.shape[1] // 2).all()
        assert torch.equal(rows[rows != 0], dense[rows != 0])

    # The last layer's inputs, seen by the pruned model itself, rank as its second linear was pruned.
    seen = []
    last = model.get_submodule(names[-1])
    last.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        model(tokens())
    dense = before[f"{names[-1]}.weight"]
    scores = (dense.T if family.conv1d else dense).abs() * seen[0].square().sum(0).sqrt()
    rows = last.weight.T if family.conv1d else last.weight
    for row, kept in zip(scores, rows != 0, strict=True):
        assert row[kept].min() >= row[~kept].max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_wanda_writes_a_dense_checkpoint(dense_checkpoint, tmp_path, text, name):
    source = dense_checkpoint(name)
    command = ["prune", str(source), str(tmp_path / "pruned"), "--method", "wanda", "--sparsity", "0.25"]
    assert main([*command, "--text", str(text), "--sequences", "2"]) == 0
    model = load_dense(tmp_path / "pruned", name)
    family = family_row(name)
    for layer in range(LAYERS):
        weight = model.get_submodule(family.output(layer)).weight
        assert (weight == 0).sum() == 0.25 * weight.numel()
    record = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert record["method"] == "wanda"
    assert record["sparsity"] == pytest.approx(0.25)
    assert (tmp_path / "pruned" / "tokenizer.json").exists()


# --- static experts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_shares_are_those_of_the_experts_outputs(prunepath_checkpoint, name):
    summary = validate_checkpoint(prunepath_checkpoint(name))
    family, size, experts = summary.family, summary.prunepath.expert_size, summary.prunepath.num_experts
    model = load_model(summary, "cpu")
    found = mean_shares(model, summary, tokens())

    layer = 1
    down, seen = model.get_submodule(family.output(layer)), []
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        model(tokens(), tau=1.0)
    weight = down.weight if family.conv1d else down.weight.T  # [F, H]
    total = torch.zeros(experts)
    for neurons in seen[0]:
        columns = (neurons[:, None] * weight).norm(dim=1).square()
        shares = torch.stack([columns[e * size : (e + 1) * size].sum() for e in range(experts)])
        total += shares / shares.sum()
    torch.testing.assert_close(found[layer], total / len(seen[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_narrower_model_is_the_model_without_its_weakest_experts(prunepath_checkpoint, tmp_path, text, name):
    source = prunepath_checkpoint(name)
    command = ["prune", str(source), str(tmp_path / "pruned"), "--method", "static", "--sparsity", "0.4"]
    assert main([*command, "--text", str(text), "--sequences", "2"]) == 0
    model = load_dense(tmp_path / "pruned", name)
    summary = validate_checkpoint(source)
    family, size = summary.family, summary.prunepath.expert_size
    narrow = model.get_submodule(family.output(0)).weight
    assert narrow.numel() == HIDDEN * INTERMEDIATE * 5 // 8  # 5 of 8 experts
    record = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert record["sparsity"] == 0.375

    sequences = calibration_sequences(source, text, 2)
    shares = mean_shares(load_model(summary, "cpu"), summary, sequences)
    naive = load_naive(source)
    ffns = [module for module in naive.modules() if type(module).__name__ == "NaiveFFN"]
    for ffn, row in zip(ffns, shares, strict=True):
        ffn.down["weight"] = ffn.down["weight"].clone()
        for expert in row.argsort()[:3]:
            ffn.down["weight"][:, expert * size : (expert + 1) * size] = 0
    ids = tokens(1)[0].tolist()
    with torch.inference_mode():
        found = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, naive_logits(naive, ids, 1.0), rtol=1e-4, atol=1e-4)


def test_what_makes_no_sense_is_refused(dense_checkpoint, prunepath_checkpoint, tmp_path, text):
    dense, converted = dense_checkpoint("llama"), prunepath_checkpoint("llama")
    with pytest.raises(UsageError, match=r"sparsity: 1\.0; expected a number in \(0, 1\)"):
        prune_with_wanda(dense, tmp_path / "a", sparsity=1.0, text=text)
    with pytest.raises(UsageError, match=r"sparsity: 0\.95 leaves no expert of 8"):
        prune_experts(converted, tmp_path / "a", sparsity=0.95, text=text)
    with pytest.raises(UsageError, match="already there"):
        prune_experts(converted, tmp_path, sparsity=0.5, text=text)
    with pytest.raises(UsageError, match="gate 'sigmoid'; expected 'none'"):
        prune_experts(prunepath_checkpoint("llama", gate="sigmoid"), tmp_path / "a", sparsity=0.5, text=text)
    assert not (tmp_path / "a").exists()


# --- LTE -------------------------------------------------------------------------------------------------------------


def test_lte_losses_leave_padding_out():
    logits = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)) * 2
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    efficiency, separation, count = 0.0, 0.0, 0
    for row, real in zip(logits.flatten(0, 1).tolist(), mask.flatten().tolist(), strict=True):
        for g in row if real else ():
            gate = 1 / (1 + torch.tensor(-g).exp().item())
            efficiency, count = efficiency + gate**2, count + 1
            separation += 1 / max((gate - 0.4) ** 2, 1e-3)
    assert efficiency_loss(logits, mask).item() == pytest.approx(efficiency / count, rel=1e-5)
    assert separation_loss(logits, 0.4, mask).item() == pytest.approx(separation / count, rel=1e-4)


@pytest.fixture
def lte(prunepath_checkpoint):
    """A model with LTE's selection, and its routers."""
    register_auto_classes()
    path = prunepath_checkpoint("llama", selection="threshold", threshold=0.5, router_scale=0.05)
    model = AutoModelForCausalLM.from_pretrained(path)
    return model, [module for module in model.modules() if isinstance(module, Router)]


def test_lte_stages_are_a_gate_and_a_tau(lte):
    """Soft: every expert weighted by G. Hard: the experts above the threshold, unweighted, routers without gradient."""
    model, routers = lte
    mlp, x = model.model.layers[1].mlp, torch.randn(1, 4, HIDDEN, generator=torch.Generator().manual_seed(0))
    gates = torch.sigmoid(x @ mlp.router.weight.T)
    neurons = F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
    parts = neurons.unflatten(-1, (8, 32)).unsqueeze(-2) @ mlp.down_proj.weight.T.unflatten(0, (8, 32))
    parts = parts.squeeze(-2)  # each expert's output [B, S, E, H]
    assert 0.1 < (gates > 0.5).float().mean() < 0.9

    for router in routers:
        router.gate = "sigmoid"
    soft = mlp(x, torch.full((1, 4), 1.05))
    torch.testing.assert_close(soft, (parts * gates.unsqueeze(-1)).sum(2), rtol=1e-4, atol=1e-4)
    soft.square().sum().backward()
    assert (mlp.router.weight.grad.abs().amax(1) > 0).all()

    for router in routers:
        router.gate, router.weight.grad = "none", None
    hard = mlp(x, torch.full((1, 4), 0.5))
    torch.testing.assert_close(hard, (parts * (gates > 0.5).unsqueeze(-1)).sum(2), rtol=1e-4, atol=1e-4)
    hard.square().sum().backward()
    assert mlp.router.weight.grad is None
    assert mlp.up_proj.weight.grad is not None


def test_a_small_lte_run_separates_gates_learns_and_ends_sparse(lte):
    model, routers = lte
    ids = tokens(8, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step(tau, eta, lam):
        output = model(input_ids=ids, labels=ids, tau=tau, output_router_logits=True)
        terms = [(efficiency_loss(g), separation_loss(g, 0.5)) for g in output.router_logits]
        loss = output.loss + sum(eta * eff + lam * sep for eff, sep in terms) / len(terms)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        distance = torch.stack([(g.sigmoid() - 0.5).abs().mean() for g in output.router_logits]).mean()
        return output.loss.item(), distance.item(), output.ffn_sparsity.mean().item()

    for router in routers:
        router.gate = "sigmoid"
    soft = [step(1.05, eta=1.0, lam=0.001) for _ in range(30)]
    assert soft[-1][0] < soft[0][0] - 0.5
    assert soft[-1][1] > soft[0][1]
    for router in routers:
        router.gate, router.weight.requires_grad = "none", False
    frozen = [router.weight.clone() for router in routers]
    hard = [step(0.5, eta=0.0, lam=0.0) for _ in range(30)]
    assert hard[-1][0] < hard[0][0]
    assert hard[-1][2] > 0.1
    assert all(torch.equal(router.weight, weight) for router, weight in zip(routers, frozen, strict=True))
