"""`prunepath figures`: each from a tiny checkpoint or its results, end to end; the reconstruction by the equations."""

import json
import re
import shlex
import shutil
from pathlib import Path

import naive
import pytest
import torch
from naive import NaiveFFN, load_naive, naive_logits
from safetensors.torch import load_file, save_file
from tiny_models import build_tokenizer

from prunepath_vllm.checkpoint import WEIGHTS_FILE
from prunepath_vllm.entrypoints.cli import main
from prunepath_vllm.entrypoints.commands.figures import NAMES

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results/"
TEXT = "The quick brown fox jumps over the lazy dog and looks around for more. " * 10
PNG = b"\x89PNG"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def figures(name: str, output: Path, *more: object) -> dict:
    assert main(["figures", name, "--output", str(output), *map(str, more)]) == 0
    assert output.with_suffix(".png").read_bytes().startswith(PNG)
    return json.loads(output.read_text())


def evaluate(checkpoint: Path, task: str, data: Path, output: Path) -> dict:
    command = ["eval", checkpoint, "--task", task, "--data", data, "--tau", "1.0,0.5", "--context", 64, "--shots", 0]
    assert main([*map(str, command), "--backend", "transformers", "--output", str(output)]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize(("family", "gate"), [("llama", "none"), ("gpt2", "sigmoid")])
def test_fig2_is_the_error_of_the_first_k_experts(family, gate, prunepath_checkpoint, text, tmp_path, monkeypatch):
    checkpoint = prunepath_checkpoint(family, gate=gate)
    more = ("--top-k", "1,3,8", "--text", text, "--max-tokens", 64, "--context", 32)
    data = figures("fig2", tmp_path / "fig2.json", f"PrunePath={checkpoint}", *more)
    (series,) = data["series"]
    assert (series["label"], series["tokens"]) == ("PrunePath", 64)

    # By hand: the naive model's layers, token by token, on what they read when every expert runs.
    model = load_naive(checkpoint)
    ffns = [module for module in model.modules() if isinstance(module, NaiveFFN)]
    read: list[list[torch.Tensor]] = [[] for _ in ffns]
    for ffn, inputs in zip(ffns, read, strict=True):
        ffn.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.extend(args[0][0]))
    ids = build_tokenizer()(TEXT)["input_ids"]
    for start in (0, 32):
        naive_logits(model, ids[start : start + 32], 1.0)
    whole = [[ffn.token(x, x, 1.0) for x in inputs] for ffn, inputs in zip(ffns, read, strict=True)]
    for point in series["points"]:
        k = point["k"]
        monkeypatch.setattr(
            naive, "active_experts", lambda logits, tau, k=k, **_: logits.argsort(descending=True)[:k].tolist()
        )
        errors = [
            torch.stack([y - ffn.token(x, x, 1.0) for x, y in zip(inputs, outputs, strict=True)]).square().mean().item()
            for ffn, inputs, outputs in zip(ffns, read, whole, strict=True)
        ]
        assert point["layer_mse"] == pytest.approx(errors, rel=1e-3, abs=1e-9)
        assert point["mse"] == pytest.approx(sum(errors) / len(errors), rel=1e-3, abs=1e-9)
    last, middle, first = (series["points"][i]["mse"] for i in (2, 1, 0))
    assert last == 0 < middle < first
    again = figures("fig2", tmp_path / "again.json", f"again={tmp_path}/fig2.json")
    assert again["series"] == [series | {"label": "again"}]


def test_fig3_has_every_method_and_the_dense_line(prunepath_checkpoint, dense_checkpoint, tmp_path):
    rows = [dict(text=f"Text {i}.", label=i % 2) for i in range(8)]
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = evaluate(prunepath_checkpoint("roberta", num_labels=2), "sst2", tmp_path, tmp_path / "ours.json")
    pruned = dict(
        results, points=[dict(tau=None, ffn_sparsity=0.0, accuracy=0.7)], intervals=[{"accuracy": [0.6, 0.8]}]
    )
    for name in ("dense", "wanda"):
        (tmp_path / f"{name}.json").write_text(json.dumps(pruned))
    series = [f"Dense={tmp_path}/dense.json", f"PrunePath={tmp_path}/ours.json", f"Wanda={tmp_path}/wanda.json@0.5"]
    data = figures("fig3", tmp_path / "fig3.json", *series)
    dense, ours, wanda = data["series"]
    assert [one["label"] for one in data["series"]] == ["Dense", "PrunePath", "Wanda"]
    assert [(p["ffn_sparsity"], p["value"]) for p in dense["points"] + wanda["points"]] == [(0, 0.7), (0.5, 0.7)]
    assert [p["value"] for p in ours["points"]] == [p["accuracy"] for p in results["points"]]
    assert [[p["low"], p["high"]] for p in ours["points"]] == [i["accuracy"] for i in results["intervals"]]


@pytest.mark.parametrize("name", ["fig4", "fig7", "fig8", "table2"])
def test_figures_of_perplexity(name, prunepath_checkpoint, text, tmp_path, capsys):
    results = evaluate(prunepath_checkpoint("gpt2"), "wikitext", text, tmp_path / "ours.json")
    quality = dict(data="valid.txt", points=[dict(tau=0.5, ffn_sparsity=0.4, perplexity=30.0, accuracy=None)])
    (tmp_path / "quality.json").write_text(json.dumps(quality))
    series = [f"with={tmp_path}/ours.json", f"without={tmp_path}/ours.json"]
    if name == "fig4":  # a panel a task; a training's own results among them
        series.append(f"LTE={tmp_path}/quality.json,{tmp_path}/quality.json")
    data = figures(name, tmp_path / "figure.json", *series)
    shown = capsys.readouterr().out
    for one, row in zip(data["series"][0]["points"], results["points"], strict=True):
        assert one["value"] == row["perplexity"]
        assert f"| with | wikitext | {row['tau']:g} | {row['ffn_sparsity']:.3f} | perplexity |" in shown
    assert [len(one["points"]) for one in data["series"]] == [2] * len(series)


def test_fig4_and_fig5_from_their_tasks(prunepath_checkpoint, tmp_path):
    rows = [dict(subject="art", question=f"{i}?", choices=list("wxyz"), answer=i % 4) for i in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = evaluate(prunepath_checkpoint("llama"), "mmlu", tmp_path / "test.jsonl", tmp_path / "mmlu.json")
    data = figures("fig5", tmp_path / "fig5.json", f"PrunePath={tmp_path}/mmlu.json")
    assert [(p["tau"], p["value"]) for p in data["series"][0]["points"]] == [
        (p["tau"], p["accuracy"]) for p in results["points"]
    ]
    rows = [dict(input="one two three", targets=["one two"])] * 2
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = evaluate(prunepath_checkpoint("llama"), "e2e", tmp_path / "test.jsonl", tmp_path / "e2e.json")
    data = figures("fig4", tmp_path / "fig4.json", f"PrunePath={tmp_path}/e2e.json")
    assert [p["value"] for p in data["series"][0]["points"]] == [p["rouge_l"] for p in results["points"]]


def test_fig9_has_a_latency_for_every_prompt(tmp_path, capsys):
    def row(tau, batch, steps):
        return dict(tau=tau, share=None, batch_size=batch, decode_step_ms=steps[1], decode_steps_ms=steps)

    latency = {
        "dense": {"rows": [row(None, 1, [5.0, 4.0, 3.0]), row(None, 4, [6.0] * 3)], "peak_gib": 2.5},
        "sparse": {"rows": [row(0.8, 1, [2.0, 2.0, 8.0])], "peak_gib": None},
    }
    (tmp_path / "latency.json").write_text(json.dumps(latency))
    data = figures("fig9", tmp_path / "fig9.json", f"PrunePath={tmp_path}/latency.json")
    dense, sparse = data["series"]
    assert (dense["label"], dense["step_ms"], dense["median_ms"], dense["tokens_per_second"]) == (
        "Dense",
        [5, 4, 3],
        4,
        250,
    )
    assert (sparse["label"], sparse["median_ms"], sparse["peak_gib"]) == ("PrunePath (tau 0.8)", 2, None)
    assert "| Dense | 3 | 4.00 | 250.0 | 2.50 |" in capsys.readouterr().out


def test_what_is_wrong_is_named(prunepath_checkpoint, dense_checkpoint, text, tmp_path, capsys):
    results = evaluate(prunepath_checkpoint("gpt2"), "wikitext", text, tmp_path / "ours.json")
    (tmp_path / "bad.json").write_text(json.dumps(dict(results, points=[{}])))
    ours, more = tmp_path / "ours.json", ["--text", text]
    for name, series, named in (
        ("fig3", [f"PrunePath={ours}"], "perplexity on wikitext; fig3 shows accuracy"),
        ("fig8", [ours], "expected LABEL=FILE"),
        ("fig8", [f"PrunePath={tmp_path}/no.json"], "no.json: no such file"),
        ("fig8", [f"PrunePath={tmp_path}/bad.json"], "bad.json: expected results of"),
        ("fig8", [f"Wanda={ours}@0.5"], "@SPARSITY is for"),
        ("fig9", [f"PrunePath={ours}"], "expected results of prunepath bench latency"),
        ("fig2", [f"PrunePath={dense_checkpoint('gpt2')}", *more], "expected a PrunePath checkpoint"),
        ("fig2", [f"PrunePath={prunepath_checkpoint('gpt2')}"], "expected --text"),
        ("fig2", [f"PrunePath={ours}"], "ours.json: expected the output of prunepath figures fig2"),
        ("fig2", [f"PrunePath={prunepath_checkpoint('gpt2')}", *more, "--top-k", "9"], "--top-k 9: expected 1 to 8"),
    ):
        capsys.readouterr()
        assert main(["figures", name, *map(str, series), "--output", str(tmp_path / "out.json")]) == 2
        assert named in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "out.json").exists()


POINT = dict(tau=1.0, ffn_sparsity=0.0, accuracy=0.5)
ROW = dict(tau=0.5, batch_size=1, decode_steps_ms=[1.0, 2.0])
PLACE = dict(k=1, mse=0.5, relative_mse=0.1)
NAN, KIND = float("nan"), "expected results of prunepath"


def evaluation(*points: dict, **more: object) -> dict:
    return dict(task="sst2", points=[*points] or [POINT]) | more


def latencies(*rows: object, **more: object) -> dict:
    return dict(sparse=dict(rows=[*rows], peak_gib=1.0) | more)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        *(
            (name, content, "expected a JSON object")
            for name in ("fig2", "fig3", "fig9")
            for content in ("", "[]", "3", "null", "no JSON", "[" * 100_000)
        ),
        ("fig3", {}, KIND),
        ("fig3", evaluation(points=[]), KIND),
        ("fig3", evaluation(points={}), KIND),
        ("fig3", evaluation(task=3, data=3), KIND),
        ("fig3", evaluation(task={}, data=3, points=[POINT | dict(perplexity=None)]), KIND),
        ("fig3", evaluation(points=[3]), KIND),
        ("fig3", evaluation(intervals=[]) | dict(points=[POINT] * 2, intervals=[dict(accuracy=[0, 1])]), KIND),
        ("fig3", evaluation(intervals=[dict(accuracy=[0.1])]), KIND),
        ("fig3", evaluation(intervals=[dict(accuracy=["low", "high"])]), "accuracy 'low'; expected a finite number"),
        ("fig3", evaluation(intervals=[dict(accuracy=[0, NAN])]), "accuracy nan; expected a finite number"),
        ("fig3", evaluation(POINT, POINT | dict(accuracy=NAN)), "accuracy nan; expected a finite number"),
        ("fig3", evaluation(POINT | dict(accuracy=float("inf"))), "accuracy inf; expected"),
        ("fig3", evaluation(POINT | dict(accuracy=10**400)), "accuracy 1000"),
        ("fig3", evaluation(POINT | dict(accuracy=None)), "accuracy None; expected"),
        ("fig3", evaluation(POINT | dict(accuracy="high")), "accuracy 'high'; expected"),
        ("fig8", evaluation(POINT | dict(ffn_sparsity=NAN)), "ffn_sparsity nan; expected a finite number"),
        ("fig8", evaluation(POINT | dict(tau="x")), "tau 'x'; expected a finite number from 0 to 1.05"),
        ("fig8", evaluation(POINT | dict(tau=[1])), "tau [1]; expected"),
        ("fig4", dict(data="a.txt", points=[POINT | dict(perplexity=0.0)]), "perplexity 0.0; expected more than 0"),
        ("fig9", {}, KIND),
        ("fig9", dict(sparse=[1]), KIND),
        ("fig9", latencies("row"), KIND),
        ("fig9", latencies(ROW | dict(batch_size=2)), KIND),
        ("fig9", latencies(ROW | dict(decode_steps_ms=[])), KIND),
        ("fig9", latencies(ROW | dict(decode_steps_ms=[1, NAN])), "decode_steps_ms nan; expected a finite number"),
        ("fig9", latencies(ROW | dict(decode_steps_ms=[1, 0])), "decode_steps_ms 0.0; expected more than 0"),
        ("fig9", latencies(ROW | dict(decode_steps_ms="12")), "decode_steps_ms '1'; expected"),
        ("fig9", latencies(ROW | dict(tau=None)), "tau None; expected"),
        ("fig9", latencies(ROW, peak_gib="much"), "peak_gib 'much'; expected"),
        ("fig2", {}, "expected the output of"),
        ("fig2", dict(series=[]), "expected the output of"),
        ("fig2", dict(series=[3]), "expected the output of"),
        ("fig2", dict(series=[dict(points=[])]), "expected the output of"),
        (
            "fig2",
            dict(series=[dict(points=[PLACE | dict(mse=NAN)])]),
            "mse nan; expected a finite number of at",
        ),
        ("fig2", dict(series=[dict(points=[PLACE | dict(k=0)])]), "k 0; expected a finite number of at least 1"),
        ("fig2", dict(series=[dict(points=[PLACE | dict(k="few")])]), "k 'few'; expected"),
    ],
    ids=lambda value: None if isinstance(value, str) and len(value) < 40 else "",
)
def test_results_that_cannot_be_drawn_are_named(name, content, named, tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    assert main(["figures", name, f"Method={file}", "--output", str(tmp_path / "out.json")]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prunepath figures: {file}: ")
    assert named in line
    assert "--debug" not in line
    assert list(tmp_path.iterdir()) == [file]


def test_a_checkpoint_that_fig2_cannot_measure_is_named(prunepath_checkpoint, text, tmp_path, capsys):
    good, late = prunepath_checkpoint("llama"), prunepath_checkpoint("llama", dense_positions=4)
    zero = tmp_path / "zero"
    shutil.copytree(good, zero)
    weights = load_file(zero / WEIGHTS_FILE)
    zeroed = {name: tensor * 0 if "down_proj" in name else tensor for name, tensor in weights.items()}
    save_file(zeroed, zero / WEIGHTS_FILE, metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    for series, more, code, named in (
        ([f"A={zero}"], [], 1, "mean square 0.0; expected"),
        ([f"A={late}"], ["--context", "4"], 2, "context: 4; expected more than the 4 dense positions"),
        ([f"A={good}", f"B={tmp_path}/none"], [], 2, f"{tmp_path}/none: no such file or directory"),
    ):
        command = ["figures", "fig2", *series, "--output", tmp_path / "out.json", "--text", text, *more]
        assert main([*map(str, command)]) == code
        line = capsys.readouterr().err.splitlines()[-1]
        assert named in line
        assert "--debug" not in line
        assert sorted(tmp_path.iterdir()) == before


def documented() -> list[list[str]]:
    """The words after `prunepath figures` of every such command in docs/reproduction.md."""
    text = (ROOT / "docs/reproduction.md").read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    prunepath figures (.*)$", text, re.MULTILINE)]


def test_every_figure_is_documented():
    assert {command[0] for command in documented()} == set(NAMES)


@pytest.mark.parametrize("command", [one for one in documented() if RESULTS in one[1]], ids=lambda one: one[0])
def test_documented_figures_are_rebuilt_from_committed_results(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *series, option, output = command
    assert option == "--output"
    data = figures(name, tmp_path / output, *series)
    drawn = {one["label"].partition(" (tau ")[0] for one in data["series"]}  # fig9 has a series for every tau
    assert {one.partition("=")[0] for one in series} == drawn - ({"Dense"} if name == "fig9" else set())
