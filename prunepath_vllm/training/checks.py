"""What a training refuses before it begins: parts of a recipe that do not fit the model, or the run it goes on from."""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunepath_vllm.checkpoint import read_config
from prunepath_vllm.errors import CheckpointError, ConfigError, UsageError
from prunepath_vllm.families import family_of
from prunepath_vllm.tau import shown
from prunepath_vllm.training.recipe import RECIPE_FILE, Recipe, load_recipe

MADE = ("seed", "model.path", "model.scratch", "model.labels", "data.task")
"""What decides how a new dense model is made."""
STARTED = (*MADE, "model.convert", "model.adapter")
"""What decides how a starting model is made."""
CONTINUED = (*STARTED, "model.rank", "model.embeddings", "data", "stages", "optimizer", "batch", "distillation")
"""What decides what is learned; the rest of a recipe may differ when a run goes on, its end too."""

_LOCATIONS = ("model.path", "model.adapter", "model.convert.text", "data.train.N.path", "distillation.teacher")
"""Which of these keys name a file, a directory or what Hugging Face has: one may be written in several ways."""


def check_same_run(recipe: Recipe, output: Path, *, keys: Collection[str], what: str) -> None:
    """Refuse to go on from what another recipe has left: it would be taken for this one's.

    Args:
        recipe: of this run.
        output: its directory, with the recipe of the run before in it, if there was one.
        keys: of recipes, that decide what is there; none where nothing is.
        what: that is, in words.

    Raises:
        UsageError: names the first key that differs, and both values.
    """
    if not keys or not (output / RECIPE_FILE).exists():
        return
    before, now = (one.model_dump(mode="json") for one in (load_recipe(output / RECIPE_FILE), recipe))
    for part in keys:
        for key, (old, new) in _differences(_part(before, part), _part(now, part), part):
            raise UsageError(
                f"output {output}: {what} {key} {shown(old)}, and the recipe says {shown(new)}; expected the same, or "
                "another directory"
            )


def _part(recipe: dict[str, Any], key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = value[name]
    return value


def _differences(old: Any, new: Any, key: str) -> Iterable[tuple[str, tuple[Any, Any]]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, both in enumerate(zip(old, new, strict=True)):
            yield from _differences(*both, f"{key}.{number}")
    elif old != new and not (_is_location(key) and _same_place(old, new)):
        yield key, (old, new)


def _is_location(key: str) -> bool:
    return re.sub(r"\.\d+(?=\.)", ".N", key) in _LOCATIONS


def _same_place(old: str | None, new: str | None) -> bool:
    return old is not None and new is not None and os.path.realpath(old) == os.path.realpath(new)


def check_length(recipe: Recipe) -> None:
    """Refuse packed sequences longer than a model on this machine takes; labelled texts may all be shorter.

    Raises:
        UsageError: names both lengths.
    """
    path = Path(recipe.model.path)
    if recipe.data.task == "classification" or recipe.model.scratch is not None or not path.is_dir():
        return
    config = read_config(path)
    try:
        family = family_of(config, converted="prunepath_config" in config)
    except ConfigError:  # conversion may make one of it, or says what is wrong
        return
    try:
        limit = family.positions(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if limit is not None and recipe.data.sequence_length > limit:
        raise UsageError(
            f"data.sequence_length: {recipe.data.sequence_length}; expected at most {limit}, {path}'s longest sequence"
        )


def check_labels(rows: Iterable[Mapping[str, Any]], classes: int, where: str) -> None:
    """Refuse labels that are not classes of the model.

    Args:
        rows: with a "label" each.
        classes: how many the model has.
        where: the source, for the error.

    Raises:
        UsageError: names the row and its label.
    """
    for number, row in enumerate(rows, 1):
        label = row["label"]
        try:
            whole = int(label) == float(label)  # "1" is one, as is 1.0
        except (TypeError, ValueError):
            whole = False
        if not whole or not 0 <= int(label) < classes:
            raise UsageError(
                f"data {where}, row {number}: label {shown(label)}; expected a whole number from 0 to {classes - 1}, a "
                "class of the model"
            )


def check_teacher(name: str, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuse a teacher whose predictions are about other tokens.

    Args:
        name: its directory or Hugging Face name.
        teacher: the model.
        tokenizer: of the model that learns.
        vocabulary: how many tokens that model predicts.

    Raises:
        UsageError: another number of tokens, or a tokenizer beside the teacher with other ids.
    """
    from prunepath_vllm.modeling import load_tokenizer

    if (its := teacher.get_output_embeddings().weight.shape[0]) != vocabulary:
        raise UsageError(
            f"distillation.teacher: {name} predicts {its} tokens; expected {vocabulary}, as the model that learns does"
        )
    try:
        known = load_tokenizer(name).get_vocab()
    except CheckpointError:  # weights alone, or a tokenizer that cannot be read
        return
    ours = tokenizer.get_vocab()
    for token, number in ours.items():
        if known.get(token, number) != number:
            raise UsageError(
                f"distillation.teacher: {name} has token {token!r} as {known[token]}; expected {number}, as the model "
                "that learns has it"
            )
