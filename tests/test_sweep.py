"""`prunepath sweep`: the tau for a named loss, the Pareto front, the engine's speed, the curve and card it writes."""

import json
import shutil
from pathlib import Path

import pytest
import warm
from runners import TRACED
from safetensors.torch import load_file, save_file

from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.entrypoints.cli import main
from prunepath_vllm.evaluation import sweep
from prunepath_vllm.evaluation.plots import pareto_front
from prunepath_vllm.evaluation.sweep import losses, recommend

TAUS = (1.0, 0.5)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog and looks around for more. " * 20)
    return path


def points(*rows: tuple[float | None, float, float]) -> list[dict]:
    return [dict(tau=tau, ffn_sparsity=sparsity, perplexity=value) for tau, sparsity, value in rows]


def test_losses_are_relative_to_dense_or_to_tau_1():
    assert losses(points((1.0, 0, 20), (0.5, 0.4, 21)), "perplexity") == pytest.approx([0, 0.05])
    assert losses(points((None, 0, 25), (1.0, 0, 20)), "perplexity") == pytest.approx([0, -0.2])
    accuracies = [dict(tau=0.5, accuracy=0.6), dict(tau=1.0, accuracy=0.8)]
    assert losses(accuracies, "accuracy") == pytest.approx([0.25, 0])


@pytest.mark.parametrize(("limit", "tau"), [(0.0, 1.0), (0.02, 0.9), (0.06, 0.7), (0.3, 0.7), (0.5, 0.5)])
def test_the_sparsest_point_is_chosen_before_the_first_that_loses_too_much(limit, tau):
    rows = [(1.0, 0, 0.0), (0.9, 0.1, 0.02), (0.7, 0.3, 0.05), (0.6, 0.4, 0.4), (0.5, 0.5, 0.2)]
    shuffled = [dict(tau=t, ffn_sparsity=s, loss=loss) for t, s, loss in reversed(rows)]
    assert recommend(shuffled, limit)["tau"] == tau


def test_the_pareto_front():
    assert pareto_front([(0, 1), (1, 0), (0.5, 0.5), (0.5, 0.4), (0.2, 0.4), (1, 0)]) == [0, 1, 2]


def run(checkpoint: Path, text: Path, output: Path, *more: object) -> int:
    command = ["sweep", checkpoint, "--text", text, "--max-loss", "5%", "--tau", "0.5", "--output", output]
    return main([*map(str, command), "--max-tokens", "512", "--context", "64", *map(str, more)])


def test_a_sweep_with_speed_and_what_it_writes(prunepath_checkpoint, text, tmp_path, capsys, monkeypatch):
    for name, value in TRACED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sweep, "subprocess", warm)
    checkpoint = shutil.copytree(prunepath_checkpoint("llama"), tmp_path / "checkpoint")
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    output, plot = tmp_path / "out.json", tmp_path / "out.png"
    assert run(checkpoint, text, output, "--plot", plot) == 0
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before  # not without --write
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = json.loads(output.read_text())
    assert [point["tau"] for point in result["points"]] == list(TAUS)
    for point in result["points"]:
        assert point["tokens_per_second"] == pytest.approx(1e3 / point["decode_step_ms"])
    shown = capsys.readouterr().out.splitlines()
    assert f"tau {result['recommended']['tau']:g}" in shown[-1]

    # Again: nothing is measured anew, neither quality nor speed, so that the times are the same.
    journal = output.with_suffix(".jsonl").read_text()
    assert run(checkpoint, text, output, "--write") == 0
    assert output.with_suffix(".jsonl").read_text() == journal
    assert json.loads(output.read_text()) == result
    written = validate_checkpoint(checkpoint).prunepath
    assert written.default_tau == 1.0
    sparsities = {point["tau"]: point["ffn_sparsity"] for point in result["points"]}
    assert dict(written.tau_curve or []) == {tau: pytest.approx(sparsities[tau], abs=1e-4) for tau in TAUS}
    card = (checkpoint / "README.md").read_text()
    assert "recommends tau" in card
    assert f"| {result['points'][1]['perplexity']:.4g} |" in card
    # A journal of the same weights goes on after the curve has changed.
    assert run(checkpoint, text, output, "--no-speed") == 0
    assert output.with_suffix(".jsonl").read_text() == journal


def widened(checkpoint: Path, destination: Path) -> Path:
    """A quantised Llama's function, unquantised."""
    shutil.copytree(checkpoint, destination)
    tensors = load_file(checkpoint / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale")]:
        weight, scale = name.removesuffix("_scale"), tensors.pop(name)
        tensors[weight] = tensors[weight].float() * (scale if "down_proj" in name else scale[:, None])
    save_file(tensors, destination / "model.safetensors", {"format": "pt"})
    config = json.loads((destination / "config.json").read_text())
    del config["prunepath_config"]["expert_dtype"]
    (destination / "config.json").write_text(json.dumps(config))
    return destination


@pytest.mark.parametrize(("dtype", "more"), [("int8", []), ("float8_e4m3fn", ["--no-speed"])])
def test_a_quantised_checkpoint_is_swept(quantised, text, tmp_path, monkeypatch, dtype, more):
    """Its perplexities are those of its weights, widened; what is written leaves weights and scales alone."""
    for name, value in (TRACED | {"HF_HUB_OFFLINE": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sweep, "subprocess", warm)
    checkpoint = shutil.copytree(quantised("llama", dtype), tmp_path / "checkpoint")
    weights, output, other = (checkpoint / "model.safetensors").read_bytes(), tmp_path / "out.json", tmp_path / "o.json"
    assert run(checkpoint, text, output, "--write", *more) == 0
    assert run(widened(checkpoint, tmp_path / "widened"), text, other, "--no-speed") == 0
    points, expected = (json.loads(file.read_text())["points"] for file in (output, other))
    for point, wide in zip(points, expected, strict=True):
        assert point["perplexity"] == pytest.approx(wide["perplexity"], rel=1e-4)
        assert point["ffn_sparsity"] == pytest.approx(wide["ffn_sparsity"], abs=1e-3)
        assert ("decode_step_ms" in point) == (not more)
    assert (checkpoint / "model.safetensors").read_bytes() == weights
    written = validate_checkpoint(checkpoint, check_values=True).prunepath
    assert (written.expert_dtype, len(written.tau_curve or [])) == (dtype, len(TAUS))
    assert "recommends tau" in (checkpoint / "README.md").read_text()


def test_a_classifier_is_swept_by_its_accuracy(prunepath_checkpoint, tmp_path):
    checkpoint, data = prunepath_checkpoint("roberta", num_labels=2), tmp_path / "valid.jsonl"
    data.write_text("".join(json.dumps(dict(text=f"Text {i}.", label=i % 2)) + "\n" for i in range(8)))
    output, plot = tmp_path / "out.json", tmp_path / "out.png"
    command = ["sweep", checkpoint, "--task", "sst2", "--data", data, "--max-loss", "0.02", "--tau", "0.5"]
    assert main([*map(str, command), "--output", str(output), "--plot", str(plot)]) == 0
    result = json.loads(output.read_text())
    dense, sparse = result["points"]
    assert sparse["loss"] == pytest.approx((dense["accuracy"] - sparse["accuracy"]) / dense["accuracy"])
    assert "tokens_per_second" not in sparse


def test_what_is_wrong_is_named(prunepath_checkpoint, dense_checkpoint, text, tmp_path, capsys):
    threshold = prunepath_checkpoint("llama", selection="threshold", threshold=0.5)
    for checkpoint, options, named in (
        (dense_checkpoint("llama"), ["--max-loss", "2%"], "expected a PrunePath checkpoint"),
        (threshold, ["--max-loss", "2%"], "cumulative_mass"),
        (prunepath_checkpoint("llama"), ["--max-loss", "200%"], "--max-loss 200%"),
        (prunepath_checkpoint("llama"), ["--max-loss", "2%", "--tau", "a"], "numbers separated by commas"),
        (prunepath_checkpoint("roberta"), ["--max-loss", "2%"], "has no perplexity"),
    ):
        assert main(["sweep", str(checkpoint), "--text", str(text), "--no-speed", *options]) == 2
        assert named in capsys.readouterr().err.splitlines()[-1]
