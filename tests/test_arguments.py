"""Every command refuses bad numbers, paths and missing packages in one line, before it works and leaving nothing."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prunepath_vllm import arguments
from prunepath_vllm.benchmarks.options import add_expert_dtype
from prunepath_vllm.config import EXPERT_DTYPES
from prunepath_vllm.entrypoints import cli
from prunepath_vllm.entrypoints.commands import bench
from prunepath_vllm.entrypoints.commands import serve as serve_command

COMMANDS = cli.build_parser()._subparsers._group_actions[0].choices
CHECKED_LATER = {("prune", "--sparsity"), ("generate", "--tau"), ("generate", "--sparsity")}
"""Plain floats: bounds that the method or the checkpoint gives."""
HUGE = "9" * 20


def options(command: str, parser: argparse.ArgumentParser | None = None):
    """(command line so far, option, its argparse action) of a command and of what is below it."""
    for action in (parser or COMMANDS[command])._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from options(f"{command} {name}", below)
        elif action.option_strings:
            yield command, action.option_strings[-1], action


NUMBERS = [
    (command, option)
    for name in COMMANDS
    if name != "bench"
    for command, option, action in options(name)
    if action.type is not None and (command, option) not in CHECKED_LATER
] + [
    ("bench kernel", option) for option in ("--tokens", "--share", "--expert-size", "--layers")
] + [
    ("bench tune", option) for option in ("--tokens", "--expert-size", "--layers", "--processes", "--seconds")
] + [
    ("bench latency", option)
    for option in ("--tau", "--share", "--batch-size", "--expert-size", "--repeats", "--prefill", "--num-iters")
] + [("bench serve", "--tau")]  # fmt: skip


def refused(capsys, *arguments: object) -> tuple[int, str]:
    """Run a command line that is to be refused: its exit code and the one line it said."""
    capsys.readouterr()
    try:
        code = cli.main([str(one) for one in arguments])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert code in (1, 2), captured
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("prunepath "), line
    assert len(line) < 400, line
    return code, line


def everything_below(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_no_option_takes_a_number_without_bounds():
    plain = {
        (command, option)
        for name in COMMANDS
        for command, option, action in options(name)
        if action.type in (int, float)
    }
    assert plain == CHECKED_LATER


@pytest.mark.parametrize("bad", ["-1", "nan", "inf", "x", "", HUGE])
@pytest.mark.parametrize(("command", "option"), NUMBERS, ids=lambda value: value.replace(" ", "-"))
def test_numbers_out_of_range(capsys, command, option, bad):
    if bad == HUGE and option in ("--seconds", "--temperature"):
        return  # a long time, and any temperature, are meant
    code, line = refused(capsys, *command.split(), f"{option}={bad}")
    assert code == 2
    assert option in line
    assert "expected" in line or "tau must be" in line


@pytest.mark.parametrize(("command", "option"), [n for n in NUMBERS if n[1] in ("--limit", "--max-tokens", "--layers")])
def test_none_of_something_is_refused(capsys, command, option):
    assert refused(capsys, *command.split(), option, "0")[0] == 2


@pytest.mark.parametrize("value", ["0", "1.5", "-0.1", "nan", "inf"])
def test_a_share_to_prune_is_between_0_and_1(capsys, tmp_path, value):
    line = ["prune", tmp_path, tmp_path / "new", "--method", "wanda", f"--sparsity={value}", "--text", "t.txt"]
    assert refused(capsys, *line)[0] == 2
    assert everything_below(tmp_path) == []


def no_work(*_: object, **__: object) -> None:
    raise AssertionError("work was begun")


WORK = {
    "convert": "prunepath_vllm.conversion.convert.neuron_orders",
    "quantize": "prunepath_vllm.conversion.quantize.new_directory",
    "eval": "prunepath_vllm.evaluation.runner.Run.__init__",
    "sweep": "prunepath_vllm.evaluation.runner.Run.__init__",
    "figures": "prunepath_vllm.evaluation.figures.save_figure",
    "prune": "prunepath_vllm.training.baselines.wanda.calibration_sequences",
    "train": "prunepath_vllm.training.run._train",
    "fetch": "prunepath_vllm.sources.packages.subprocess.run",
    "bench kernel": "prunepath_vllm.benchmarks.layer.require_gpu",
    "bench tune": "prunepath_vllm.benchmarks.layer.require_gpu",
    "bench latency": "prunepath_vllm.benchmarks.latency._run_engines",
    "bench serve": "prunepath_vllm.benchmarks.serve._measure",
}
"""Where each command's work begins."""

FILES = {
    "eval {ckpt} --task wikitext --data {text} --output": ".json",
    "eval {ckpt} --task wikitext,arc_easy --output": ".json",
    "eval {ckpt} --task wikitext --data {text} --plot": ".png",
    "sweep {ckpt} --max-loss 2% --text {text} --output": ".json",
    "sweep {ckpt} --max-loss 2% --text {text} --plot": ".svg",
    "figures fig3 L={text} --output": ".json",
    "figures fig2 L={ckpt} --text {text} --output": ".json",
    "figures fig9 L={text} --output": ".json",
    "bench kernel --output": ".json",
    "bench kernel --plot": ".png",
    "bench latency {ckpt} --output": ".json",
    "bench latency {ckpt} --lock": ".lock",
    "bench latency {ckpt} --dense {dense} --plot": ".png",
    "bench serve {ckpt} --output": ".json",
    "bench serve {ckpt} --dense {dense} --plot": ".png",
}
"""Command lines that end with a file to write, and its suffix."""

FOLDERS = (
    "prune {dense} {bad} --method wanda --sparsity .5 --text {text}",
    "prune {ckpt} {bad} --method static --sparsity .5 --text {text}",
    "train --config {recipe}",
    "fetch stories15M --to {bad}",
    "fetch wikitext-2 --to {bad}",
    "bench tune qwen2-7b --output {bad}",
)
"""Command lines with a folder to write into."""


@pytest.fixture
def line(tmp_path, monkeypatch, dense_checkpoint, prunepath_checkpoint):
    """``line(template, bad)``: the arguments; what would work is replaced by a failure."""
    inputs, place = tmp_path / "in", tmp_path / "place"
    inputs.mkdir(), place.mkdir()
    (inputs / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    known = dict(
        ckpt=prunepath_checkpoint("llama", default_tau=0.6), dense=dense_checkpoint("llama"), text=inputs / "text.txt"
    )

    def make(template: str, bad: Path) -> list[str]:
        command = next(name for name in WORK if template.startswith(name))
        monkeypatch.setattr(WORK[command], no_work)
        recipe = dict(
            output=str(bad),
            model=dict(path=str(known["ckpt"])),
            data=dict(train=[dict(path=str(known["text"]))]),
            schedule=dict(max_steps=1),
        )
        (inputs / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return template.format(**known, recipe=inputs / "recipe.yaml", bad=bad).split(" ")

    make.known = known
    return make


@pytest.mark.parametrize("kind", ["directory", "missing-parent", "parent-is-a-file", "read-only"])
@pytest.mark.parametrize("template", FILES)
def test_files_that_cannot_be_written(capsys, tmp_path, monkeypatch, line, template, kind):
    suffix = FILES[template]
    bad = tmp_path / "place" / f"out{suffix}"
    if kind == "directory":
        bad.mkdir()
        for task in ("wikitext", "arc_easy"):
            bad.with_stem(f"out-{task}").mkdir()
    elif kind == "missing-parent":
        bad = bad.parent / "none" / bad.name
    elif kind == "parent-is-a-file":
        (tmp_path / "place" / "file").touch()
        bad = bad.parent / "file" / bad.name
    else:  # tests may run as root, whom no mode stops
        monkeypatch.setattr(
            arguments.os, "access", lambda path, mode: tmp_path / "place" not in Path(path, "x").parents
        )
    argv = [*line(template, bad), bad]
    before = everything_below(tmp_path)
    code, said = refused(capsys, *argv)
    assert code == 2
    assert bad.stem in said
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "below-a-file", "read-only"])
@pytest.mark.parametrize("template", FOLDERS)
def test_folders_that_cannot_be_made(capsys, tmp_path, monkeypatch, line, template, kind):
    bad = tmp_path / "place" / "out"
    if kind == "read-only":
        monkeypatch.setattr(
            arguments.os, "access", lambda path, mode: tmp_path / "place" not in Path(path, "x").parents
        )
    else:
        bad.touch()
        bad = bad / "below" if kind == "below-a-file" else bad
    argv = line(template, bad)
    before = everything_below(tmp_path)
    code, said = refused(capsys, *argv)
    assert code == 2
    assert str(bad) in said
    assert everything_below(tmp_path) == before


MADE_FROM = {
    "convert {dense} {bad}": "dense",
    "convert {dense} {bad} --calibration-text {text}": "dense",
    "quantize {ckpt} {bad} --expert-dtype int8": "ckpt",
    "prune {ckpt} {bad} --method cold --max-tau .5 --text {text}": "ckpt",
    "prune {ckpt} {bad} --method static --sparsity .5 --text {text}": "ckpt",
    "prune {dense} {bad} --method wanda --sparsity .5 --text {text}": "dense",
    "train --config {recipe}": "ckpt",
}
"""Every command that makes a directory from another, and which that is."""


@pytest.mark.parametrize("spelling", ["the same", "in it", "in it, by a link", "around it"])
@pytest.mark.parametrize("template", MADE_FROM)
def test_a_directory_is_not_made_in_what_it_is_made_from(capsys, tmp_path, monkeypatch, line, template, spelling):
    for reader in ("quantize.validate_checkpoint", "convert.read_config", "cold.validate_checkpoint"):
        monkeypatch.setattr(f"prunepath_vllm.conversion.{reader}", no_work)
    source = tmp_path / "disk" / "model"
    shutil.copytree(line.known[MADE_FROM[template]], source)
    line.known[MADE_FROM[template]] = source
    (tmp_path / "link").symlink_to(source)
    bad, relation = {
        "the same": (tmp_path / "disk" / ".." / "disk" / "model", "is"),
        "in it": (source / "new", "lies in"),
        "in it, by a link": (tmp_path / "link" / "new", "lies in"),
        "around it": (source.parent, "holds"),
    }[spelling]
    if template.startswith("train"):  # what it makes is output/model; other things may be in output
        relation = "is" if spelling == "around it" else "lies in"
    argv = line(template, bad)
    before = everything_below(tmp_path)
    code, said = refused(capsys, *argv)
    assert code == 2
    assert f" {relation} {source}, which it would be made from" in said
    assert f": {bad}" in said
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("template", [one for one in FILES if one.endswith("--plot")])
def test_a_format_that_cannot_be_drawn(capsys, tmp_path, line, template):
    code, said = refused(capsys, *line(template, tmp_path), tmp_path / "plot.doc")
    assert code == 2
    assert "plot.doc: expected a file name that ends in one of" in said


@pytest.mark.parametrize(
    ("template", "package", "extra"),
    [
        *((f"{one} out{FILES[one]}", "matplotlib", "eval") for one in FILES if one.endswith("--plot")),
        ("figures fig3 L={text} --output out.json", "matplotlib", "eval"),
        ("train --config {recipe}", "accelerate", "train"),
        ("fetch SmolLM2-135M-Instruct --to {bad}", "gguf", "train"),
        ("fetch Qwen2.5-Coder-1.5B-Instruct --to {bad}", "gguf", "train"),
        ("fetch rte --to {bad}", "pyarrow", "train"),
    ],
)
def test_missing_packages_are_named_with_their_extra(capsys, tmp_path, monkeypatch, line, template, package, extra):
    argv = line(template, tmp_path / "place" / "out")
    before = everything_below(tmp_path)
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    code, said = refused(capsys, *argv)
    assert code == 2
    assert f"needs {package}, which is not installed; expected prunepath-vllm[{extra}]" in said
    assert [path for path, _ in everything_below(tmp_path) if "recipe" in path and "place" in path] == []
    assert {path for path, _ in everything_below(tmp_path)} - {path for path, _ in before} <= {
        str(tmp_path / "place/out")
    }


def test_a_generation_task_without_rouge_score(capsys, tmp_path, monkeypatch, prunepath_checkpoint):
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    line = ["eval", checkpoint, "--task", "xsum", "--data", tmp_path, "--backend", "transformers"]
    assert "needs rouge_score" in refused(capsys, *line)[1]


def test_a_training_that_is_refused_late_leaves_nothing(capsys, tmp_path, prunepath_checkpoint):
    output = tmp_path / "output"
    (tmp_path / "text.txt").write_text("too short")
    recipe = dict(
        output=str(output),
        model=dict(path=str(prunepath_checkpoint("llama", default_tau=0.6))),
        data=dict(train=[dict(path=str(tmp_path / "text.txt"))], sequence_length=64),
        schedule=dict(max_steps=1),
        runtime=dict(device="cpu"),
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "expected at least one sequence" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": int(HUGE)}, "seed"),
        ({"seed": -1}, "seed"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr"),
        ({"data": {"train": [{"path": "none.txt"}]}}, "none.txt"),
        ({"evaluation": {"data": "none.jsonl"}}, "none.jsonl"),
        ({"model": {"path": "x", "convert": {"text": "none.txt"}}}, "model.convert.text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recipes_that_cannot_work(capsys, tmp_path, monkeypatch, line, change, named):
    argv = line("train --config {recipe}", tmp_path / "place" / "out")
    recipe = yaml.safe_load(Path(argv[-1]).read_text()) | change
    Path(argv[-1]).write_text(yaml.safe_dump(recipe))
    code, said = refused(capsys, *argv)
    assert code == 2
    assert named in said
    assert not (tmp_path / "place" / "out").exists()


def test_a_policy_is_refused_in_this_packages_words(capsys, monkeypatch, prunepath_checkpoint):
    from vllm.engine.arg_utils import EngineArgs

    def run(args: argparse.Namespace) -> int:
        policy = {"prunepath": json.loads(args.engine_args[1])}
        EngineArgs(model=args.checkpoint, additional_config=policy).create_engine_config()
        return 0

    monkeypatch.setattr(serve_command, "run", run)
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    code = cli.main(["serve", str(checkpoint), "--policy", '{"default_tau": 3}'])
    said = capsys.readouterr().err.splitlines()
    assert code == 2
    assert said[-1] == ("prunepath serve: additional_config.prunepath.default_tau must be a number in (0, 1.05], got 3")


READERS = (
    "convert MODEL OUT",
    "calibrate MODEL --text TEXT",
    "calibrate MODEL --text TEXT --usage-at 0.5",
    "quantize MODEL OUT --expert-dtype int8",
    "inspect MODEL",
    "generate MODEL --prompt a",
    "serve MODEL",
    "train --config RECIPE",
    "train --config TEACHER",
    "prune MODEL OUT --method wanda --sparsity 0.5 --text TEXT",
    "prune MODEL OUT --method static --sparsity 0.5 --text TEXT",
    "prune MODEL OUT --method cold --max-tau 0.5 --text TEXT",
    "eval MODEL --task wikitext",
    "eval CHECKPOINT --task wikitext --dense MODEL",
    "sweep MODEL --text TEXT --max-loss 2% --no-speed",
    "sweep CHECKPOINT --text TEXT --max-loss 2% --no-speed --dense MODEL",
    "figures fig2 A=MODEL --text TEXT --output OUT.json",
    "bench kernel MODEL",
    "bench latency MODEL",
    "bench latency CHECKPOINT --dense MODEL",
    "bench serve MODEL",
    "bench serve CHECKPOINT --dense MODEL",
    "bench tune MODEL",
)
"""Every way to name a model or a checkpoint: MODEL."""


def training(model: str | Path, text: str | Path) -> dict:
    """A recipe of one step."""
    return dict(
        output="run",
        model=dict(path=str(model)),
        data=dict(train=[dict(path=str(text))], sequence_length=16),
        stages=[dict(losses={})],
        optimizer=dict(lr=1e-3),
        schedule=dict(max_steps=1),
        batch=dict(sequences=1),
        runtime=dict(device="cpu", bf16=False, tensorboard=False),
    )


def test_every_command_that_reads_a_model_is_listed():
    read_none = {"fetch", "check"}
    assert {line.split()[0] for line in READERS} == set(cli.COMMANDS) - read_none
    benchmarks = {line.split()[1] for line in READERS if line.startswith("bench ")}
    assert benchmarks == set(bench.BENCHMARKS)


@pytest.mark.parametrize(("there", "code", "named"), [(False, 2, ": no such"), (True, 1, "/config.json: no such file")])
@pytest.mark.parametrize("line", READERS)
def test_a_missing_model_is_wrong_use_and_a_folder_without_one_a_failure(
    line, there, code, named, prunepath_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "no" / "model"
    if there:
        model.mkdir(parents=True)
    Path("text.txt").write_text("words")
    checkpoint = str(prunepath_checkpoint("llama", default_tau=0.6))
    Path("recipe.yaml").write_text(yaml.safe_dump(training(model, "text.txt")))
    distilled = training(checkpoint, "text.txt") | dict(distillation=dict(teacher=str(model)))
    Path("teacher.yaml").write_text(yaml.safe_dump(distilled))
    before = sorted(tmp_path.rglob("*"))
    meant = dict(MODEL=model, TEXT="text.txt", OUT="out", RECIPE="recipe.yaml", CHECKPOINT=checkpoint)
    meant |= dict(TEACHER="teacher.yaml")
    words = re.sub("|".join(meant), lambda word: str(meant[word[0]]), line).split()
    assert cli.main(words) == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"prunepath {words[0]}: ")
    assert f"{model}{named}" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("line", ["eval MODEL --task wikitext", "train --config RECIPE", "train --config TEACHER"])
def test_pickles_are_never_read(line, dense_checkpoint, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = dense_checkpoint("llama")
    pickled = shutil.copytree(good, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    Path("recipe.yaml").write_text(yaml.safe_dump(training(pickled, text)))
    distilled = training(good, text) | dict(distillation=dict(teacher=str(pickled)))
    Path("teacher.yaml").write_text(yaml.safe_dump(distilled))
    meant = dict(MODEL=pickled, RECIPE="recipe.yaml", TEACHER="teacher.yaml")
    words = re.sub("|".join(meant), lambda word: str(meant[word[0]]), line).split()
    assert cli.main(words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert str(pickled) in said
    assert "model.safetensors" in said


def test_an_adapter_that_is_not_there_is_named_before_anything_is_made(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = training("dense", text)
    recipe["model"] |= dict(adapter="no/adapter.safetensors")
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert refused(capsys, "train", "--config", "recipe.yaml") == (
        2, "prunepath train: model.adapter: no/adapter.safetensors: no such file; expected an adapter"
    )  # fmt: skip
    assert not Path("run").exists()


def test_the_dtypes_that_help_tells_are_those_there_are():
    parser = argparse.ArgumentParser()
    add_expert_dtype(parser)
    assert parser._actions[-1].choices == EXPERT_DTYPES


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_serve_names_a_folder_that_is_not_there(capsys, name):
    assert cli.main(["serve", name]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"prunepath serve: {name}: no such directory, nor a Hugging Face model name (owner/name)"]


def test_a_refused_evaluation_leaves_no_journal(capsys, tmp_path, prunepath_checkpoint):
    checkpoint = prunepath_checkpoint("llama", default_tau=0.6)
    (tmp_path / "wiki.valid.raw").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    line = ["eval", checkpoint, "--task", "wikitext,arc_easy", "--backend", "transformers", "--context", "32"]
    shutil.copytree(tmp_path, tmp_path / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunepath_vllm.evaluation.runner.DATA_FOLDER", tmp_path / "folders")
        shutil.copytree(tmp_path / "data", tmp_path / "folders" / "wikitext-2")
        before = everything_below(tmp_path)
        code, _ = refused(capsys, *line, "--output", tmp_path / "out.json")
    assert code == 2
    assert everything_below(tmp_path) == before
