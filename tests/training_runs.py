"""What a training left, for tests of whole trainings; their recipe is a fixture (conftest.py)."""

import json
from pathlib import Path

import torch

from prunepath_vllm.checkpoint import read_tensor_index, stream_tensors

LENGTH = 64
"""Tokens of a sequence in the fixture's recipe."""


def logs(run, key="loss"):
    rows = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def tensors(path):
    return dict(stream_tensors(path, read_tensor_index(path)))


def assert_same(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
