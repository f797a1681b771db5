"""Training data: local files or Hugging Face data sets in, equally long sequences or labelled texts out.

A source is text (.txt: one document), documents (.jsonl with "text"), conversations (.jsonl with "messages"), labelled
texts (.jsonl with "text" and "label"), or token ids (.npy, one dimension). Text files may be gzipped.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from prunepath_vllm.arguments import require_package
from prunepath_vllm.conversion.text import read_sequences
from prunepath_vllm.errors import UsageError
from prunepath_vllm.training.checks import check_labels
from prunepath_vllm.training.head import IGNORED
from prunepath_vllm.training.recipe import Data, Recipe, Source

BLOCK_CHARACTERS = 65536
"""A long text is tokenised in blocks of about this many characters, cut at ends of lines."""
TEXT_SUFFIXES = (".txt", ".txt.gz", ".raw.gz")
HELD_OUT_BATCH = 8
BATCH = 256
"""Texts tokenised at a time."""

Row = Mapping[str, Any]


class Sequences(Dataset):
    """Packed sequences: token ids [N, length], and labels where not every token is learned."""

    def __init__(self, tokens: np.ndarray, labels: np.ndarray | None = None) -> None:
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = {"input_ids": self.tokens[index]}
        return row if self.labels is None else row | {"labels": self.labels[index]}

    @staticmethod
    def collate(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        """Rows to int64 tensors [B, length]; labels are the tokens where there are no others."""
        batch = {key: torch.from_numpy(np.stack([row[key] for row in rows]).astype(np.int64)) for key in rows[0]}
        return {"labels": batch["input_ids"]} | batch


class LabelledTexts(Dataset):
    """Tokenised texts of different lengths, each with a class."""

    def __init__(self, tokens: list[list[int]], labels: list[int], *, padding: int, length: int | None) -> None:
        """Keep the data; `padding` is a token id, `length` what every batch is padded to (None: its longest)."""
        self.tokens, self.labels, self.padding, self.length = tokens, labels, padding, length

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        return self.tokens[index], self.labels[index]

    def collate(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        """Rows to input_ids and attention_mask int64 [B, S], labels int64 [B]."""
        length = self.length or max(len(tokens) for tokens, _ in rows)
        padded = torch.full((len(rows), length), self.padding)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for row, (tokens, _) in enumerate(rows):
            padded[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        labels = torch.tensor([label for _, label in rows])
        return {"input_ids": padded, "attention_mask": mask, "labels": labels}


def check_source(source: Source) -> None:
    """Refuse a source that is neither a file of a known kind nor could be a Hugging Face name; reads nothing.

    Raises:
        UsageError: names it.
    """
    if source.path.endswith((*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".npy")):
        if not Path(source.path).is_file():
            raise UsageError(f"data {source.path}: no such file; expected a readable one")
    elif source.path.endswith((".txt", ".gz", ".json", ".csv")) or Path(source.path).exists():
        raise UsageError(f"data {source.path}: expected .txt, .jsonl (also .gz), .npy or a Hugging Face name")
    else:
        require_package("datasets", "train", f"data {source.path}, which is no file,")


def load_training_data(
    data: Data, tokenizer: PreTrainedTokenizerBase, *, pad_to_length: bool, classes: int | None = None
) -> Dataset:
    """The recipe's training data, tokenised.

    Args:
        data: the recipe's section.
        tokenizer: a fast tokenizer, with a chat template for conversations.
        pad_to_length: pad every batch of labelled texts to the same length.
        classes: how many labels there may be; None checks none.

    Raises:
        UsageError: a source that cannot be read, has the wrong fields or labels, or is too short for one sequence.
    """
    if data.task == "classification":
        rows: list[Row] = []
        for source in data.train:
            labelled = read_labelled(source)
            if classes is not None:
                check_labels(labelled, classes, source.path)
            rows += labelled * source.repeat
        return labelled_texts(rows, tokenizer, data.sequence_length, pad_to_length=pad_to_length)
    parts = [pack(source, tokenizer, data) for source in data.train]
    repeated = [part for part, source in zip(parts, data.train, strict=True) for _ in range(source.repeat)]
    tokens = np.concatenate([part[0] for part in repeated])
    masked = data.task == "chat"
    return Sequences(tokens, np.concatenate([part[1] for part in repeated]) if masked else None)


def held_out_batches(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, classes: int | None = None
) -> list[dict[str, Tensor]]:
    """The recipe's held-out data in batches: equally long sequences, or labelled texts.

    Args:
        recipe: of the run.
        tokenizer: of the model.
        max_tokens: how much of a text is read.
        classes: how many labels there may be; None checks none.

    Raises:
        UsageError: it cannot be read, or is too short.
    """
    source = recipe.evaluation.data
    if source is None:
        return []
    data: Any
    if recipe.data.task == "classification":
        rows = read_labelled(source)
        if not rows:
            raise UsageError(f"data {source.path}: no rows; expected at least one")
        if classes is not None:
            check_labels(rows, classes, source.path)
        data = labelled_texts(rows, tokenizer, recipe.data.sequence_length, pad_to_length=False)
    elif source.path.endswith(TEXT_SUFFIXES):
        sequences = read_sequences(tokenizer, source.path, length=recipe.data.sequence_length, max_tokens=max_tokens)
        data = Sequences(sequences.numpy())
    else:
        limited = recipe.data.model_copy(update=dict(max_tokens=max_tokens))
        data = Sequences(*pack(source, tokenizer, limited))
    starts = range(0, len(data), HELD_OUT_BATCH)
    return [data.collate([data[i] for i in range(at, min(at + HELD_OUT_BATCH, len(data)))]) for at in starts]


def labelled_texts(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, length: int, *, pad_to_length: bool
) -> LabelledTexts:
    """Tokenise rows of :func:`read_labelled`, cut to `length` tokens."""
    rows = list(rows)
    tokens: list[list[int]] = []
    for start in tqdm(range(0, len(rows), BATCH), desc="tokenising", unit="batch"):
        batch = rows[start : start + BATCH]
        pairs = [row["text_pair"] for row in batch] if "text_pair" in batch[0] else None
        tokens += tokenizer([row["text"] for row in batch], pairs, truncation=True, max_length=length)["input_ids"]
    padding = tokenizer.pad_token_id
    assert padding is not None
    return LabelledTexts(
        tokens, [int(row["label"]) for row in rows], padding=padding, length=length if pad_to_length else None
    )


def pack(source: Source, tokenizer: PreTrainedTokenizerBase, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """One source as sequences of `sequence_length` tokens, documents one after another, each ended by the EOS token.

    Returns:
        (token ids, labels), both int32 [N, sequence_length]; what does not fill a last sequence is left out.
    """
    length = data.sequence_length
    tokens: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    count = 0
    with tqdm(desc=f"tokenising {Path(source.path).name}", unit="token", unit_scale=True) as progress:
        for ids, learned in _tokenised(source, tokenizer, answers_only=data.task == "chat"):
            tokens.append(ids)
            labels.append(np.where(learned, ids, IGNORED).astype(np.int32))
            count += len(ids)
            progress.update(len(ids))
            if data.max_tokens is not None and count >= data.max_tokens:
                break
    usable = min(count, data.max_tokens or count) // length * length
    if not usable:
        raise UsageError(f"data {source.path}: {count} tokens; expected at least one sequence of {length}")
    flat = (np.concatenate(part)[:usable].reshape(-1, length) for part in (tokens, labels))
    return next(flat), next(flat)


def _tokenised(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, answers_only: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token ids int32 [n], which of them are learned bool [n]) piece by piece."""
    if source.path.endswith(".npy"):
        ids = np.load(source.path, allow_pickle=False)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError(f"data {source.path}: {ids.dtype} of shape {ids.shape}; expected token ids, one dimension")
        if ids.min() < 0 or ids.max() >= len(tokenizer):
            raise UsageError(f"data {source.path}: ids {ids.min()} to {ids.max()}; expected 0 to {len(tokenizer) - 1}")
        yield ids.astype(np.int32), np.ones(len(ids), dtype=bool)
    elif answers_only:
        for number, row in enumerate(read_rows(source), 1):
            yield tokenise_answers(row, tokenizer, where=f"{source.path}, row {number}")
    else:
        whole = source.path.endswith(TEXT_SUFFIXES)
        texts = _blocks(source) if whole else _documents(source, tokenizer)
        end = [tokenizer.eos_token_id] if source.eos and not whole else []
        for batch in _batches(texts):
            for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
                yield np.array(ids + end, dtype=np.int32), np.ones(len(ids) + len(end), dtype=bool)


def tokenise_answers(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, where: str = "row"
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation's token ids and which of them are an assistant's answer, its end marker included.

    Raises:
        UsageError: no "messages", or a template that rewrites earlier turns, so that an answer cannot be found.
    """
    messages = _field(row, "messages", where)
    ids: list[int] = []
    learned: list[bool] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not before.startswith(done) or not after.startswith(before):
            raise UsageError(f"data {where}: the chat template rewrites earlier turns; expected one that only appends")
        for text, answer in ((before[len(done) :], False), (after[len(before) :], True)):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            learned += [answer] * len(piece)
        done = after
    return np.array(ids, dtype=np.int32), np.array(learned, dtype=bool)


def save_tokens(source: Source, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> int:
    """Tokenise a source once, into a .npy file that is a source itself, and return the number of tokens.

    For machines that the text would be too large to send to: two bytes a token where the vocabulary allows it.

    Raises:
        UsageError: the source cannot be read.
    """
    parts = [ids for ids, _ in _tokenised(source, tokenizer, answers_only=False)]
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    tokens = np.concatenate(parts).astype(kind)
    np.save(path, tokens, allow_pickle=False)
    return len(tokens)


def read_rows(source: Source) -> Iterator[Row]:
    """Rows of a .jsonl file or a Hugging Face data set.

    Raises:
        UsageError: it cannot be had, or a line is not a JSON object.
    """
    if not source.path.endswith((".jsonl", ".jsonl.gz")):
        yield from _hub_rows(source)
        return
    with _open(source.path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UsageError(f"data {source.path}, line {number}: expected a JSON object")
            yield row


def read_labelled(source: Source) -> list[Row]:
    """Rows with "text", "label" and, where the source names one, "text_pair".

    Raises:
        UsageError: a column that the source names is missing.
    """
    rows: list[Row] = []
    for number, row in enumerate(read_rows(source), 1):
        where = f"{source.path}, row {number}"
        made = dict(text=_made(source.text, row, where), label=_field(row, "label", where))
        if source.text_pair is not None:
            made["text_pair"] = _made(source.text_pair, row, where)
        rows.append(made)
    return rows


def _made(template: str, row: Row, where: str) -> str:
    try:
        return template.format_map(row)
    except KeyError as error:
        raise UsageError(f"data {where}: fields {', '.join(sorted(row))}; expected {error.args[0]!r}") from None


def _hub_rows(source: Source) -> Iterator[Row]:
    check_source(source)
    from datasets import load_dataset

    try:
        rows = load_dataset(source.path, source.config, split=source.split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"data {source.path}: no such file, and not to be had from Hugging Face ({reason})") from None
    yield from rows


def _documents(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for number, row in enumerate(read_rows(source), 1):
        if "messages" in row:
            yield str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        else:
            yield _made(source.text, row, f"{source.path}, row {number}")


def _blocks(source: Source) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    with _open(source.path) as file:
        for line in file:
            lines.append(line)
            size += len(line)
            if size >= BLOCK_CHARACTERS:
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _field(row: Row, name: str, where: str) -> Any:
    if name not in row:
        raise UsageError(f"data {where}: fields {', '.join(sorted(row))}; expected {name!r}")
    return row[name]


def _open(path: str) -> Any:
    try:
        opener = gzip.open if path.endswith(".gz") else open
        return opener(path, "rt", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"data {path}: expected a readable file ({error.strerror})") from None
