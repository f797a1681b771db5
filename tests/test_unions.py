"""Unions of experts against sets of them, and the whole measurement on a tiny checkpoint."""

import json

import pytest
import torch

from prunepath_vllm.benchmarks import unions


def test_union_shares_are_those_of_sets():
    active = torch.rand(5, 7, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    chosen = [[set(active[n, s].nonzero().flatten().tolist()) for s in range(7)] for n in range(5)]
    different = [len(chosen[n][s] | chosen[n + 1][s]) for n in (0, 2) for s in range(7)]
    consecutive = [len(chosen[n][s] | chosen[n][s + 1] | chosen[n][s + 2]) for n in range(5) for s in (0, 3)]
    assert unions.union_shares(active, 2)[0] == pytest.approx(sum(different) / len(different) / 6)
    assert unions.union_shares(active, 3)[1] == pytest.approx(sum(consecutive) / len(consecutive) / 6)


def test_a_checkpoint_is_measured(prunepath_checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A text that is long enough for some places, each of its own. " * 40)
    output = tmp_path / "unions.json"
    checkpoint = prunepath_checkpoint("llama")
    options = dict(text=text, tau="1.0,0.4", batch_size="1,4", places=8, output=output)
    argv = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    unions.main([str(checkpoint), *argv])
    dense, sparse = json.loads(output.read_text())["rows"]
    assert dense["active"] == dense["different"]["4"] == dense["consecutive"]["1"] == 1
    assert sparse["different"]["1"] == pytest.approx(sparse["active"])
    assert sparse["active"] < sparse["different"]["4"] < 1
    assert "run of 4" in capsys.readouterr().out
