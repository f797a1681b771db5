"""What changes or needs all of a checkpoint's weights, asked to take one that it has to refuse."""

import json
from pathlib import Path

import pytest

from prunepath_vllm.conversion.calibrate import calibrate
from prunepath_vllm.entrypoints import cli
from prunepath_vllm.errors import UsageError


def refused_changes(path: Path, text: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str, str]:
    """The errors of calibration, of `prunepath prune --method static` and of `prunepath train`; no run is begun."""
    with pytest.raises(UsageError) as calibration:
        calibrate(path, text)
    command = ["prune", str(path), str(folder / "out"), "--method", "static", "--sparsity", "0.5", "--text", str(text)]
    assert cli.main(command) == 2
    pruning = capsys.readouterr().err
    recipe = folder / "recipe.yaml"
    parts = dict(data=dict(train=[dict(path=str(text))], sequence_length=16), stages=[dict(losses={})])
    parts |= dict(optimizer=dict(lr=1e-3), schedule=dict(max_steps=1), batch=dict(sequences=1))
    parts |= dict(runtime=dict(device="cpu", bf16=False, tensorboard=False))
    recipe.write_text(json.dumps(dict(output=str(folder / "run"), model=dict(path=str(path)), **parts)))
    assert cli.main(["train", "--config", str(recipe)]) == 2
    assert not (folder / "run").exists()
    return str(calibration.value), pruning, capsys.readouterr().err
