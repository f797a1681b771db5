"""`prunepath eval`: tasks, backends that agree, metrics, and runs that go on where they stopped."""

import json
import os
import random
import sys
from pathlib import Path

import pytest
import runners
import torch
import warm
from naive import load_naive, naive_logits
from safetensors.torch import load_file, save_file
from tiny_models import build_tokenizer, save_prunepath

from prunepath_vllm.config import EXPERT_DTYPES
from prunepath_vllm.conversion.text import read_sequences
from prunepath_vllm.entrypoints.cli import main
from prunepath_vllm.errors import UsageError
from prunepath_vllm.evaluation.backends import Answer, TransformersBackend, open_checkpoint
from prunepath_vllm.evaluation.runner import ask
from prunepath_vllm.evaluation.statistics import METRICS, estimate
from prunepath_vllm.evaluation.tasks import NEEDLE, TASKS, Item, Request, choice_requests, needle_items

BIN = Path(sys.executable).parent
ARC = [
    {"question": f"What is {i} plus {i}?", "choices": {"text": [str(i), "no", "twelve"], "label": list("ABC")},
     "answerKey": "ABC"[i % 3]}
    for i in range(6)
]  # fmt: skip


@pytest.fixture
def arc(tmp_path) -> Path:
    (tmp_path / "easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ARC))
    return tmp_path


def evaluate(checkpoint: Path, data: Path, output: Path, *more: str) -> int:
    command = ["eval", str(checkpoint), "--task", "arc_easy", "--data", str(data), "--tau", "1.0,0.4"]
    return main([*command, "--backend", "transformers", "--output", str(output), *more])


def records(output: Path) -> dict:
    lines = output.with_suffix(".jsonl").read_text().splitlines()[1:]
    return {line["key"]: line["value"] for line in map(json.loads, lines)}


@pytest.fixture
def stored_in(prunepath_checkpoint, quantised):
    """``stored_in(dtype)``: a checkpoint whose experts are quantised, or None for one whose are not."""
    return lambda dtype: prunepath_checkpoint("llama") if dtype is None else quantised("llama", dtype)


@pytest.mark.parametrize("stored", [None, *EXPERT_DTYPES])
def test_choices_are_scored_as_the_naive_model_says(stored_in, arc, tmp_path, stored):
    checkpoint, output, plot = stored_in(stored), tmp_path / "out.json", tmp_path / "out.png"
    assert evaluate(checkpoint, arc, output, "--plot", str(plot)) == 0
    assert plot.stat().st_size > 1000
    result, kept = json.loads(output.read_text()), records(output)
    model, tokenizer = load_naive(checkpoint), build_tokenizer()
    for point in result["points"]:
        hits = normalised = 0
        for row, record in zip(ARC, kept[f"{point['tau']}/0"], strict=True):
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
            scores = []
            for choice in row["choices"]["text"]:
                ids = tokenizer(f" {choice}")["input_ids"]
                with torch.no_grad():
                    logits = naive_logits(model, [*prompt, *ids], point["tau"])[len(prompt) - 1 : -1]
                scores.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item())
            assert record["logprobs"] == pytest.approx(scores, rel=1e-3)
            best = [score / len(text) for score, text in zip(scores, row["choices"]["text"], strict=True)]
            hits += "ABC"[scores.index(max(scores))] == row["answerKey"]
            normalised += "ABC"[best.index(max(best))] == row["answerKey"]
        assert point["accuracy"] == pytest.approx(hits / len(ARC))
        assert point["accuracy_norm"] == pytest.approx(normalised / len(ARC))
    dense, sparse = result["points"]
    assert dense["ffn_sparsity"] == 0 < sparse["ffn_sparsity"]


@pytest.mark.parametrize("stored", [None, "float8_e4m3fn"])
def test_the_engine_agrees_with_transformers(stored_in, arc, tmp_path, stored):
    checkpoint, output, other = stored_in(stored), tmp_path / "out.json", tmp_path / "engine.json"
    assert evaluate(checkpoint, arc, output) == 0
    command = ["eval", checkpoint, "--task", "arc_easy", "--data", arc, "--tau", "1.0,0.4", "--output", other]
    process = warm.run(
        [BIN / "prunepath", *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **runners.TRACED},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    engine, here = json.loads(other.read_text()), json.loads(output.read_text())
    assert engine["backend"] == "vllm"
    for mine, theirs in zip(here["points"], engine["points"], strict=True):
        assert theirs == pytest.approx(mine, abs=1e-4)
    for key, rows in records(output).items():
        for mine, theirs in zip(rows, records(other)[key], strict=True):
            assert theirs["logprobs"] == pytest.approx(mine["logprobs"], abs=1e-2)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_either_runner_scores_as_transformers_does(runner, prunepath_checkpoint):
    """V2 reads what choices share once. Two begin alike beyond a block of its cache: those are read whole."""
    checkpoint, generator = open_checkpoint(prunepath_checkpoint("llama")), random.Random(0)

    def words(count: int) -> list[int]:
        return [generator.randrange(3, checkpoint.config["vocab_size"]) for _ in range(count)]

    requests = []
    for context, alike in ((words(40), []), (words(20), words(14)), (words(7), [])):
        requests += [Request(context, [*alike, *words(count)]) for count in (1, 5, 9)]
    options = json.dumps(dict(requests=[[one.context, one.continuation] for one in requests], taus=[1.0, 0.4]))
    process = warm.run(
        [sys.executable, Path(__file__).with_name("eval_scenarios.py"), "score", checkpoint.path, runner, options],
        capture_output=True,
        text=True,
        env={**os.environ, **runners.environment(runner)},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    scores_ids, answers = json.loads(process.stdout.rpartition("\nRESULT ")[2])
    assert scores_ids == (runner == "v2")
    here = TransformersBackend(checkpoint, None, "cpu")
    for tau, scored in answers.items():
        expected = here.loglikelihood(requests, float(tau))
        assert [logprob for logprob, _ in scored] == pytest.approx([one.logprob for one in expected], abs=1e-3)
        spared = [one.read - read for one, (_, read) in zip(expected, scored, strict=True)]
        assert spared == [0, 32 * scores_ids, 32 * scores_ids, *[0] * 6]


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_scores_in_the_checkpoints_dtype_where_it_multiplies_it_fast(prunepath_checkpoint, monkeypatch, fast):
    monkeypatch.setattr("prunepath_vllm.conversion.calibrate.has_fast_product", lambda dtype: fast)
    checkpoint = open_checkpoint(prunepath_checkpoint("llama", dtype=torch.bfloat16))
    model = TransformersBackend(checkpoint, None, "cpu").model
    assert model.dtype == (torch.bfloat16 if fast else torch.float32)


def test_tasks_share_a_model(prunepath_checkpoint, arc, tmp_path, monkeypatch, capsys):
    (tmp_path / ".cache/data").mkdir(parents=True)
    (tmp_path / ".cache/data/arc").symlink_to(arc)
    (arc / "challenge.jsonl").write_text((arc / "easy.jsonl").read_text())
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(
        "prunepath_vllm.evaluation.runner.TransformersBackend",
        lambda *args: made.append(args) or TransformersBackend(*args),
    )
    command = ["eval", str(prunepath_checkpoint("llama")), "--tau", "0.4", "--backend", "transformers"]
    assert main([*command, "--task", "arc_easy,arc_challenge", "--output", "out.json"]) == 0
    assert len(made) == 1
    easy, challenge = (json.loads(Path(f"out-arc_{name}.json").read_text()) for name in ("easy", "challenge"))
    assert (easy["task"], easy["points"]) == ("arc_easy", challenge["points"])
    for options, named in (
        (["--task", "arc_easy,nonsense"], "'nonsense'; expected one of"),
        (["--task", "arc_easy,arc_challenge", "--data", "."], "expected one task"),
        (["--task", "arc_easy", "--engine", "[1]"], "--engine [1]: expected a JSON object"),
        (["--task", "arc_easy", "--engine", '{"max_model_len": 9}'], "--engine: max_model_len is the checkpoint's"),
    ):
        assert main([*command, *options]) == 2
        assert named in capsys.readouterr().err.splitlines()[-1]


def test_an_interrupted_run_goes_on(prunepath_checkpoint, arc, tmp_path, capsys):
    checkpoint, output = prunepath_checkpoint("llama"), tmp_path / "out.json"
    assert evaluate(checkpoint, arc, output) == 0
    whole, journal = json.loads(output.read_text()), output.with_suffix(".jsonl")
    header, first, second = journal.read_text().splitlines()
    changed = json.loads(first)
    for record in changed["value"]:
        record["statistics"]["accuracy"] = 1.0  # seen in the result only where the shard is not run again
    journal.write_text("\n".join([header, json.dumps(changed), second[:50]]))
    assert evaluate(checkpoint, arc, output) == 0
    again = json.loads(output.read_text())
    assert again["points"][0]["accuracy"] == 1.0
    assert again["points"][1] == whole["points"][1]
    capsys.readouterr()
    assert evaluate(checkpoint, arc, output, "--limit", "2") == 2
    assert "another items" in capsys.readouterr().err.splitlines()[-1]


def test_what_is_wrong_is_named(prunepath_checkpoint, arc, tmp_path, capsys):
    checkpoint = str(prunepath_checkpoint("llama"))
    (arc / "easy.jsonl").write_text(json.dumps(ARC[0]) + "\n" + json.dumps(ARC[1] | {"answerKey": "Z"}) + "\n")
    for options, named in (
        (["--task", "nonsense"], "'nonsense'; expected one of wikitext, needle, mmlu"),
        (["--task", "arc_easy", "--data", str(arc)], "easy.jsonl, line 2"),
        (["--task", "arc_challenge", "--data", str(arc)], "challenge.jsonl"),
        (["--task", "sst2", "--data", str(arc)], "expected a classifier"),
    ):
        assert main(["eval", checkpoint, "--backend", "transformers", *options]) == 2
        assert named in capsys.readouterr().err.splitlines()[-1]


def test_probabilities_that_are_not_finite_give_no_result(arc, tmp_path, capsys):
    checkpoint = save_prunepath("llama", tmp_path / "model")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
    save_file(tensors, checkpoint / "model.safetensors")
    assert evaluate(checkpoint, arc, tmp_path / "out.json") == 1
    assert "arc: the model's probabilities at tau 1 are NaN or zero" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_a_choice_longer_than_the_model_reads_is_cut_and_an_empty_one_refused(prunepath_checkpoint):
    class Stripping:
        """Like tokenizers that drop blanks at the end of a text."""

        def __call__(self, texts):
            return {"input_ids": [build_tokenizer()(one.rstrip())["input_ids"] for one in texts]}

    with pytest.raises(UsageError, match=r"choice '' after 'Q:': no tokens"):
        choice_requests([Item("Q:", choices=("a", ""))], Stripping(), 511)

    checkpoint = prunepath_checkpoint("llama")
    tokenizer, model = build_tokenizer(), TransformersBackend(open_checkpoint(checkpoint), build_tokenizer(), "cpu")
    requests = choice_requests([Item("Q:", choices=("b" * 40, "cd"))], tokenizer, 16)
    naive = load_naive(checkpoint)
    for request, answer in zip(requests, model.loglikelihood(requests, 0.4), strict=True):
        whole = request.context + request.continuation
        assert len(whole) <= 16
        scores = naive_logits(naive, whole[:-1], 0.4).log_softmax(-1)
        right = sum(float(scores[at - 1, whole[at]]) for at in range(len(request.context), len(whole)))
        assert answer.logprob == pytest.approx(right, abs=1e-3)
    assert [len(request.continuation) for request in requests] == [15, 3]


def test_f1_and_intervals():
    counts = dict(accuracy=0.0, true_positive=0.0, false_positive=0.0, false_negative=0.0)
    items = [counts | {"true_positive": 1.0, "accuracy": 1.0}] * 30 + [counts | {"false_positive": 1.0}] * 10
    items += [counts | {"false_negative": 1.0}] * 10
    value, low, high = estimate(items, ["f1"])["f1"]
    assert value == pytest.approx(0.75)
    assert low < value < high
    _, low, high = estimate(items, ["accuracy"])["accuracy"]
    assert (high - low) / 2 == pytest.approx(1.96 * (0.6 * 0.4 / 50) ** 0.5, rel=0.15)
    assert METRICS["f1"](counts) == 0


def test_a_number_is_hidden_at_every_depth_and_found_or_not(prunepath_checkpoint, tmp_path):
    checkpoint, tokenizer = prunepath_checkpoint("llama"), build_tokenizer()
    (tmp_path / "valid.txt").write_text("the quick brown fox jumps over the lazy dog and goes on. " * 400)
    sequences = read_sequences(tokenizer, tmp_path / "valid.txt", length=200, max_tokens=8 * 200).tolist()
    items = needle_items(sequences, tokenizer, 12)
    depths = []
    for item in items:
        assert len(item.tokens) == 200 - 12
        text = tokenizer.decode(item.tokens, skip_special_tokens=True)
        assert text.count(item.choices[0]) == 1
        assert text.rstrip().endswith("is")
        told, asked = text.index("The special magic number"), text.index("What is")
        depths.append(told / (asked - len(NEEDLE.format("meadow", item.choices[0]))))
    assert len({item.choices[0] for item in items}) == 8
    assert min(depths) < 0.1
    assert max(depths) > 0.7

    class Echo:
        """Finds every second number."""

        tokenizer = build_tokenizer()

        def generate(self, prompts, tau, new_tokens):
            said = [item.choices[0] if i % 2 else "7" for i, item in enumerate(items)]
            return [
                Answer(tokens=tuple(self.tokenizer(f" {one}.", add_special_tokens=False)["input_ids"])) for one in said
            ]

    found = ask(TASKS["needle"], items, [list(item.tokens) for item in items], Echo(), 0.5)
    assert [record["statistics"]["recall"] for record in found] == [0.0, 1.0] * 4

    with pytest.raises(UsageError, match=r"--context 40: expected at least \d+ for needle"):
        needle_items([[1] * 40], tokenizer, 12)
    output = tmp_path / "out.json"
    command = ["eval", str(checkpoint), "--task", "needle", "--data", str(tmp_path), "--tau", "1.0,0.4"]
    command += ["--context", "200", "--max-tokens", "600", "--backend", "transformers", "--output", str(output)]
    assert main(command) == 0
    result = json.loads(output.read_text())
    assert (result["items"], result["context"]) == (3, 200)
    assert [point["recall"] for point in result["points"]] == [0.0, 0.0]  # random weights
    read = records(output)["1.0/0"][0]["read"]
    assert 188 <= read <= 200
