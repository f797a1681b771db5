"""scripts/demo.py on a tiny model: an adapter is merged, a new one again; without one the model is calibrated."""

import importlib.util
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_dense

from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.errors import CheckpointError
from prunepath_vllm.training.adapter import neuron_order, save_adapter

ROOT = Path(__file__).parents[1]
LINEAR = "model.layers.0.mlp.down_proj"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script, with its paths in a temporary folder."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))
    for name, path in dict(ROOT=tmp_path, CACHE=tmp_path, TEXT=text).items():
        monkeypatch.setattr(module, name, path)
    return module


@pytest.fixture
def demo(script, dense_checkpoint):
    """A demo of a tiny model."""
    made = script.Demo("tiny", expert_size=8, dense_positions=1)
    shutil.copytree(dense_checkpoint("llama"), made.dense)
    made.adapter.parent.mkdir(parents=True)
    return made


def write_adapter(demo, scratch: Path, value: float, *, dense: Path | None = None) -> None:
    """A rank-1 update of one linear: every weight plus `value`."""
    converted = convert(dense or demo.dense, scratch, expert_size=8)
    outputs, inputs = load_file(converted / "model.safetensors")[f"{LINEAR}.weight"].shape
    update = {f"{LINEAR}.up": torch.full((outputs, 1), value), f"{LINEAR}.down": torch.ones(1, inputs)}
    orders = neuron_order(dense or demo.dense, converted)
    save_adapter(dense or demo.dense, converted, orders, update, destination=demo.adapter)


def down(checkpoint: Path) -> torch.Tensor:
    """The updated linear's weights, sorted: the order of neurons aside."""
    return load_file(checkpoint / "model.safetensors")[f"{LINEAR}.weight"].flatten().sort().values


def test_the_checkpoint_follows_the_adapter(script, demo, tmp_path):
    write_adapter(demo, tmp_path / "one", 0.5)
    (demo.adapter.parent / "recipe.yaml").write_text("seed: 1\n")
    script.make_checkpoint(demo)
    validate_checkpoint(demo.checkpoint, check_values=True)
    assert (demo.checkpoint / "recipe.yaml").read_text() == "seed: 1\n"
    dense = down(demo.dense)
    torch.testing.assert_close(down(demo.checkpoint), dense + 0.5)

    (demo.checkpoint / "kept").touch()
    script.make_checkpoint(demo)
    assert (demo.checkpoint / "kept").exists(), "made again from the same adapter"

    write_adapter(demo, tmp_path / "two", -0.25)
    script.make_checkpoint(demo)
    assert not (demo.checkpoint / "kept").exists()
    torch.testing.assert_close(down(demo.checkpoint), dense - 0.25)

    demo.adapter.unlink()
    script.make_checkpoint(demo)
    assert torch.equal(down(demo.checkpoint), dense)
    assert validate_checkpoint(demo.checkpoint).prunepath.tau_curve


def test_what_another_process_made_meanwhile_is_kept(script, demo, tmp_path, monkeypatch):
    def merge_slowly(demo, folder):
        (tmp_path / "first").rename(demo.checkpoint)
        merge(demo, folder)

    write_adapter(demo, tmp_path / "one", 0.5)
    script.make_checkpoint(demo)
    demo.checkpoint.rename(tmp_path / "first")
    (tmp_path / "first" / "kept").touch()
    merge = script._merge
    monkeypatch.setattr(script, "_merge", merge_slowly)
    script.make_checkpoint(demo)
    assert (demo.checkpoint / "kept").exists()


def test_a_checkpoint_made_by_hand_stays(script, demo, tmp_path, capsys):
    convert(demo.dense, demo.checkpoint, expert_size=8)
    before = (demo.checkpoint / "model.safetensors").read_bytes()
    write_adapter(demo, tmp_path / "one", 0.5)
    script.make_checkpoint(demo)
    assert (demo.checkpoint / "model.safetensors").read_bytes() == before
    assert "not made by this script" in capsys.readouterr().out


def test_another_dense_model_is_refused_and_the_old_checkpoint_stays(script, demo, tmp_path):
    write_adapter(demo, tmp_path / "one", 0.5)
    script.make_checkpoint(demo)
    before = down(demo.checkpoint)
    other = save_dense("llama", tmp_path / "other", seed=7)
    write_adapter(demo, tmp_path / "two", 0.5, dense=other)
    with pytest.raises(
        CheckpointError, match=r"digest of its weights is .*; expected .*, the model .*adapter.safetensors was"
    ):
        script.make_checkpoint(demo)
    assert torch.equal(down(demo.checkpoint), before)


def test_an_unknown_model_is_named(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", "gpt-5"])
    with pytest.raises(SystemExit, match=r"^demo: MODEL gpt-5; expected one of smollm2, qwen2.5-coder-1.5b$"):
        script.main()


@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-coder-1.5b"])
def test_what_make_serve_asks_for(name):
    """The served directory and hints that can be pasted, without any model."""
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    options = [sys.executable, ROOT / "scripts" / "demo.py", "--model", name]
    folder = run([*options, "--checkpoint"]).stdout.strip()
    assert folder.startswith(".cache/")
    hints = run([*options, "--hints", "127.0.0.1", "8000"]).stdout
    assert folder in hints
    assert "http://127.0.0.1:8000/prunepath" in hints
    bodies = [json.loads(line.split("-d ")[1].strip("'")) for line in hints.splitlines() if "curl" in line]
    assert [(body["model"], body["tau"]) for body in bodies] == [(name, 1.0), (name, 0.9)]
