"""The command line: exit codes, one-line errors, and the commands that run the engine."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import warm
from naive import load_naive, naive_generate
from runners import TRACED
from tiny_models import build_tokenizer

BIN = Path(sys.executable).parent


def prunepath(*arguments: str | Path, run: Callable = warm.run) -> subprocess.CompletedProcess:
    """What the command says; with ``run=subprocess.run`` its process starts as a user's does."""
    return run(
        [BIN / "prunepath", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **TRACED},
    )


def assert_one_line(process: subprocess.CompletedProcess, code: int, *named: str) -> None:
    assert process.returncode == code, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("prunepath ")]
    assert len(lines) == 1, process.stderr
    assert "Traceback" not in process.stderr
    for name in named:
        assert name in lines[0]


def test_check_says_what_works_here():
    process = prunepath("check", "--try", run=subprocess.run)
    assert process.returncode == 0, process.stderr
    for fact in ("vLLM 0.32", "plugin registered", "llama, qwen2,", "native (", "serving: works here"):
        assert fact in process.stdout


def test_generate_completes_at_the_tau(prunepath_checkpoint):
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    prompt = "the quick brown fox"
    tokenizer = build_tokenizer()
    process = prunepath(
        "generate", checkpoint, "--prompt", prompt, "--tau", "0.4", "--max-tokens", "6", run=subprocess.run
    )
    assert process.returncode == 0, process.stderr[-3000:]
    with torch.no_grad():
        tokens = naive_generate(load_naive(checkpoint), tokenizer(prompt)["input_ids"], 0.4, 6)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert process.stdout.strip("\n").startswith(text.rstrip("�\n")[:3])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tau", "2"], ["tau", "2.0", "(0, 1.05]"]),
        (["--tau", "nan"], ["tau", "nan"]),
        (["--sparsity", "0.5"], ["sparsity", "tau_curve"]),
        (["--max-tokens", "0"], ["--max-tokens"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_generate_refuses_bad_values_before_the_engine_starts(prunepath_checkpoint, arguments, named):
    process = prunepath("generate", prunepath_checkpoint("llama", default_tau=0.6), "--prompt", "a", *arguments)
    assert_one_line(process, 2, *named)


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["serve"], ["inspect"]], ids=lambda c: c[0])
def test_a_bad_checkpoint_is_one_line(tmp_path, prunepath_checkpoint, command):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in prunepath_checkpoint("llama", default_tau=0.6).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    config["prunepath_config"]["expert_size"] = 16
    (broken / "config.json").write_text(json.dumps(config))
    name, *rest = command
    assert_one_line(prunepath(name, broken, *rest), 1, "expert_size 16", "256")


def test_a_port_that_is_taken_is_named(prunepath_checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = prunepath(
            "serve", prunepath_checkpoint("llama", default_tau=0.6), "--host", "127.0.0.1", "--port", port
        )
    assert_one_line(process, 1, "127.0.0.1", f"port {port}", "already in use", "expected")


def test_calibrate_says_nothing_of_model_types(tmp_path, prunepath_checkpoint):
    process = prunepath("calibrate", prunepath_checkpoint("llama", default_tau=0.6), "--text", tmp_path / "none.txt")
    assert_one_line(process, 2, "none.txt")
    assert "model of type" not in process.stderr


def test_unknown_flags_and_commands_exit_2():
    assert prunepath("frobnicate", run=subprocess.run).returncode == 2
    assert prunepath("generate").returncode == 2


def test_debug_shows_the_traceback(tmp_path):
    assert "Traceback" in prunepath("inspect", tmp_path, "--debug", run=subprocess.run).stderr
