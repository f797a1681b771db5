"""`prunepath eval` against the reference libraries' own figures, and both backends on classification and generation."""

import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch
import warm
from rouge_score.rouge_scorer import RougeScorer
from runners import TRACED
from sklearn.metrics import accuracy_score, f1_score
from tiny_models import build_tokenizer
from transformers import AutoModelForCausalLM

from prunepath_vllm.entrypoints.cli import main
from prunepath_vllm.modeling import register_auto_classes

BIN = Path(sys.executable).parent
TAUS = (1.0, 0.4)
CONTEXT = 64
TEXT = "the film is a good and bad story of people who say what they think about it all"
WORDS = TEXT.split()
PAIRS = [
    {"text": " ".join(WORDS[i % 7 : i % 7 + 6]), "text_pair": " ".join(WORDS[i % 5 : i % 5 + 9]), "label": i % 2}
    for i in range(24)
]
SUMMARIES = [
    {"input": " ".join(WORDS[i:] + WORDS[:i]), "targets": [" ".join(WORDS[i : i + 5]), "people say it"]}
    for i in range(6)
]


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def records(output: Path, tau: float) -> list[dict]:
    lines = map(json.loads, output.with_suffix(".jsonl").read_text().splitlines()[1:])
    return next(line["value"] for line in lines if line["key"] == f"{tau}/0")


def evaluate(*command: object) -> None:
    assert main(["eval", *map(str, command)]) == 0


def evaluate_with_engine(*command: object) -> None:
    process = warm.run(
        [BIN / "prunepath", "eval", *map(str, command), "--backend", "vllm"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **TRACED, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]


def sliding_window_perplexity(model, ids: torch.Tensor, window: int, **options) -> float:
    """The loop of transformers' guide "Perplexity of fixed-length models", stride and window the same; ids: [1, S]."""
    total, predicted = 0.0, 0
    for begin in range(0, ids.shape[1], window):
        inputs = ids[:, begin : begin + window]
        with torch.no_grad():
            loss = model(inputs, labels=inputs.clone(), **options).loss
        total += loss.item() * (inputs.shape[1] - 1)
        predicted += inputs.shape[1] - 1
    return float(torch.tensor(total / predicted).exp())


def test_perplexity_is_transformers_sliding_window_figure(prunepath_checkpoint, dense_checkpoint, tmp_path):
    register_auto_classes()
    generator = random.Random(0)
    text = " ".join(generator.choice(WORDS) for _ in range(400))
    ids = torch.tensor([build_tokenizer()(text)["input_ids"]])
    ids = ids[:, : ids.shape[1] // CONTEXT * CONTEXT]
    (tmp_path / "text.txt").write_text(text)
    for checkpoint, taus in ((dense_checkpoint("gpt2"), [None]), (prunepath_checkpoint("gpt2"), TAUS)):
        output = tmp_path / f"{checkpoint.parent.name}.json"
        task = ("--task", "wikitext", "--data", tmp_path / "text.txt", "--context", CONTEXT, "--max-tokens", 10**6)
        evaluate(checkpoint, *task, "--tau", "1.0,0.4", "--output", output)
        points = json.loads(output.read_text())["points"]
        model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        assert [point["tau"] for point in points] == list(taus)
        for point in points:
            options = {} if point["tau"] is None else {"tau": point["tau"]}
            assert point["perplexity"] == pytest.approx(
                sliding_window_perplexity(model, ids, CONTEXT, **options), rel=1e-3
            )


def test_classification_engine_and_transformers_agree_and_equal_sklearn(prunepath_checkpoint, tmp_path):
    checkpoint, data = prunepath_checkpoint("roberta", num_labels=2), write(tmp_path, "valid.jsonl", PAIRS)
    here, engine = tmp_path / "here.json", tmp_path / "engine.json"
    command = (checkpoint, "--task", "mrpc", "--data", data, "--tau", "1.0,0.4", "--output")
    evaluate(*command, here, "--backend", "transformers")
    evaluate_with_engine(*command, engine)
    truth = [row["label"] for row in PAIRS]
    for tau, mine, theirs in zip(
        TAUS, json.loads(here.read_text())["points"], json.loads(engine.read_text())["points"], strict=True
    ):
        assert theirs == pytest.approx(mine, abs=1e-4)
        predicted = []
        for left, right in zip(records(here, tau), records(engine, tau), strict=True):
            assert right["probabilities"] == pytest.approx(left["probabilities"], abs=1e-3)
            predicted.append(int(left["probabilities"][1] > left["probabilities"][0]))
        assert mine["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
        assert mine["f1"] == pytest.approx(f1_score(truth, predicted))


def test_generation_engine_and_transformers_agree_and_equal_rouge_score(prunepath_checkpoint, tmp_path):
    checkpoint, data = prunepath_checkpoint("llama"), write(tmp_path, "test.jsonl", SUMMARIES)
    here, engine = tmp_path / "here.json", tmp_path / "engine.json"
    command = (checkpoint, "--task", "xsum", "--data", data, "--tau", "1.0,0.4", "--output")
    evaluate(*command, here, "--backend", "transformers")
    evaluate_with_engine(*command, engine)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for tau, mine in zip(TAUS, json.loads(here.read_text())["points"], strict=True):
        texts = [record["text"] for record in records(here, tau)]
        assert [record["text"] for record in records(engine, tau)] == texts
        scores = [
            max(scorer.score(target, text)["rougeL"].fmeasure for target in row["targets"])
            for row, text in zip(SUMMARIES, texts, strict=True)
        ]
        assert mine["rouge_l"] == pytest.approx(sum(scores) / len(scores))
