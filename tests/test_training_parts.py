"""Recipes, schedules, data and the compiled training step."""

import gzip
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
import yaml
from tiny_models import FAMILY_NAMES, build_tokenizer
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prunepath_vllm.checkpoint import read_tensor_index, stream_tensors
from prunepath_vllm.errors import UsageError
from prunepath_vllm.modeling import register_auto_classes
from prunepath_vllm.training import data as training_data
from prunepath_vllm.training.data import load_training_data, save_tokens, tokenise_answers
from prunepath_vllm.training.low_rank import add_low_rank, merge_low_rank
from prunepath_vllm.training.model import TrainingModel, layers_of
from prunepath_vllm.training.recipe import Data, Recipe, Source, load_recipe, parse_recipe, recipe_table, save_recipe
from prunepath_vllm.training.run import train
from prunepath_vllm.training.schedule import Course

ROOT = Path(__file__).parent.parent
MINIMAL = dict(output="out", model=dict(path="m"), data=dict(train=[dict(path="t.txt")]), schedule=dict(max_steps=10))


def recipe_of(**changes) -> Recipe:
    return parse_recipe(MINIMAL | changes)


# Recipes


def test_overrides_reach_sections_lists_and_new_sections(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(MINIMAL))
    overrides = [
        "optimizer.lr=2e-5",
        "data.train.0.repeat=3",
        "model.convert.expert_size=16",
        "schedule.max_minutes=1.5",
    ]
    recipe = load_recipe(tmp_path / "r.yaml", overrides)
    assert recipe.optimizer.lr == 2e-5
    assert recipe.data.train[0].repeat == 3
    assert recipe.model.convert.expert_size == 16
    assert recipe.schedule.max_minutes == 1.5


def test_a_saved_recipe_is_the_same_recipe(tmp_path):
    recipe = recipe_of(stages=[dict(tau="path", losses=dict(entropy=3e-4))], distillation=dict(teacher="x"))
    assert load_recipe(save_recipe(recipe, tmp_path)) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", r"optimizer\.learning_rate: Extra inputs"),
        ("optimizer.lr=-1", r"optimizer\.lr: .*greater than 0, got -1"),
        ("stages=[]", r"stages: .*at least 1"),
        ("data.task=translation", r"data\.task: .*'causal'.*got 'translation'"),
        ("schedule={}", r"schedule: has no end; expected epochs, max_steps or max_minutes"),
        ("data.train.1.path=x", r"'1'; expected an item's number, 0 to 0"),
        ("output.x=1", r"output is 'out'; expected a section"),
        ("nonsense", r"expected key=value"),
        ("stages=[{tau_end: 1.0e-300}]", r"stages\.0\.tau_end: .*got 1e-300"),
        ("evaluation.taus=[0.5, 1.0e-300]", r"tau must be at least .*got 1e-300"),
        ("stages=[{selection: threshold, threshold: 1.0e-50}]", r"threshold is 1e-50; expected .* in float32 too"),
        ("stages=[{selection: threshold}]", r"stages\.0: threshold is null"),
    ],
)
def test_what_the_schema_refuses_is_named(tmp_path, override, message):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(UsageError, match=message):
        load_recipe(tmp_path / "r.yaml", [override])


def test_unreadable_recipes(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    for name, message in (("list", "expected a mapping"), ("broken", "readable YAML"), ("none", "readable YAML")):
        with pytest.raises(UsageError, match=message):
            load_recipe(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    load_recipe(path)


def test_the_documented_table_is_the_schema():
    assert recipe_table() in (ROOT / "docs" / "reference" / "recipe.md").read_text()


# Schedules


def course(stages=({},), max_steps=100, **schedule):
    recipe = recipe_of(stages=list(stages), schedule=dict(max_steps=max_steps) | schedule)
    return Course(recipe, recipe.schedule.max_steps)


def test_rate_rises_and_falls():
    cosine = course(warmup=0.1)
    rates = [cosine.rate(step) for step in range(101)]
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert course(warmup=0.0, decay="linear", final=0.1).rate(50) == pytest.approx(0.55)


def test_the_clock_drives_rate_stage_and_end():
    timed = course(stages=[{}, {}], max_steps=None, max_minutes=10, warmup=0.0, decay="linear")
    timed.elapsed = 450.0
    assert timed.progress(3) == pytest.approx(0.75)
    assert timed.rate(3) == pytest.approx(0.25)
    assert timed.stage(3) == 1
    timed.elapsed = 700.0
    assert timed.progress(4) == 1
    assert timed.rate(4) == 0


def test_stages_share_the_run_and_may_restart_the_rate():
    two = course(stages=[dict(share=1), dict(share=3, new_schedule=True)], warmup=0.0)
    assert [two.stage(step) for step in (0, 24, 25, 99)] == [0, 0, 1, 1]
    assert two.rate(24) < 0.02
    assert two.rate(25) == pytest.approx(1)
    assert two.stage_progress(62) == pytest.approx(37 / 75)


def test_the_sparsity_path_is_the_papers():
    """tau_t = 1 - (1 - tau_min) t / T, t = 1..T."""
    path = course(stages=[dict(tau="path", tau_end=0.5, rounds=5)])
    seen = [path.taus(step, 2, process=0, part=0) for step in range(100)]
    assert [taus[0] for taus in seen[::20]] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    assert seen[19] == seen[0]


def test_tau_draws_cover_the_range_and_repeat_themselves():
    draw = course(stages=[dict(tau="uniform", tau_end=0.2)])
    first = draw.taus(7, 8, process=0, part=0)
    assert first == draw.taus(7, 8, process=0, part=0)
    others = [
        draw.taus(8, 8, process=0, part=0),
        draw.taus(7, 8, process=1, part=0),
        draw.taus(7, 8, process=0, part=1),
    ]
    assert all(other != first for other in others)
    # One in each eighth of [0.2, 1].
    assert sorted(int((tau - 0.2) / 0.1) for tau in first) == list(range(8))
    assert first != sorted(first)


@pytest.mark.parametrize("sequences", [1, 4, 6])
def test_a_share_of_the_sequences_uses_every_expert(sequences):
    course = Course(recipe_of(stages=[dict(full=0.25, tau_start=0.9, tau_end=0.4)]), 400)
    drawn = [course.taus(step, sequences, process=0, part=0) for step in range(400)]
    full = [sum(tau >= 1 for tau in taus) for taus in drawn]
    assert sum(full) / (400 * sequences) == pytest.approx(0.25, abs=0.05)
    assert max(full) - min(full) <= 1
    rest = [tau for taus in drawn for tau in taus if tau < 1]
    assert 0.4 <= min(rest) < 0.42
    assert 0.88 < max(rest) <= 0.9
    if sequences > 1:
        assert len({taus.index(max(taus)) for taus in drawn}) == sequences  # not always the same places


# Data


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def packed(data: Data, tokenizer) -> tuple[np.ndarray, np.ndarray | None]:
    found = load_training_data(data, tokenizer, pad_to_length=False)
    return found.tokens, found.labels


def test_text_is_packed_whole(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(training_data, "BLOCK_CHARACTERS", 40)
    text = "".join(f"line {i} of the text\n" for i in range(50))
    with gzip.open(tmp_path / "t.txt.gz", "wt") as file:
        file.write(text)
    tokens, labels = packed(Data(train=[Source(path=str(tmp_path / "t.txt.gz"))], sequence_length=16), tokenizer)
    assert labels is None
    assert tokenizer.decode(tokens.flatten()) == text[: len(text) // 16 * 16]


def test_documents_end_with_eos_and_sources_repeat(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", [dict(text="abc"), dict(text="defgh")])
    tokens, _ = packed(Data(train=[Source(path=path, repeat=2)], sequence_length=5), tokenizer)
    assert tokenizer.decode(tokens[0]) == "abc</s>d"
    assert tokenizer.decode(tokens[1]) == "efgh</s>"
    assert tokens.tolist()[:2] == tokens.tolist()[2:]


def test_token_files_are_sources(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", [dict(text="some words"), dict(text="and others")])
    data = Data(train=[Source(path=path)], sequence_length=4)
    count = save_tokens(Source(path=path), tokenizer, tmp_path / "d.npy")
    assert count == 22
    stored = np.load(tmp_path / "d.npy")
    assert stored.dtype == np.uint16
    again = data.model_copy(update=dict(train=[Source(path=str(tmp_path / "d.npy"))]))
    assert np.array_equal(packed(data, tokenizer)[0], packed(again, tokenizer)[0])
    np.save(tmp_path / "bad.npy", np.array([1, 999]))
    with pytest.raises(UsageError, match=r"bad\.npy: ids 1 to 999; expected 0 to"):
        packed(data.model_copy(update=dict(train=[Source(path=str(tmp_path / "bad.npy"))])), tokenizer)


def test_columns_of_other_data_sets_become_text(tmp_path, tokenizer, monkeypatch):
    """The GLUE and XSum recipes' templates, on rows as `datasets` gives them."""
    import datasets

    rows = [dict(premise="a", hypothesis="b {x}", label=2, idx=0), dict(premise="c", hypothesis="d", label=0, idx=1)]
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source(path="nyu-mll/glue", config="mnli", split="validation_matched", text="{premise}")
    pair = source.model_copy(update=dict(text_pair="{hypothesis}"))
    assert training_data.read_labelled(pair)[0] == dict(text="a", label=2, text_pair="b {x}")
    assert asked == [(("nyu-mll/glue", "mnli"), dict(split="validation_matched"))]
    document = source.model_copy(update=dict(text="{premise}\nTL;DR: {hypothesis}"))
    tokens, _ = packed(Data(train=[document], sequence_length=12), tokenizer)
    assert tokenizer.decode(tokens[0]) == "a\nTL;DR: b {x}"[:12]
    with pytest.raises(UsageError, match=r"row 1: fields hypothesis, idx, label, premise; expected 'question'"):
        training_data.read_labelled(source.model_copy(update=dict(text="{question}")))


CHAT = dict(
    messages=[
        dict(role="user", content="why"),
        dict(role="assistant", content="because"),
        dict(role="user", content="and"),
        dict(role="assistant", content="so"),
    ]
)
TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_only_answers_are_learned(tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TURNS
    ids, learned = tokenise_answers(CHAT, tokenizer)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert tokenizer.decode(ids[learned]) == "because|so|"


def test_chat_labels_reach_the_batch(tmp_path, tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TURNS
    path = write(tmp_path / "c.jsonl", [CHAT] * 4)
    found = load_training_data(
        Data(task="chat", train=[Source(path=path)], sequence_length=53), tokenizer, pad_to_length=False
    )
    batch = found.collate([found[0], found[1]])
    flat, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    assert torch.equal(labels[labels >= 0], flat[labels >= 0])
    assert tokenizer.decode(labels[labels >= 0]) == "because|so|" * 2


def test_a_template_that_rewrites_turns_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + TURNS
    with pytest.raises(UsageError, match="rewrites earlier turns"):
        tokenise_answers(CHAT, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"title": "x"}\n', r"a\.jsonl, row 1: fields title; expected 'text'"),
        ("b.jsonl", '{"text": "x"}\n[1]\n', r"b\.jsonl, line 2: expected a JSON object"),
        ("c.csv", "text\nx\n", r"c\.csv: expected \.txt, \.jsonl"),
        ("d.txt", "", r"d\.txt: 0 tokens; expected at least one sequence of 8"),
    ],
)
def test_bad_data_is_named(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        packed(Data(train=[Source(path=str(tmp_path / name))], sequence_length=8), tokenizer)


# The compiled step


def one_step(checkpoint, family, *, compiled, rank=None, checkpointing=False, device="cpu", taus=(0.3, 0.5, 0.8, 1.0)):
    """(loss, gradient norms, graphs compiled) of a step with mixed taus, in bfloat16 autocast."""
    torch._dynamo.reset()
    register_auto_classes()
    auto = AutoModelForSequenceClassification if family == "roberta" else AutoModelForCausalLM
    model = auto.from_pretrained(checkpoint, dtype=torch.float32).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if rank:
        torch.manual_seed(0)
        add_low_rank(model, rank)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    training = TrainingModel(model).to(device)
    terms = dict(contribution=0.1, entropy=1e-3, balance=1e-3, efficiency=0.1, separation=1e-4)
    training.set_terms(terms, threshold=0.5)
    backend = CompileCounterWithBackend("aot_eager" if device == "cpu" else "inductor")
    if compiled:
        for layer in layers_of(model):
            layer.compile(fullgraph=True, dynamic=False, backend=backend)
    tokens = torch.randint(4, 300, (4, 32), generator=torch.Generator().manual_seed(5))
    tokens = tokens.to(device)
    labels = torch.tensor([0, 1, 2, 0], device=device) if family == "roberta" else tokens
    for _ in range(2):
        training.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            output = training(tokens, labels, tau=list(taus))
        output["loss"].backward()
    norms = torch.stack([p.grad.norm() for p in training.parameters() if p.grad is not None])
    return output["loss"].detach().cpu(), norms.cpu(), backend.frame_count


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *itertools.product(("llama", "gpt2", "roberta"), ({}, dict(rank=4), dict(checkpointing=True))),
        ("qwen2", dict(rank=4)),  # llama's layer, with biases beside what is of low rank
    ],
    ids=str,
)
def test_layers_compile_whole_and_once(prunepath_checkpoint, family, options):
    checkpoint = prunepath_checkpoint(family, dense_positions=1)
    loss, norms, _ = one_step(checkpoint, family, compiled=False, **options)
    compiled_loss, compiled_norms, graphs = one_step(checkpoint, family, compiled=True, **options)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(compiled_norms, norms, rtol=0.05, atol=1e-3)
    # All layers share one graph; the first has its own where nothing below it is trained.
    assert graphs == (2 if "rank" in options and family != "roberta" else 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dense_positions", [0, 1])
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_on_the_gpu_has_the_gradients_of_one_on_a_cpu(prunepath_checkpoint, gate, dense_positions, compiled):
    checkpoint = prunepath_checkpoint("llama", gate=gate, dense_positions=dense_positions)
    options = dict(taus=[1.05] * 4)  # every expert: near a threshold the two might choose others
    loss, norms, _ = one_step(checkpoint, "llama", compiled=False, **options)
    gpu_loss, gpu_norms, _ = one_step(checkpoint, "llama", compiled=compiled, device="cuda", **options)
    torch.testing.assert_close(gpu_loss, loss, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(gpu_norms, norms, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hidden_distance_is_that_of_the_layers_outputs(prunepath_checkpoint, dense_checkpoint, family, compiled):
    register_auto_classes()
    model = AutoModelForCausalLM.from_pretrained(prunepath_checkpoint(family), dtype=torch.float32).train()
    teacher = AutoModelForCausalLM.from_pretrained(dense_checkpoint(family), dtype=torch.float32).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens = torch.randint(4, 300, (2, 16), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    mask[1, 11:] = 0
    outputs = {model: [], teacher: []}
    hooks = []
    for part, kept in outputs.items():
        for layer in layers_of(part):
            hook = lambda _, args, output, kept=kept: kept.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
            hooks.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        model.eval()(tokens, attention_mask=mask, tau=0.4)
        teacher(tokens, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    ratios = [
        float((h[b, i] - t[b, i]).square().sum() / t[b, i].square().sum())
        for h, t in zip(outputs[model], outputs[teacher], strict=True)
        for b, i in mask.nonzero().tolist()
    ]

    training = TrainingModel(model, teacher=teacher.requires_grad_(False), teacher_share=1.0, hidden_weight=0.7)
    if compiled:
        for part in (model, teacher):
            for layer in layers_of(part):
                layer.compile(fullgraph=True, dynamic=False, backend="eager")
    calls = [layer._compiled_call_impl for layer in layers_of(model)]
    evaluated = training.eval()(tokens, tokens, mask, tau=0.4)
    assert "hidden" not in evaluated
    trained = training.train()(tokens, tokens, mask, tau=0.4)
    assert float(trained["hidden"]) == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert float(trained["loss"].detach() - trained["task"]) == pytest.approx(0.7 * float(trained["hidden"]), rel=1e-4)
    trained["loss"].backward()
    assert all(layer._compiled_call_impl is call for layer, call in zip(layers_of(model), calls, strict=True))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_low_rank_changes_nothing_at_first_and_merges_exactly(prunepath_checkpoint, family):
    register_auto_classes()
    auto = AutoModelForSequenceClassification if family == "roberta" else AutoModelForCausalLM
    model = auto.from_pretrained(prunepath_checkpoint(family), dtype=torch.float32).eval()
    names = set(model.state_dict())
    tokens = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        before = model(tokens, tau=0.6).logits
        replaced = add_low_rank(model, 3)
        torch.testing.assert_close(model(tokens, tau=0.6).logits, before)
        for module in replaced.values():
            module.up.copy_(torch.randn(module.up.shape) * 0.05)
        changed = model(tokens, tau=1.0).logits
        merge_low_rank(model.base_model)
        torch.testing.assert_close(model(tokens, tau=1.0).logits, changed)
    assert (changed - before).abs().max() > 1e-2
    assert set(model.state_dict()) == names


# Several processes


def test_two_processes_train_as_one_does(tmp_path, dense_checkpoint):
    """Two processes a batch each, or one process two batches a step: the same sequences, the same model."""
    (tmp_path / "t.txt").write_text((ROOT / "docs" / "architecture.md").read_text())
    content = dict(
        model=dict(path=str(dense_checkpoint("llama")), convert=dict(router="random", expert_size=16)),
        data=dict(train=[dict(path=str(tmp_path / "t.txt"))], sequence_length=32),
        # The second stage gives the routers no gradient.
        stages=[dict(tau="fixed", tau_start=0.7, losses=dict(contribution=0.1)), dict(tau="fixed", tau_start=0.6)],
        optimizer=dict(lr=1e-3),
        schedule=dict(max_steps=6),
        runtime=dict(bf16=False, log_steps=1, save_steps=6, tensorboard=False),
    )
    if torch.cuda.is_available():
        content["runtime"]["device"] = "cpu"
    alone, together = (
        content | dict(output=str(tmp_path / name), batch=dict(sequences=2, accumulation=accumulation))
        for name, accumulation in (("alone", 2), ("together", 1))
    )
    train(parse_recipe(alone))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(together))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "prunepath_vllm.entrypoints.cli", "train", "--config", str(tmp_path / "r.yaml")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # as most that is started so
    done = warm.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = []
    for name in ("alone", "together"):
        path = tmp_path / name / "model"
        results.append(dict(stream_tensors(path, read_tensor_index(path))))
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert sum("loss" in row for row in rows) == 6  # one process reports
    for name, tensor in results[0].items():
        torch.testing.assert_close(
            results[1][name], tensor, rtol=1e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
