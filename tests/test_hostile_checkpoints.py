"""Checkpoints made to do harm: refused in one line before anything is allocated, and nothing in them is ever run."""

import json
import pickle
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunepath_vllm
from prunepath_vllm.checkpoint import WEIGHTS_FILE, validate_checkpoint
from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.errors import PrunePathError

SECONDS, BYTES = 5, 32 * 2**20
"""What a refusal may take, in CPU time and in Python's memory; no tensor is read before it."""


@pytest.fixture
def prunepath(prunepath_checkpoint, tmp_path) -> Path:
    return shutil.copytree(prunepath_checkpoint("llama"), tmp_path / "prunepath")


@pytest.fixture
def dense(dense_checkpoint, tmp_path) -> Path:
    return shutil.copytree(dense_checkpoint("llama"), tmp_path / "dense")


def config(path: Path, **fields: Any) -> None:
    """Change config.json; fields of prunepath_config too where it has them."""
    data = json.loads((path / "config.json").read_text())
    for name, value in fields.items():
        block = data.get("prunepath_config", {})
        (block if name in block else data)[name] = value
    (path / "config.json").write_text(json.dumps(data))


def header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of model.safetensors; the data stays."""
    raw = (path / WEIGHTS_FILE).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    entries = json.loads(raw[8 : 8 + size])
    change(entries)
    text = json.dumps(entries).encode()
    (path / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def header_bytes(path: Path, size: int, text: bytes) -> None:
    (path / WEIGHTS_FILE).write_bytes(struct.pack("<Q", size) + text)


EMBEDDING = "model.embed_tokens.weight"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a billion layers": (lambda path: config(path, num_hidden_layers=10**9), "num_hidden_layers"),
    "layers beyond any integer type": (lambda path: config(path, num_hidden_layers=10**400), "num_hidden_layers"),
    "a trillion words": (lambda path: config(path, vocab_size=10**12), EMBEDDING),
    "a wide model": (lambda path: config(path, hidden_size=2**40), "[256, 1099511627776]"),
    "many experts": (
        lambda path: config(path, intermediate_size=2**50, num_experts=2**45),
        "[1125899906842624, 64]",
    ),
    "deep json": (lambda path: (path / "config.json").write_text('{"a":' * 10**5 + "1" + "}" * 10**5), "config.json"),
    "a header of 8 EiB": (lambda path: header_bytes(path, 2**63, b"{}"), WEIGHTS_FILE),
    "a header of 90 MB": (lambda path: header_bytes(path, 90 * 10**6, b"{}"), WEIGHTS_FILE),
    "a deep header": (lambda path: header_bytes(path, 2 * 10**5, b"[" * 2 * 10**5), WEIGHTS_FILE),
    "a tensor of 2^80 values": (
        lambda path: header(path, lambda entries: entries[EMBEDDING].update(shape=[2**40, 2**40])),
        WEIGHTS_FILE,
    ),
    "a tensor that ends behind the file": (
        lambda path: header(path, lambda entries: entries[EMBEDDING].update(data_offsets=[0, 2**50])),
        WEIGHTS_FILE,
    ),
    "tensors that share their bytes": (
        lambda path: header(path, lambda entries: entries.update({"copy": dict(entries[EMBEDDING])})),
        WEIGHTS_FILE,
    ),
    "a negative shape": (
        lambda path: header(path, lambda entries: entries[EMBEDDING].update(shape=[-320, -64])),
        WEIGHTS_FILE,
    ),
}


def refused(action: Callable[[], object], *names: str, kind: type[Exception] = PrunePathError) -> None:
    """One line that has the names, soon and in little memory."""
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(kind) as caught:
        action()
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(caught.value)
    for name in names:
        assert name in message
    assert "\n" not in message
    assert len(message) < 600
    assert seconds < SECONDS
    assert peak < BYTES


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_before_anything_is_allocated(prunepath, name):
    spoil, named = HOSTILE[name]
    spoil(prunepath)
    refused(lambda: validate_checkpoint(prunepath), named)


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "a trillion words"])  # embeddings are copied
def test_a_hostile_dense_model_is_not_converted(dense, tmp_path, name):
    spoil, named = HOSTILE[name]
    spoil(dense)
    refused(lambda: convert(dense, tmp_path / "out", expert_size=32), named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a billion layers", "a tensor of 2^80 values", "many experts"])
def test_the_engine_refuses_it_before_it_loads(prunepath, name):
    from vllm.engine.arg_utils import EngineArgs

    spoil, named = HOSTILE[name]
    spoil(prunepath)
    with pytest.raises(ValueError) as caught:
        EngineArgs(model=str(prunepath)).create_engine_config()
    assert named in str(caught.value)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_what_lies_beside_the_weights_is_never_run(prunepath, dense, tmp_path):
    """Pickles under every name that a loader might look for, and code that config.json points to."""
    mark = tmp_path / "run"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # it works
    mark.unlink()
    for path in (prunepath, dense):
        for name in ("pytorch_model.bin", "model.bin", "model.pt", "weights.pth", "training_args.bin", "state.pkl"):
            (path / name).write_bytes(pickle.dumps(Bomb(mark)))
        (path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
        config(path, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    prunepath_vllm.register()
    validate_checkpoint(prunepath, check_values=True)
    AutoModelForCausalLM.from_pretrained(prunepath)
    convert(dense, tmp_path / "out", expert_size=32)
    assert not mark.exists()
    assert {file.suffix for file in (tmp_path / "out").iterdir()} <= {".json", ".jinja", ".md", ".safetensors"}


@pytest.mark.parametrize("load_format", ["pt", "npcache"])
def test_the_engine_is_not_talked_into_a_pickle(prunepath, load_format):
    from vllm.engine.arg_utils import EngineArgs

    torch.save({}, prunepath / "model.pt")
    with pytest.raises(ValueError, match="pickled weights"):
        EngineArgs(model=str(prunepath), load_format=load_format).create_engine_config()
