"""``prunepath bench latency`` and ``serve`` on real engines and a real server, tiny checkpoints, no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from test_cli import BIN, assert_one_line

from prunepath_vllm.benchmarks import serve, server
from prunepath_vllm.benchmarks.report import BenchmarkError
from prunepath_vllm.entrypoints.cli import main

CURVE = [[0.2, 0.9], [0.6, 0.5], [1.0, 0.0]]
ENGINE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256")

WRONG_LAYER = """
from prunepath_vllm.entrypoints.cli import main
from prunepath_vllm.kernels import native
right = native.RoutedFFN._call
native.RoutedFFN._call = lambda *args: 1.01 * right(*args)
raise SystemExit(main())
"""
"""``prunepath`` with a layer that is wrong in every process that starts as a fork of it."""


def bench_latency(*arguments: object, prunepath: Path = BIN / "prunepath") -> subprocess.CompletedProcess:
    # Engines of one process: started as a user's are, each imports vLLM once instead of three times.
    env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    flags = ("--batch-size", "1,3", "--input-len", "16", "--output-len", "6", "--repeats", "2", *ENGINE)
    return warm.run(
        [sys.executable, prunepath, "bench", "latency", *map(str, arguments), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", **env},
    )


def test_latency_measures_dense_and_every_tau(prunepath_checkpoint, dense_checkpoint, tmp_path):
    checkpoint = prunepath_checkpoint("llama", tau_curve=CURVE)
    output, plot = tmp_path / "out.json", tmp_path / "plot.png"
    process = bench_latency(
        checkpoint, "--dense", dense_checkpoint("llama"), "--tau", "1.0,0.4", "--num-iters", "3", "--num-iters-warmup",
        "1", "--prefill", "100,20", "--lock", tmp_path / "lock", "--output", output, "--plot", plot,
        "--additional-config", '{"prunepath": {"mode": "at_least"}}',
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["dense"]["layer_error"] is None
    assert 0 < result["sparse"]["layer_error"] < 1e-5
    assert [row["tau"] for row in result["dense"]["rows"]] == [None, None]
    assert [(row["tau"], row["share"], row["batch_size"]) for row in result["sparse"]["rows"]] == [
        (1.0, 1.0, 1), (1.0, 1.0, 3), (0.4, pytest.approx(0.3), 1), (0.4, pytest.approx(0.3), 3),
    ]  # fmt: skip
    for row in result["dense"]["rows"] + result["sparse"]["rows"]:
        assert len(row["latencies"]) == 3
        assert row["avg_latency"] == pytest.approx(sum(row["latencies"]) / 3)
        assert set(row["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
        assert len(row["decode_steps_ms"]) == 2
        # Five of the six steps that a whole generation takes.
        assert 0 < 5e-3 * row["decode_step_ms"] < 3 * max(row["latencies"])
    prompts = [(row["tau"], row["tokens"]) for row in result["sparse"]["prefill"]]
    assert prompts == [(1.0, 100), (1.0, 20), (0.4, 100), (0.4, 20)]
    assert result["versions"]["vllm"].startswith("0.32")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["figures", "fig9", f"PrunePath={output}", "--output", str(tmp_path / "fig9.json")]) == 0
    labels = ["Dense", "PrunePath (tau 1)", "PrunePath (tau 0.4)"]
    assert [one["label"] for one in json.loads((tmp_path / "fig9.json").read_text())["series"]] == labels
    for title in ("decode step, ms", "average latency, ms", "prefill of 100, ms", "prefill of 20, ms"):
        assert title in process.stdout
    assert "INFO" not in process.stdout  # the engines' logs are not results


def test_latency_prints_no_speed_of_a_wrong_layer(prunepath_checkpoint, tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG_LAYER)
    output = tmp_path / "out.json"
    process = bench_latency(
        prunepath_checkpoint("llama", tau_curve=CURVE),
        "--tau",
        "0.4",
        "--output",
        output,
        prunepath=wrong,
    )
    assert_one_line(process, 1, "the routed layer is off by", "no speed is reported")
    assert process.stdout == ""
    assert not output.exists()


def test_serve_measures_servers_whose_answers_are_right(
    prunepath_checkpoint, dense_checkpoint, tmp_path, capfd, monkeypatch
):
    checkpoint = prunepath_checkpoint("llama", tau_curve=CURVE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(server, "subprocess", warm)
    flags = [*ENGINE, "--max-num-seqs", "16"]
    output, plot = tmp_path / "out.json", tmp_path / "plot.png"
    with server.running(checkpoint, flags) as url:
        with pytest.raises(BenchmarkError, match=r"answers at tau 1 are .* no speed is reported"):
            server.check_answers(url, prunepath_checkpoint("llama", seed=5), [1.0])
        capfd.readouterr()
        code = serve.run(
            [
                str(checkpoint), "--base-url", url, "--tau", "1.0,0.4", "--dense", str(dense_checkpoint("llama")),
                "--server-args", " ".join(flags), "--num-prompts", "5", "--input-len", "12", "--output-len", "6",
                "--temperature", "0", "--output", str(output), "--plot", str(plot),
            ]
        )  # fmt: skip
    assert code == 0
    result = json.loads(output.read_text())
    assert set(result["answers_off_by"]) == {"dense", "1", "0.4"}
    assert max(result["answers_off_by"].values()) < 1e-4
    assert [(run["tau"], run["share"]) for run in result["runs"]] == [
        (None, None), (1.0, 1.0), (0.4, pytest.approx(0.3)),
    ]  # fmt: skip
    for run in result["runs"]:
        figures = run["result"]
        assert (figures["completed"], figures["failed"], figures["total_output_tokens"]) == (5, 0, 30)
        assert all(figures[key] > 0 for key in serve.METRICS)
    assert plot.read_bytes().startswith(b"\x89PNG")
    said = capfd.readouterr().out.splitlines()
    assert said[0].startswith(f"{checkpoint}: answers off by")
    assert said[1].split() == ["dense", "tau", "1", "tau", "0.4"]
    assert len(said) == 2 + len(serve.METRICS)


def test_a_server_that_cannot_start_is_named(dense_checkpoint, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(server, "subprocess", warm)
    with pytest.raises(BenchmarkError, match=r"the server stopped with exit code 2: .*--no-such-flag"):
        server.running(dense_checkpoint("llama"), ["--no-such-flag", "1"]).__enter__()
