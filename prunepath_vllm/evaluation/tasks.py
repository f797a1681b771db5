"""The evaluation tasks: what each asks a model, and how an answer counts.

Multiple choice is scored as lm-evaluation-harness 0.4 does: the choice of highest log-likelihood after the prompt
(accuracy), or of highest log-likelihood per character (accuracy_norm).
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from prunepath_vllm.errors import UsageError
from prunepath_vllm.evaluation.rows import (
    AnyRow,
    ArcRow,
    HellaSwagRow,
    LabelledRow,
    MmluRow,
    TargetsRow,
    read_rows,
)
from prunepath_vllm.tau import shown

WIKITEXT_FILES = ("wiki.valid.raw", "valid.raw.gz", "valid.txt")
"""Names under which WikiText-2's raw validation split is distributed."""
MMLU_SHOTS = 5


@dataclass(frozen=True)
class Options:
    """What the user chose about a task's items."""

    shots: int = MMLU_SHOTS
    """Solved examples before an MMLU question."""
    max_tokens: int = 8192
    """Of a perplexity task's text."""
    context: int | None = None
    """Tokens per sequence of it."""


@dataclass(frozen=True)
class Request:
    """Token ids a causal model reads, and those it is scored on or that are shown as its answer."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Item:
    """One item of a task, not yet in tokens."""

    prompt: str = ""
    text_pair: str | None = None
    choices: tuple[str, ...] = ()
    """Multiple choice: as scored, without the space before them. Generation: the references. Recall: the number."""
    answer: int = 0
    """Index into the choices, or the class."""
    ending: str = ""
    """Generation: the end of the prompt, kept whole where the rest is cut."""
    tokens: tuple[int, ...] = ()
    """Perplexity: a sequence. Recall: the prompt."""


@dataclass(frozen=True)
class Task:
    """A row of the registry."""

    kind: str
    """perplexity, choice, classification, generation or recall."""
    corpus: str
    """Its folder, as ``prunepath fetch`` names it."""
    metrics: tuple[str, ...]
    """Keys of statistics.METRICS, the one that is plotted and swept first."""
    load: Callable[[Path, Options], list[Item]] | None = None
    """Items of a folder or file; perplexity and recall read a text."""
    labels: int = 0
    new_tokens: int = 0

    @property
    def causal(self) -> bool:
        """Whether it is asked of a language model, not of a classifier."""
        return self.kind != "classification"


def data_file(data: Path, names: Sequence[str]) -> Path:
    """`data` itself where it is no directory, else the first of `names` in it.

    Raises:
        UsageError: none is there.
    """
    if not data.is_dir():
        return data
    for name in names:
        if (data / name).is_file():
            return data / name
    raise UsageError(f"--data {data}: expected one of {', '.join(names)} in that directory")


def _read(data: Path, layout: type[AnyRow], *names: str) -> list[AnyRow]:
    return read_rows(data_file(data, names), layout)


def _load_mmlu(data: Path, options: Options) -> list[Item]:
    examples: dict[str, list[str]] = {}
    if options.shots:
        if not data.is_dir():
            raise UsageError(f"--data {data}: expected a directory with test.jsonl and dev.jsonl, or --shots 0")
        for row in _read(data, MmluRow, "dev.jsonl"):
            examples.setdefault(row.subject, []).append(f"{_mmlu_question(row)} {'ABCD'[row.answer]}\n\n")
    items = []
    for row in _read(data, MmluRow, "test.jsonl"):
        shown = examples.get(row.subject, [])[: options.shots]
        if len(shown) < options.shots:
            raise UsageError(f"--shots {options.shots}: {len(shown)} examples of {row.subject} in {data}/dev.jsonl")
        subject = row.subject.replace("_", " ")
        intro = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        items.append(Item(intro + "".join(shown) + _mmlu_question(row), choices=tuple("ABCD"), answer=row.answer))
    return items


def _mmlu_question(row: MmluRow) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row.choices, strict=True))
    return f"{row.question.strip()}\n{choices}\nAnswer:"


def _load_hellaswag(data: Path, options: Options) -> list[Item]:
    return [
        Item(
            _clean(f"{row.activity_label}: {row.ctx_a} {row.ctx_b.capitalize()}"),
            choices=tuple(_clean(ending) for ending in row.endings),
            answer=int(row.label),
        )
        for row in _read(data, HellaSwagRow, "valid.jsonl")
    ]


def _clean(text: str) -> str:
    """Without the brackets that WikiHow's pages left in HellaSwag."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _load_arc(name: str) -> Callable[[Path, Options], list[Item]]:
    def load(data: Path, options: Options) -> list[Item]:
        return [
            Item(
                f"Question: {row.question}\nAnswer:",
                choices=tuple(row.choices.text),
                answer=row.choices.label.index(row.answerKey),
            )
            for row in _read(data, ArcRow, f"{name}.jsonl")
        ]

    return load


def _load_labelled(data: Path, options: Options) -> list[Item]:
    return [
        Item(row.text, text_pair=row.text_pair, answer=row.label) for row in _read(data, LabelledRow, "valid.jsonl")
    ]


def _load_targets(ending: str) -> Callable[[Path, Options], list[Item]]:
    def load(data: Path, options: Options) -> list[Item]:
        rows = _read(data, TargetsRow, "test.jsonl")
        return [Item(row.input, choices=tuple(row.targets), ending=ending) for row in rows]

    return load


def _classes(corpus: str, labels: int, *more: str) -> Task:
    return Task("classification", corpus, ("accuracy", *more), _load_labelled, labels=labels)


TASKS: dict[str, Task] = {
    "wikitext": Task("perplexity", "wikitext-2", ("perplexity",)),
    "needle": Task("recall", "wikitext-2", ("recall",), new_tokens=12),
    "mmlu": Task("choice", "mmlu", ("accuracy",), _load_mmlu),
    "hellaswag": Task("choice", "hellaswag", ("accuracy_norm", "accuracy"), _load_hellaswag),
    "arc_easy": Task("choice", "arc", ("accuracy", "accuracy_norm"), _load_arc("easy")),
    "arc_challenge": Task("choice", "arc", ("accuracy_norm", "accuracy"), _load_arc("challenge")),
    "sst2": _classes("sst-2", 2),
    "mrpc": _classes("mrpc", 2, "f1"),
    "rte": _classes("rte", 2),
    "qnli": _classes("qnli", 2),
    "mnli": _classes("mnli", 3),
    "xsum": Task("generation", "xsum", ("rouge_l",), _load_targets("\nSummary:"), new_tokens=64),
    "e2e": Task("generation", "e2e", ("rouge_l",), _load_targets("\nDescription:"), new_tokens=64),
}
"""Every task by name."""


def choice_requests(items: Sequence[Item], tokenizer: Any, max_length: int) -> list[Request]:
    """One request per choice: prompt and " choice", tokenised together, cut from the left to `max_length` tokens.

    Of a choice that alone is longer, the first token left is what the others follow.

    Raises:
        UsageError: a choice has no tokens: it would be the likeliest of all.
    """
    # Spaces at the end of the prompt belong to the choice, so that words are tokenised as words.
    contexts = tokenizer([item.prompt.rstrip() for item in items])["input_ids"]
    wholes = iter(tokenizer([f"{item.prompt} {choice}" for item in items for choice in item.choices])["input_ids"])
    requests = []
    for item, context in zip(items, contexts, strict=True):
        for choice, whole in zip(item.choices, islice(wholes, len(item.choices)), strict=True):
            cut = max(0, len(whole) - max_length)
            start = max(len(context), cut + 1)
            if start >= len(whole):
                prompt = shown(item.prompt[-40:])
                raise UsageError(
                    f"choice {shown(choice)} after {prompt}: no tokens to predict; expected some in every choice"
                )
            requests.append(Request(whole[cut:start], whole[start:]))
    return requests


def classification_ids(item: Item, tokenizer: Any, max_length: int) -> list[int]:
    """Token ids of a text or a pair of texts, cut to `max_length`, the longer text first."""
    return tokenizer(item.prompt, item.text_pair, truncation=True, max_length=max_length)["input_ids"]


def generation_prompt(item: Item, tokenizer: Any, max_length: int) -> list[int]:
    """Token ids of the input, cut at its end to leave room, and of the prompt's ending."""
    ending = tokenizer(item.ending, add_special_tokens=False)["input_ids"]
    return [*tokenizer(item.prompt)["input_ids"][: max_length - len(ending)], *ending]


NEEDLE = " The special magic number of the {} is {}."
QUESTION = "\n\nWhat is the special magic number of the {} in the text above? The special magic number of the {} is"
THINGS = ("lighthouse", "orchard", "violin", "glacier", "harbour", "compass", "meadow", "lantern", "canyon", "teapot")


def needle_items(sequences: Sequence[Sequence[int]], tokenizer: Any, new_tokens: int) -> list[Item]:
    """A number to be found again in a long text, as in RULER's niah_single (arXiv 2404.06654).

    Args:
        sequences: a text's tokens; each becomes an item of as many, the answer's `new_tokens` included.
        tokenizer: theirs.
        new_tokens: room for the answer.

    Returns:
        items whose depths go evenly from the text's beginning to its end, in an order that mixes them.

    Raises:
        UsageError: the sequences are too short to hide anything in.
    """
    numbers = random.Random(0)
    items = []
    for i, sequence in enumerate(sequences):
        thing, number = THINGS[i % len(THINGS)], str(numbers.randrange(10**6, 10**7))
        needle, question = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (NEEDLE.format(thing, number), QUESTION.format(thing, thing))
        )
        room = len(sequence) - len(needle) - len(question) - new_tokens
        if room < 2:
            raise UsageError(f"--context {len(sequence)}: expected at least {len(sequence) - room + 2} for needle")
        text = list(sequence[:room])
        # Steps of the golden ratio: any first few items have depths far apart.
        at = 1 + round((len(text) - 1) * (i * 0.618034 % 1))
        items.append(Item(tokens=(*text[:at], *needle, *text[at:], *question), choices=(number,)))
    return items


def score_choices(item: Item, logprobs: Sequence[float]) -> dict[str, float]:
    """Statistics of a multiple-choice answer; ties go to the first choice."""
    per_character = [logprob / max(1, len(choice)) for logprob, choice in zip(logprobs, item.choices, strict=True)]
    return {
        "accuracy": float(max(range(len(logprobs)), key=logprobs.__getitem__) == item.answer),
        "accuracy_norm": float(max(range(len(logprobs)), key=per_character.__getitem__) == item.answer),
    }


def score_class(item: Item, predicted: int) -> dict[str, float]:
    """Statistics of a predicted class; class 1 is the positive one."""
    return {
        "accuracy": float(predicted == item.answer),
        "true_positive": float(predicted == item.answer == 1),
        "false_positive": float(predicted == 1 != item.answer),
        "false_negative": float(item.answer == 1 != predicted),
    }


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UsageError("rouge-score is not installed; expected prunepath-vllm[eval]") from None
    return RougeScorer(["rougeL"], use_stemmer=True)


def score_text(item: Item, text: str) -> dict[str, float]:
    """ROUGE-L (F-measure, stemmed) of a text against its best reference."""
    return {"rouge_l": _rouge().score_multi(item.choices, text)["rougeL"].fmeasure}


def score_recall(item: Item, text: str) -> dict[str, float]:
    """Whether a text has the number."""
    return {"recall": float(item.choices[0] in text)}


def answer_text(text: str) -> str:
    """What counts of a generated text: its first line."""
    return text.strip().partition("\n")[0].strip()
