"""Whole trainings on tiny models and real prose: two stages, resume, kills, divergence, LTE, classes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_dense
from training_runs import LENGTH, assert_same, logs, tensors
from transformers import AutoModelForCausalLM, Trainer

from prunepath_vllm.checkpoint import read_config, validate_checkpoint
from prunepath_vllm.errors import ConfigError, TrainingError, UsageError
from prunepath_vllm.modeling import register_auto_classes
from prunepath_vllm.training import run
from prunepath_vllm.training.adapter import merge_adapter
from prunepath_vllm.training.recipe import load_recipe
from prunepath_vllm.training.run import train
from prunepath_vllm.training.trainer import PrunePathTrainer


def test_the_papers_two_stages_lower_loss_and_end_sparse(recipe, texts):
    terms = dict(entropy=3e-4, balance=1e-3, gate=1e-4)
    stages = [
        dict(name="warm-up", tau="fixed", tau_start=1.05, losses=terms),
        dict(name="path", tau="path", tau_end=0.5, rounds=4, losses=terms),
    ]
    plan = recipe(
        stages=stages,
        schedule=dict(max_steps=40),
        model=dict(convert=dict(router="zero", gate="sigmoid", expert_size=16, dense_positions=0)),
        runtime=dict(tensorboard=True, log_steps=5, save_steps=20),
        evaluation=dict(data=str(texts[1]), max_tokens=1024, points=2, point_tokens=256, taus=[1.0, 0.5]),
    )
    result = train(plan)
    output = Path(plan.output)

    losses, sparsity = logs(output, "task_loss"), logs(output, "ffn_sparsity")
    assert losses[-1] < losses[0] - 1
    assert max(sparsity[:4]) == 0  # 20 steps of warm-up
    assert sparsity[-1] > 0.3
    assert {"entropy_loss", "balance_loss", "gate_loss"} <= json.loads(
        (output / "log.jsonl").read_text().splitlines()[0]
    ).keys()
    assert len(logs(output, "quality")) == 2

    summary = validate_checkpoint(result, check_values=True)
    quality = json.loads((result / "quality.json").read_text())["points"]
    assert [point["tau"] for point in quality] == [tau for tau, _ in summary.prunepath.tau_curve]
    assert quality[-1]["ffn_sparsity"] == 0
    assert quality[0]["ffn_sparsity"] > 0.5
    assert f"{quality[-1]['perplexity']:.4g}" in (result / "README.md").read_text()
    assert load_recipe(result / "recipe.yaml") == plan
    assert list((output / "tensorboard").glob("events*"))
    assert [path.name for path in output.glob("checkpoint-*")]
    assert not list(output.glob(".*"))

    register_auto_classes()
    model = AutoModelForCausalLM.from_pretrained(result).eval()
    tokens = torch.randint(4, 300, (1, 8))
    assert model(tokens, tau=0.5).logits.isfinite().all()


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("rank", [None, 4])
def test_resume_is_bitwise(recipe, monkeypatch, rank):
    """GPT-2 has dropout, so the random state matters; a step takes two batches; tau is drawn per sequence."""
    options = dict(family="gpt2", batch=dict(sequences=2, accumulation=2), runtime=dict(save_steps=4, keep=9))
    plan = recipe(**options, model=dict(rank=rank))
    whole = train(plan)
    straight = tensors(whole)
    states = {path.name: load_file(next(path.glob("*.safetensors"))) for path in Path(plan.output).glob("checkpoint-*")}
    log = logs(plan.output, "task_loss")
    shutil.rmtree(plan.output)

    step = PrunePathTrainer.training_step

    def die(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PrunePathTrainer, "training_step", die)
    with pytest.raises(Killed):
        train(plan)
    monkeypatch.undo()
    assert sorted(path.name for path in Path(plan.output).glob("checkpoint-*")) == ["checkpoint-4"]
    assert_same(tensors(train(plan, resume=True)), straight)
    for name in ("checkpoint-8", "checkpoint-12"):
        assert_same(load_file(next((Path(plan.output) / name).glob("*.safetensors"))), states[name])
    assert logs(plan.output, "task_loss")[-1] == log[-1]


def test_killed_while_saving_leaves_whole_checkpoints(recipe, monkeypatch):
    plan = recipe(runtime=dict(save_steps=4))
    for place in ("_save_optimizer_and_scheduler", "_save_rng_state"):
        shutil.rmtree(plan.output, ignore_errors=True)
        save = getattr(Trainer, place)

        def die(self, directory, save=save):
            if self.state.global_step == 8:
                raise Killed
            save(self, directory)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, place, die)
            with pytest.raises(Killed):
                train(plan)
        found = list(Path(plan.output).glob("checkpoint-*"))
        assert [path.name for path in found] == ["checkpoint-4"]
        validate_checkpoint(found[0], check_values=True)
    result = train(plan, resume=True)
    validate_checkpoint(result, check_values=True)
    names = sorted(path.name for path in Path(plan.output).glob("checkpoint-*"))
    assert names == ["checkpoint-12", "checkpoint-8"]  # as many as `keep`


@pytest.mark.parametrize("lr", [30.0, 1e25])
def test_divergence_stops_the_run(recipe, lr):
    plan = recipe(optimizer=dict(lr=lr, max_grad_norm=1e9), schedule=dict(max_steps=60, warmup=0))
    with pytest.raises(TrainingError, match=r"diverged: loss is \S+ at step \d+.*optimizer\.lr"):
        train(plan)
    assert not (Path(plan.output) / "model").exists()


def test_the_clock_ends_a_run_annealed(recipe):
    plan = recipe(schedule=dict(max_steps=None, max_minutes=0.08), runtime=dict(log_steps=1))
    train(plan)
    rates = logs(plan.output, "learning_rate")
    assert rates[-1] < 0.1 * max(rates)
    assert logs(plan.output, "progress")[-1] == 1
    assert logs(plan.output, "minutes")[-1] < 0.13


def test_lte_ends_with_threshold_selection(recipe, texts):
    stages = [
        dict(name="soft", tau="fixed", tau_start=1.05, gate="sigmoid", threshold=0.5)
        | dict(losses=dict(efficiency=0.5, separation=0.01)),
        dict(name="hard", tau="fixed", tau_start=0.5, gate="none", selection="threshold", threshold=0.5)
        | dict(train_routers=False, new_schedule=True),
    ]
    plan = recipe(
        stages=stages,
        model=dict(convert=dict(router="random", expert_size=16)),
        optimizer=dict(router_lr=3e-2),
        schedule=dict(max_steps=24),
        runtime=dict(save_steps=12),
        evaluation=dict(data=str(texts[1]), max_tokens=512),
    )
    result = train(plan)
    block = validate_checkpoint(result).prunepath
    assert (block.selection, block.threshold, block.gate, block.tau_curve) == ("threshold", 0.5, "none", None)
    sparse, dense = json.loads((result / "quality.json").read_text())["points"]
    assert 0 < sparse["ffn_sparsity"] < 1
    assert dense["ffn_sparsity"] == 0
    assert logs(plan.output, "ffn_sparsity")[0] == 0  # the soft stage uses every expert
    routers = [
        {n: t for n, t in tensors(path).items() if ".router." in n}
        for path in (result, Path(plan.output) / "checkpoint-12")
    ]
    assert_same(*routers)  # frozen from the middle on


def test_plain_fine_tuning_of_the_dense_model(recipe, texts):
    plan = recipe(model=dict(convert=None), stages=[{}], evaluation=dict(data=str(texts[1]), max_tokens=512))
    result = train(plan)
    assert read_config(result)["model_type"] == "llama"
    assert logs(plan.output)[-1] < logs(plan.output)[0] - 0.5
    (point,) = json.loads((result / "quality.json").read_text())["points"]
    assert point["tau"] is None
    assert point["perplexity"] > 1


def test_distillation_takes_part_in_the_target(recipe, dense_checkpoint):
    """With the dense model as teacher and nothing else to learn, the loss starts at that model's own entropy."""
    plan = recipe(
        distillation=dict(teacher=str(dense_checkpoint("llama")), share=1.0),
        stages=[dict(tau="fixed", tau_start=1.0)],
        schedule=dict(max_steps=1),
        runtime=dict(log_steps=1),
        data=dict(max_tokens=4 * LENGTH),
    )
    train(plan)
    model = AutoModelForCausalLM.from_pretrained(dense_checkpoint("llama")).eval()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense_checkpoint("llama"))
    text = Path(plan.data.train[0].path).read_text()[: 4 * LENGTH]
    tokens = torch.tensor(tokenizer(text)["input_ids"][: 4 * LENGTH]).view(4, LENGTH)
    with torch.no_grad():
        p = model(tokens).logits[:, :-1].softmax(-1)
    assert logs(plan.output, "task_loss")[0] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-3)


def test_hidden_distillation_lowers_the_distance_to_a_teacher_of_the_same_shape(recipe, dense_checkpoint, tmp_path):
    teacher = dense_checkpoint("llama")
    plan = recipe(
        distillation=dict(teacher=str(teacher), share=1.0, hidden=10.0),
        stages=[dict(tau="fixed", tau_start=0.5, losses=dict(contribution=0.1))],
        schedule=dict(max_steps=24),
    )
    train(plan)
    distances = logs(plan.output, "hidden_loss")
    assert distances[-1] < 0.95 * distances[0]
    other = save_dense("llama", tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"distillation\.hidden: .* has 2 layers of width \d+; expected 3 of"):
        train(recipe(distillation=dict(teacher=str(other), hidden=1.0), output=str(tmp_path / "second")))


def test_classification_learns(recipe, tmp_path):
    words = [("good", "fine", "great"), ("bad", "poor", "awful")]
    rows = [dict(text=f"a {words[label][i % 3]} film, number {i}", label=label) for i in range(120) for label in (0, 1)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:200]))
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[200:]))
    plan = recipe(
        family="roberta",
        model=dict(labels=2, convert=dict(router="zero", expert_size=16)),
        data=dict(task="classification", train=[dict(path=str(tmp_path / "train.jsonl"))]),
        optimizer=dict(lr=1e-3),
        schedule=dict(max_steps=None, epochs=4),
        batch=dict(sequences=10),
        evaluation=dict(data=str(tmp_path / "valid.jsonl")),
    )
    result = train(plan)
    points = json.loads((result / "quality.json").read_text())["points"]
    assert points[-1]["accuracy"] > 0.9
    assert points[-1]["perplexity"] is None
    assert "accuracy" in (result / "README.md").read_text()
    assert tensors(result)["classifier.out_proj.weight"].shape[0] == 2


def test_another_runs_directory_is_refused(recipe):
    plan = recipe(schedule=dict(max_steps=1))
    train(plan)
    with pytest.raises(UsageError, match="holds another run"):
        train(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data=dict(max_tokens=2 * LENGTH)), r"2 sequences; expected at least 4"),
        (dict(data=dict(train=[dict(path="missing.txt")])), r"data missing\.txt"),
        (dict(data=dict(task="classification")), r"data\.task: 'classification'"),
        (dict(model=dict(convert=dict(router="calibrated"))), r"model\.convert\.text: null"),
        (dict(data=dict(sequence_length=513)), r"data\.sequence_length: 513; expected at most 512"),
        (dict(family="gpt2", data=dict(sequence_length=513)), r"data\.sequence_length: 513; expected at most 512"),
        (
            dict(model=dict(rank=2, convert=dict(router="zero", gate="sigmoid"))),
            r"neurons .* lacks; .* gate 'none'",
        ),
    ],
)
def test_what_does_not_fit_is_named(recipe, changes, message, monkeypatch):
    monkeypatch.setattr(PrunePathTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(UsageError, match=message):
        train(recipe(**changes))


def test_held_out_data_is_read_before_the_training(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(PrunePathTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    (tmp_path / "short.txt").write_text("a b c")
    with pytest.raises(UsageError, match=r"short\.txt: 5 tokens; expected at least 64"):
        train(recipe(evaluation=dict(data=str(tmp_path / "short.txt"))))


@pytest.mark.parametrize("label", [2, -1, 0.5, "good", "2", None])
@pytest.mark.parametrize("held_out", [False, True])
def test_labels_are_classes(recipe, tmp_path, monkeypatch, label, held_out):
    monkeypatch.setattr(PrunePathTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    for name, last in (("right", 0), ("wrong", label)):
        rows = [dict(text="a film", label=one) for one in (0, 1, 1, 0, last)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_on, valid = ("right", "wrong") if held_out else ("wrong", "right")
    plan = recipe(
        family="roberta",
        model=dict(labels=2, convert=dict(router="zero", split="random", expert_size=16)),
        data=dict(task="classification", train=[dict(path=str(tmp_path / f"{train_on}.jsonl"))]),
        evaluation=dict(data=str(tmp_path / f"{valid}.jsonl")),
        stages=[{}],
    )
    with pytest.raises(UsageError, match=r"wrong\.jsonl, row 5: label .*; expected a whole number from 0 to 1"):
        train(plan)


def test_a_local_model_that_conversion_turns_into_one_of_ours_is_taken(recipe, tmp_path, monkeypatch):
    """An encoder with another head than the classifier's, which is made anew."""
    monkeypatch.setattr(PrunePathTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    masked = save_dense("roberta", tmp_path / "masked")
    config = json.loads((masked / "config.json").read_text())
    (masked / "config.json").write_text(json.dumps(config | dict(architectures=["RobertaForMaskedLM"])))
    (tmp_path / "rows.jsonl").write_text('{"text": "a film", "label": 0}\n' * 8)
    plan = recipe(
        family="roberta",
        model=dict(path=str(masked), labels=3, convert=dict(router="zero", split="random", expert_size=16)),
        data=dict(task="classification", train=[dict(path=str(tmp_path / "rows.jsonl"))], sequence_length=1024),
        stages=[{}],
    )
    with pytest.raises(pytest.fail.Exception, match="training began"):
        train(plan)


def test_after_a_failed_conversion_another_may_be_asked_for(recipe, tmp_path, monkeypatch):
    """What was made before it, a dense model, is still the recipe's."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a film", "label": 0}\n' * 8)
    data = dict(task="classification", train=[dict(path=str(tmp_path / "rows.jsonl"))])
    for size, error in ((7, "expert_size|expert size"), (16, "training began")):
        monkeypatch.setattr(PrunePathTrainer, "train", lambda *_, **__: pytest.fail("training began"))
        convert = dict(router="zero", split="random", expert_size=size)
        plan = recipe(family="roberta", model=dict(labels=3, convert=convert), data=data, stages=[{}])
        with pytest.raises((ConfigError, UsageError, pytest.fail.Exception), match=error):
            train(plan)


def test_a_starting_model_of_another_recipe_is_not_taken(recipe):
    convert = dict(router="zero", split="random", expert_size=16)
    with pytest.raises(UsageError, match="2 sequences"):
        train(recipe(model=dict(convert=convert), data=dict(max_tokens=2 * LENGTH), stages=[{}]))
    with pytest.raises(UsageError, match=r"a starting model is there of model\.convert\.expert_size 16, .* says 32"):
        train(recipe(model=dict(convert=convert | dict(expert_size=32)), stages=[{}]))
    plan = recipe(model=dict(convert=convert), stages=[{}], schedule=dict(max_steps=2), runtime=dict(save_steps=1))
    train(plan)
    longer = plan.model_copy(update=dict(schedule=plan.schedule.model_copy(update=dict(max_steps=3))))
    train(longer, resume=True)
    assert logs(plan.output, "step")[-1] == 3
    other = plan.model_copy(update=dict(optimizer=plan.optimizer.model_copy(update=dict(lr=1e-5))))
    with pytest.raises(UsageError, match=r"its training goes on with optimizer\.lr 0\.002, and the recipe says 1e-05"):
        train(other, resume=True)


def test_a_teacher_of_other_tokens_is_refused(recipe, dense_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(PrunePathTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    convert = dict(router="zero", split="random", expert_size=16)
    larger = save_dense("llama", tmp_path / "larger", vocab_size=400)
    other = tmp_path / "other"
    shutil.copytree(dense_checkpoint("llama"), other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    for teacher, message in ((larger, "predicts 400 tokens; expected 320"), (other, "has token '[ab]' as")):
        plan = recipe(model=dict(convert=convert), distillation=dict(teacher=str(teacher)), stages=[{}])
        with pytest.raises(UsageError, match=rf"distillation\.teacher: .* {message}"):
            train(plan)


def test_a_measurement_that_fails_loses_nothing(recipe, texts, dense_checkpoint, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run, "measure", fail)
    plan = recipe(model=dict(rank=2), schedule=dict(max_steps=2), evaluation=dict(data=str(texts[1]), max_tokens=256))
    with pytest.raises(RuntimeError, match="out of memory"):
        train(plan)
    output = Path(plan.output)
    validate_checkpoint(output / "model", check_values=True)
    assert (output / "model" / "README.md").exists()
    merged = merge_adapter(dense_checkpoint("llama"), output / "adapter.safetensors", tmp_path / "merged")
    assert_same(tensors(merged), tensors(output / "model"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("rank", [None, 4])
def test_a_compiled_training_on_the_gpu_ends_with_a_measured_checkpoint(recipe, texts, rank):
    plan = recipe(
        model=dict(rank=rank),
        runtime=dict(device="auto", bf16=True),
        evaluation=dict(data=str(texts[1]), max_tokens=512, points=1, point_tokens=256),
    )
    result = train(plan)
    assert validate_checkpoint(result, check_values=True).prunepath.tau_curve
    assert json.loads((result / "quality.json").read_text())["points"][-1]["ffn_sparsity"] == 0
