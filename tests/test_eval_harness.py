"""lm-evaluation-harness, unmodified, on a PrunePath checkpoint: through the engine and against the server."""

import json
import os
import sys
from pathlib import Path

import pytest
import warm
from runners import TRACED
from test_server import MODEL, serve  # noqa: F401

from prunepath_vllm.entrypoints.cli import main

BIN = Path(sys.executable).parent
TAU = 0.4
ITEMS = 63  # every answer three times with every factor
TASK = """
task: arc_local
dataset_path: json
dataset_kwargs:
  cache_dir: {cache}
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""
"""lm-eval's own arc_easy, but for where the items are."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    rows = [
        {"question": f"Which is {i} times {i % 7}?", "choices": {"text": [str(i), "none of these", f"{i * (i % 7)}!"],
         "label": list("ABC")}, "answerKey": "ABC"[i % 3]}
        for i in range(ITEMS)
    ]  # fmt: skip
    (folder / "easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "arc_local.yaml").write_text(TASK.format(data=folder / "easy.jsonl", cache=folder / "cache"))
    return folder


@pytest.fixture(scope="module")
def ours(folder, prunepath_checkpoint) -> tuple[dict, list[dict]]:
    """What `prunepath eval` says: the point, and every item's record."""
    output = folder / "ours.json"
    command = ["eval", prunepath_checkpoint("llama"), "--task", "arc_easy", "--data", folder, "--tau", TAU]
    assert main([*map(str, command), "--backend", "transformers", "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()[1:]]
    return json.loads(output.read_text())["points"][0], [record for line in lines for record in line["value"]]


def harness(folder: Path, model: str, arguments: dict, *more: str) -> tuple[dict, list[dict]]:
    """What `lm_eval` says: the task's results, and its samples in the items' order."""
    output = folder / model
    command = [BIN / "lm_eval", "run", "--model", model, "--model_args", json.dumps(arguments), "--tasks", "arc_local"]
    process = warm.run(
        [*map(str, command), "--include_path", folder, "--output_path", output, "--log_samples", *more],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **TRACED,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
    )
    assert process.returncode == 0, process.stderr[-3000:]
    (results,), (samples,) = output.rglob("results_*.json"), output.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"]["arc_local"], sorted(rows, key=lambda row: row["doc_id"])


def assert_same(theirs: tuple[dict, list[dict]], ours: tuple[dict, list[dict]]) -> None:
    scores, samples = theirs
    point, records = ours
    assert scores["acc,none"] == pytest.approx(point["accuracy"])
    assert scores["acc_norm,none"] == pytest.approx(point["accuracy_norm"])
    assert len(samples) == len(records) == ITEMS
    for sample, record in zip(samples, records, strict=True):
        logprobs = [float(response[0]) for response in sample["filtered_resps"]]
        assert logprobs == pytest.approx(record["logprobs"], abs=1e-2)


def test_through_the_engine_at_a_default_tau(folder, ours, prunepath_checkpoint):
    arguments = {
        "pretrained": str(prunepath_checkpoint("llama")),
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "additional_config": {"prunepath": {"default_tau": TAU}},
    }
    assert_same(harness(folder, "vllm", arguments), ours)


def test_against_the_server_at_its_default_tau(folder, ours, prunepath_checkpoint, serve):  # noqa: F811
    checkpoint = prunepath_checkpoint("llama")
    server = serve(checkpoint, "--additional-config", json.dumps({"prunepath": {"default_tau": TAU}}))
    arguments = {
        "model": MODEL,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(checkpoint),
        "max_length": 256,
        "num_concurrent": 8,
    }
    assert_same(harness(folder, "local-completions", arguments), ours)
