"""Calibration: routers that rank, a measured curve, an unchanged function, all-or-nothing writes, refusals."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import ENGINE_FAMILY_NAMES, FAMILY_NAMES, block, build_dense, save_prunepath
from transformers import AutoTokenizer

from prunepath_vllm.checkpoint import load_prunepath_config, read_tensor_index, validate_checkpoint
from prunepath_vllm.conversion import rewrite
from prunepath_vllm.conversion.calibrate import calibrate, fit_router, load_model
from prunepath_vllm.conversion.costs import ANCHOR_SPARSITY, SHARPNESS, choose_sharpness, leaving_out_costs
from prunepath_vllm.conversion.text import read_sequences
from prunepath_vllm.entrypoints.cli import main
from prunepath_vllm.errors import CheckpointError, UsageError

pytestmark = pytest.mark.usefixtures("registered")

CONTEXT = 64
TOKENS = 40 * CONTEXT


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(32, 127, (2 * TOKENS,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(map(chr, letters)))
    return path


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, text):
    """``calibrated(family, gate)``: a tiny checkpoint of zero routers, calibrated; made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, gate: str = "none") -> Path:
        if (family, gate) not in made:
            path = tmp_path_factory.mktemp("calibrated") / f"{family}-{gate}"
            save_prunepath(family, path, gate=gate, router_scale=0.0, expert_size=16)
            calibrate(path, text, max_tokens=TOKENS, context=CONTEXT)
            made[family, gate] = path
        return made[family, gate]

    return get


def token_ids(path: Path, text: Path) -> torch.Tensor:
    return read_sequences(AutoTokenizer.from_pretrained(path), text, length=CONTEXT, max_tokens=TOKENS)


def ranking_hit_rate(path: Path, ids: torch.Tensor, random_routers: bool = False) -> float:
    """How many of the quarter of experts with the largest outputs are in the router's top quarter, computed plainly."""
    summary = validate_checkpoint(path)
    model = load_model(summary, "cpu")
    family, experts = summary.family, summary.prunepath.num_experts
    hits = []

    def watch(layer):
        down = model.get_submodule(family.output(layer))
        weight = down.weight if family.conv1d else down.weight.T
        seen = {}

        def router_hook(module, args, output):
            seen["logits"] = torch.randn(output[1].shape) if random_routers else output[1]

        def down_hook(module, args):
            neurons = args[0].unflatten(-1, (experts, -1))
            outputs = torch.einsum("bsed,edh->bseh", neurons, weight.unflatten(0, (experts, -1)))
            best = outputs.norm(dim=-1).topk(experts // 4).indices
            chosen = seen["logits"].topk(experts // 4).indices
            hits.append((best[..., :, None] == chosen[..., None, :]).any(-1).float().mean())

        model.get_submodule(family.router(layer)).register_forward_hook(router_hook)
        down.register_forward_pre_hook(down_hook)

    for layer in range(summary.num_layers):
        watch(layer)
    with torch.no_grad():
        model(ids, tau=1.0)
    return float(torch.stack(hits).mean())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_fitted_routers_rank_better_than_random(family, calibrated, text):
    torch.manual_seed(0)
    ids = token_ids(calibrated(family), text)[-5:]  # held out
    assert ranking_hit_rate(calibrated(family), ids) > 1.4 * ranking_hit_rate(calibrated(family), ids, True)


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tau_1_stays_the_dense_function(family, gate, calibrated, text):
    path = calibrated(family, gate)
    ids = token_ids(path, text)[:2]
    with torch.no_grad():
        expected = build_dense(family)(ids).logits
        for tau in (1.0, 1.05):
            got = load_model(validate_checkpoint(path), "cpu")(ids, tau=tau).logits
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_curve_is_monotone_wide_and_what_a_plain_count_gives(family, gate, calibrated, text):
    path = calibrated(family, gate)
    _, prunepath, _ = load_prunepath_config(path)
    taus, sparsities = zip(*prunepath.tau_curve, strict=True)
    assert list(taus) == sorted(taus)
    assert list(sparsities) == sorted(sparsities, reverse=True)
    assert 10 <= len(taus) <= 20
    assert sparsities[0] > 0.9
    assert sparsities[-1] == 0
    assert sum(0.2 < sparsity < 0.8 for sparsity in sparsities) >= 4

    model = load_model(validate_checkpoint(path), "cpu")
    held_out = token_ids(path, text)[-5:]
    for tau, sparsity in prunepath.tau_curve[2::5]:
        with torch.no_grad():
            logits = model(held_out, tau=tau, output_router_logits=True).router_logits
        active = total = 0
        for token in torch.cat([layer.flatten(0, 1) for layer in logits]).softmax(-1):
            mass, count = 0.0, 0
            for probability in sorted(token.tolist(), reverse=True):
                mass += probability
                if mass >= tau and count:
                    break
                count += 1
                if mass >= tau:
                    break
            active += len(token) if tau >= 1 else count
            total += len(token)
        assert sparsity == pytest.approx(1 - active / total, abs=2e-3)


def test_same_seed_same_routers_another_seed_others(tmp_path, text):
    routers = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        path = save_prunepath("llama", tmp_path / name, router_scale=0.0)
        calibrate(path, text, max_tokens=8 * CONTEXT, context=CONTEXT, seed=seed)
        routers.append(load_file(path / "model.safetensors")["model.layers.1.mlp.router.weight"])
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
def test_calibrating_again_changes_nothing(gate, tmp_path, text):
    path = save_prunepath("gpt2", tmp_path / "model", gate=gate, router_scale=0.0)
    calibrate(path, text, max_tokens=8 * CONTEXT, context=CONTEXT)
    once = load_file(path / "model.safetensors")
    calibrate(path, text, max_tokens=8 * CONTEXT, context=CONTEXT)
    for name, tensor in load_file(path / "model.safetensors").items():
        torch.testing.assert_close(tensor, once[name], rtol=1e-4, atol=1e-5)


def test_router_bias_goes_without_gate_and_is_constant_with_it(tmp_path, text):
    path = save_prunepath("qwen2", tmp_path / "none", router_bias=True)
    calibrate(path, text, max_tokens=8 * CONTEXT, context=CONTEXT)
    assert not validate_checkpoint(path).router_bias
    path = save_prunepath("qwen2", tmp_path / "sigmoid", gate="sigmoid", router_scale=0.0, dtype=torch.bfloat16)
    calibrate(path, text, max_tokens=8 * CONTEXT, context=CONTEXT)
    tensors = load_file(path / "model.safetensors")
    assert tensors["model.layers.0.mlp.router.bias"].unique().numel() == 1
    assert tensors["model.layers.0.mlp.router.weight"].dtype == torch.bfloat16


def test_dense_positions_are_written_and_counted(tmp_path, text):
    path = save_prunepath("llama", tmp_path / "model", router_scale=0.0)
    calibrate(path, text, max_tokens=8 * CONTEXT, context=CONTEXT, dense_positions=CONTEXT // 2)
    _, prunepath, _ = load_prunepath_config(path)
    assert prunepath.dense_positions == CONTEXT // 2
    assert 0.4 < prunepath.tau_curve[0][1] < 0.5


def test_sharded_checkpoint_keeps_its_shards_and_other_files(tmp_path, text):
    single, sharded = (save_prunepath("llama", tmp_path / name, router_scale=0.0) for name in ("single", "sharded"))
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    weight_map = {name: f"model-{'mlp' in name}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in (single, sharded):
        calibrate(path, text, max_tokens=8 * CONTEXT, context=CONTEXT)
    written = {name: info.file for name, info in read_tensor_index(sharded).items()}
    assert written == weight_map
    expected = load_file(single / "model.safetensors")
    for file in set(weight_map.values()):
        for name, tensor in load_file(sharded / file).items():
            assert torch.equal(tensor, expected[name])
    assert (sharded / "tokenizer.json").read_bytes() == (single / "tokenizer.json").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["sharded", "single"]


@pytest.mark.parametrize("failing", ["save_file", "write_model_card", "validate_checkpoint", "os.rename"])
def test_a_failure_leaves_the_old_checkpoint_whole(failing, tmp_path, text, monkeypatch):
    path = save_prunepath("llama", tmp_path / "model", router_scale=0.0)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    target = rewrite.os if failing == "os.rename" else rewrite
    monkeypatch.setattr(target, failing.removeprefix("os."), fail)
    with pytest.raises(OSError, match="disk full"):
        calibrate(path, text, max_tokens=4 * CONTEXT, context=CONTEXT)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert os.listdir(tmp_path) == ["model"]


def test_costs_are_the_metric_of_each_experts_output():
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(7, 3, 4, generator=generator)
    down = torch.randn(12, 5, generator=generator)
    root = torch.randn(5, 5, generator=generator)
    expected = torch.empty(7, 3)
    for token in range(7):
        for expert in range(3):
            output = experts[token, expert] @ down[expert * 4 : expert * 4 + 4]
            expected[token, expert] = output @ root @ root.T @ output
    torch.testing.assert_close(leaving_out_costs(experts, down, root @ root.T), expected, rtol=1e-4, atol=1e-4)


def test_router_recovers_log_costs_that_are_linear():
    generator = torch.Generator().manual_seed(0)
    inputs, truth = torch.randn(500, 16, generator=generator), torch.randn(8, 16, generator=generator)
    fitted = fit_router(inputs, F.linear(inputs, truth).exp())
    difference = F.linear(inputs, fitted).softmax(-1) - F.linear(inputs, truth).softmax(-1)
    assert difference.abs().mean() < 0.005


def test_sharpness_goes_where_leaving_out_is_cheap():
    candidates = len(SHARPNESS)
    sparsities = torch.linspace(0.3, 0.9, candidates).expand(4, -1)
    losses = torch.tensor([10.0, 1.0, 1.0, 1.0])[:, None] * sparsities.square()
    chosen = choose_sharpness(sparsities, losses)
    assert chosen[0] < min(chosen[1:])
    mean = sum(float(sparsities[0, index]) for index in chosen) / 4
    assert mean == pytest.approx(ANCHOR_SPARSITY, abs=0.08)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, r"absent\.txt: expected a readable UTF-8 text file \(No such file"),
        (b"", {}, r"0 tokens; expected at least 128"),
        (b"too short", {}, r"9 tokens; expected at least 128"),
        (b"\xff\xfe\x00", {}, r"expected a readable UTF-8 text file"),
        (b"x" * 9999, {"context": 1}, r"context: 1; expected 2 to 512"),
        (b"x" * 9999, {"context": 513}, r"context: 513; expected 2 to 512"),
        (b"x" * 9999, {"max_tokens": -1}, r"max tokens: -1; expected at least 128"),
        (b"x" * 9999, {"dense_positions": -1}, r"dense positions: -1; expected 0 or more"),
        (b"x" * 9999, {"dense_positions": CONTEXT}, r"context: 64; expected more than the 64 dense positions"),
    ],
    ids=["missing", "empty", "short", "not-utf8", "context-1", "context-long", "max-tokens", "negative", "all-dense"],
)
def test_refusals(content, options, message, tmp_path):
    path = save_prunepath("llama", tmp_path / "model", router_scale=0.0)
    file = tmp_path / "absent.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        calibrate(path, file, **{"context": CONTEXT, **options})


def test_trained_gates_and_threshold_selection_are_refused(tmp_path, text):
    path = save_prunepath("llama", tmp_path / "gates", gate="sigmoid")
    with pytest.raises(UsageError, match="its sigmoid gates are trained"):
        calibrate(path, text, max_tokens=4 * CONTEXT, context=CONTEXT)
    path = save_prunepath("llama", tmp_path / "threshold", selection="threshold", threshold=0.5)
    with pytest.raises(UsageError, match="selection 'threshold' has no tau"):
        calibrate(path, text)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1e30, "layer 2: no router can be fitted to its inputs"),
        (1e38, "the model's logits on the text are NaN or infinite"),
    ],
)
def test_activations_that_are_not_finite_are_refused(tmp_path, text, scale, message):
    path = save_prunepath("llama", tmp_path / "model", router_scale=0.0)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= scale
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        calibrate(path, text, max_tokens=4 * CONTEXT, context=CONTEXT)
    assert block(path)["tau_curve"] is None


def test_a_directory_that_cannot_be_replaced_is_refused_before_any_work(tmp_path, text, monkeypatch):
    checkpoint = save_prunepath("llama", tmp_path / "model")

    def refuse(path, mode=0o777):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("prunepath_vllm.conversion.calibrate.load_model", None)
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UsageError, match=r"model: cannot be written \(Read-only file system"):
        calibrate(checkpoint, text)


def test_command(tmp_path, text, capsys):
    path = save_prunepath("llama", tmp_path / "model", router_scale=0.0)
    options = ["--max-tokens", str(8 * CONTEXT), "--context", str(CONTEXT), "--dense-positions", "1"]
    assert main(["calibrate", str(path), "--text", str(text), *options]) == 0
    _, prunepath, _ = load_prunepath_config(path)
    rows = [tuple(map(float, line.split())) for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [(tau, round(sparsity, 3)) for tau, sparsity in prunepath.tau_curve]
    assert prunepath.dense_positions == 1
    assert str(prunepath.num_experts) in (path / "README.md").read_text()
    assert main(["calibrate", str(path), "--text", str(tmp_path / "no.txt")]) == 2


@pytest.mark.parametrize("family", [*ENGINE_FAMILY_NAMES, "gemma2"])
def test_eval_perplexity_is_the_dense_models_at_tau_1(family, calibrated, text, tmp_path, capsys):
    path, dense, output = calibrated(family), tmp_path / "dense", tmp_path / "out.json"
    model = build_dense(family)
    model.save_pretrained(dense)
    options = ["--max-tokens", str(4 * CONTEXT), "--context", str(CONTEXT), "--dense", str(dense)]
    command = ["eval", str(path), "--task", "wikitext", "--data", str(text), "--tau", "1.0,0.3"]
    assert main([*command, *options, "--output", str(output)]) == 0

    ids = token_ids(path, text)[:4]
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
        expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()
        sparse = load_model(validate_checkpoint(path), "cpu")(ids, tau=0.3, output_router_logits=True)
    result = json.loads(output.read_text())
    dense_point, full, low = result["points"]
    assert (result["sequences"], result["context"]) == (4, CONTEXT)
    assert dense_point == {"tau": None, "perplexity": pytest.approx(expected, rel=1e-4), "ffn_sparsity": 0}
    assert full == {"tau": 1.0, "perplexity": pytest.approx(expected, rel=1e-4), "ffn_sparsity": 0}
    assert low["ffn_sparsity"] == pytest.approx(sparse.ffn_sparsity.mean().item(), abs=1e-4)
    assert low["perplexity"] != full["perplexity"]
    assert f"{low['perplexity']:.2f}" in capsys.readouterr().out


def test_eval_reads_a_directory_and_refuses_what_has_no_perplexity(calibrated, text, tmp_path, capsys):
    command = ["--task", "wikitext", "--max-tokens", str(CONTEXT), "--context", str(CONTEXT), "--tau", "1"]
    (tmp_path / "wiki.valid.raw").write_bytes(text.read_bytes())
    assert main(["eval", str(calibrated("llama")), "--data", str(tmp_path), *command]) == 0
    capsys.readouterr()
    for path, data, message in (
        (calibrated("roberta"), text, "has no perplexity"),
        (calibrated("llama"), text.parent, "expected one of wiki.valid.raw"),
        (calibrated("llama"), tmp_path / "no", "No such file"),
    ):
        assert main(["eval", str(path), "--data", str(data), *command]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error
    assert main(["eval", str(calibrated("llama")), "--data", str(text), "--task", "wikitext", "--tau", "2"]) == 2
