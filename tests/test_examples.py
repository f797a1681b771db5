"""The programs of examples/ and of the README, on a real server and a real engine."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import test_server
import warm
from runners import TRACED
from test_server import CURVE, MODEL, Server

ROOT = Path(__file__).parents[1]
DEMO = ".cache/SmolLM2-135M-Instruct-PrunePath"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
serve = test_server.serve


@pytest.fixture(scope="module")
def server(serve, prunepath_checkpoint) -> Server:
    return serve(prunepath_checkpoint("llama", default_tau=0.6, tau_curve=CURVE))


def run(name: str, *arguments: str) -> str:
    (file,) = (file for file in EXAMPLES if file.name == name)
    return run_file(file, *arguments, VLLM_CPU_KVCACHE_SPACE="1")


def run_file(file: Path, *arguments: str, start: Callable = warm.run, **variables: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **TRACED, **variables}
    done = start([sys.executable, str(file), *arguments], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout.decode(errors="replace")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_says_what_it_takes(file):
    assert "usage" in run(file.name, "--help")


def test_openai_client(server):
    said = run("openai_client.py", "hi", "--url", f"{server.url}/v1", "--model", MODEL, "--tau", "1.0", "0.4")
    sparsities = re.findall(r"\[tau (\S+), FFN sparsity (\S+)%\]", said)
    assert [tau for tau, _ in sparsities] == ["1.0", "0.4"]
    assert float(sparsities[0][1]) == 0 < float(sparsities[1][1])


def test_streaming(server):
    said = run("streaming.py", "hi", "--url", f"{server.url}/v1", "--sparsity", "0.5")
    assert "tau: 0.65" in said
    assert 0 < float(re.search(r"^ffn_sparsity: (\S+)$", said, re.MULTILINE)[1]) < 1


def test_offline_batch(prunepath_checkpoint):
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6, tau_curve=CURVE)
    said = run("offline_batch.py", str(checkpoint), "--tau", "1.0", "0.4", "--max-model-len", "256")
    lines = re.findall(r"^tau (\S+)\s+FFN sparsity (\S+)%", said, re.MULTILINE)
    assert [tau for tau, _ in lines] == ["1.0", "0.4"] * 2
    assert all((float(sparsity) > 0) == (tau == "0.4") for tau, sparsity in lines)


def readme_program(beginning: str) -> str:
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (program,) = (program for program in programs if program.startswith(beginning))
    return program


def test_the_readmes_client_program(server, capsys):
    program = readme_program("from openai import OpenAI").replace("http://127.0.0.1:8000", server.url)
    exec(program.replace('model="smollm2"', f"model={MODEL!r}"), {})
    said = capsys.readouterr().out
    assert all(str(extra) in said for extra in ({"tau": 1.0}, {"vllm_xargs": {"tau": 0.8}}, {"sparsity": 0.3}))


def test_the_readmes_transformers_program(prunepath_checkpoint, capsys):
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6, tau_curve=CURVE)
    exec(readme_program("import prunepath_vllm").replace(DEMO, str(checkpoint)), {})
    assert capsys.readouterr().out.startswith("The capital of France is")


def test_the_readmes_offline_program(prunepath_checkpoint, tmp_path):
    """As a file of its own and with no environment but ours, as a reader runs it."""
    program = readme_program("from vllm import LLM")
    assert DEMO in program
    file = tmp_path / "offline.py"
    file.write_text(program.replace(DEMO, str(prunepath_checkpoint("llama", default_tau=0.6, tau_curve=CURVE))))
    assert run_file(file, start=subprocess.run)
