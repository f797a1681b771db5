"""What `prunepath eval` asks in multiple choice, against lm-evaluation-harness's own tasks over the same rows."""

import json
from pathlib import Path

import lm_eval.tasks
import pytest

from prunepath_vllm.evaluation.tasks import TASKS, Options

OWN = Path(lm_eval.tasks.__file__).parent
SPLITS = {"training_split": None, "validation_split": None, "test_split": "test"}
HELLASWAG = [
    {"activity_label": "Baking", "ctx_a": "[header] How to bake [title] A  man stirs.", "ctx_b": "he LOOKS up",
     "endings": ["[substeps] and  smiles. ", "sits [step] down.", "runs", "eats."], "label": str(i % 4)}
    for i in range(3)
]  # fmt: skip
ARC = [
    {"question": " Which is it? ", "choices": {"text": ["this", " that"], "label": ["1", "2"]}, "answerKey": "2"},
    {"question": "What?", "choices": {"text": ["a", "b", "c", "d", "e"], "label": list("ABCDE")}, "answerKey": "E"},
]
MMLU = [
    {"subject": "abstract_algebra", "question": f" Find {i}. ", "choices": ["0", " 1", "2\n", "x"], "answer": i % 4}
    for i in range(8)
]


@pytest.mark.parametrize(
    ("name", "own", "files", "shots"),
    [
        ("hellaswag", "hellaswag/hellaswag.yaml", {"valid": HELLASWAG}, 0),
        ("arc_easy", "arc/arc_easy.yaml", {"easy": ARC}, 0),
        ("arc_challenge", "arc/arc_challenge.yaml", {"challenge": ARC}, 0),
        ("mmlu", "mmlu/default/mmlu_abstract_algebra.yaml", {"test": MMLU[:3], "dev": MMLU[3:]}, 0),
        ("mmlu", "mmlu/default/mmlu_abstract_algebra.yaml", {"test": MMLU[:3], "dev": MMLU[3:]}, 5),
    ],
    ids=lambda value: value if isinstance(value, str | int) else "",
)
def test_prompts_choices_and_answers_are_lm_evals(name, own, files, shots, tmp_path, monkeypatch):
    for part, rows in files.items():
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, *dev = (str(tmp_path / f"{part}.jsonl") for part in files)
    data = {"data_files": {"test": first, **({"dev": dev[0]} if dev else {})}}
    config = dict(include=str(OWN / own), task="local", dataset_path="json", dataset_name=None, dataset_kwargs=data)
    (tmp_path / "local.yaml").write_text(json.dumps(config | SPLITS))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    task = lm_eval.tasks.get_task_dict(["local"], manager)["local"]
    task.set_config("num_fewshot", shots)
    task.build_all_requests(rank=0, world_size=1)
    asked = [(one.args, one.doc_id) for one in task.instances]

    items = TASKS[name].load(tmp_path, Options(shots=shots))
    ours = [((item.prompt, f" {choice}"), i) for i, item in enumerate(items) for choice in item.choices]
    assert ours == asked
    assert [item.answer for item in items] == [int(task.doc_to_target(doc)) for doc in task.eval_docs]
