"""scripts/demo.py on a tiny model: an adapter is merged, a new one again; without one the model is calibrated."""

import importlib.util
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
def demo(tmp_path, dense_checkpoint, monkeypatch):
    """The script, with its paths in a temporary folder."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))
    paths = dict(
        DENSE=dense_checkpoint("llama"), CHECKPOINT=tmp_path / "served", TEXT=text, ADAPTER=tmp_path / "a" / "adapter"
    )
    for name, path in paths.items():
        monkeypatch.setattr(module, name, path)
    module.ADAPTER.parent.mkdir()
    return module


def write_adapter(demo, scratch: Path, value: float, *, dense: Path | None = None) -> None:
    """A rank-1 update of one linear: every weight plus `value`."""
    converted = convert(dense or demo.DENSE, scratch, expert_size=8)
    outputs, inputs = load_file(converted / "model.safetensors")[f"{LINEAR}.weight"].shape
    update = {f"{LINEAR}.up": torch.full((outputs, 1), value), f"{LINEAR}.down": torch.ones(1, inputs)}
    orders = neuron_order(dense or demo.DENSE, converted)
    save_adapter(dense or demo.DENSE, converted, orders, update, destination=demo.ADAPTER)


def down(checkpoint: Path) -> torch.Tensor:
    """The updated linear's weights, sorted: the order of neurons aside."""
    return load_file(checkpoint / "model.safetensors")[f"{LINEAR}.weight"].flatten().sort().values


def test_the_checkpoint_follows_the_adapter(demo, tmp_path):
    write_adapter(demo, tmp_path / "one", 0.5)
    (demo.ADAPTER.parent / "recipe.yaml").write_text("seed: 1\n")
    demo.make_checkpoint()
    validate_checkpoint(demo.CHECKPOINT, check_values=True)
    assert (demo.CHECKPOINT / "recipe.yaml").read_text() == "seed: 1\n"
    dense = down(demo.DENSE)
    torch.testing.assert_close(down(demo.CHECKPOINT), dense + 0.5)

    (demo.CHECKPOINT / "kept").touch()
    demo.make_checkpoint()
    assert (demo.CHECKPOINT / "kept").exists(), "made again from the same adapter"

    write_adapter(demo, tmp_path / "two", -0.25)
    demo.make_checkpoint()
    assert not (demo.CHECKPOINT / "kept").exists()
    torch.testing.assert_close(down(demo.CHECKPOINT), dense - 0.25)

    demo.ADAPTER.unlink()
    demo.make_checkpoint()
    assert torch.equal(down(demo.CHECKPOINT), dense)
    assert validate_checkpoint(demo.CHECKPOINT).prunepath.tau_curve


def test_a_checkpoint_made_by_hand_stays(demo, tmp_path, capsys):
    convert(demo.DENSE, demo.CHECKPOINT, expert_size=8)
    before = (demo.CHECKPOINT / "model.safetensors").read_bytes()
    write_adapter(demo, tmp_path / "one", 0.5)
    demo.make_checkpoint()
    assert (demo.CHECKPOINT / "model.safetensors").read_bytes() == before
    assert "not made by this script" in capsys.readouterr().out


def test_another_dense_model_is_refused_and_the_old_checkpoint_stays(demo, tmp_path):
    write_adapter(demo, tmp_path / "one", 0.5)
    demo.make_checkpoint()
    before = down(demo.CHECKPOINT)
    other = save_dense("llama", tmp_path / "other", seed=7)
    write_adapter(demo, tmp_path / "two", 0.5, dense=other)
    with pytest.raises(CheckpointError, match=r"digest of its weights is .*; expected .*, the model .*adapter was"):
        demo.make_checkpoint()
    assert torch.equal(down(demo.CHECKPOINT), before)
