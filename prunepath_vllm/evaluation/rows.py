"""Rows of the evaluation sets, in the layouts that docs/data.md lists, files of them; numbers in files of results."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prunepath_vllm.errors import PrunePathError, UsageError
from prunepath_vllm.tau import shown


class Row(BaseModel):
    """One line of a data file; fields that no task reads are left alone."""

    model_config = ConfigDict(strict=True, frozen=True)


class MmluRow(Row):
    """A question with four choices."""

    subject: str
    question: str
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    answer: Annotated[int, Field(ge=0, le=3)]


class HellaSwagRow(Row):
    """A beginning and its possible ends; `label` is the right one's index, as a string."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: Annotated[list[str], Field(min_length=2)]
    label: Annotated[str, Field(pattern=r"^\d+$")]

    @model_validator(mode="after")
    def _label_in_range(self) -> Self:
        if int(self.label) >= len(self.endings):
            raise ValueError(f"label {self.label}; expected below {len(self.endings)}, the number of endings")
        return self


class ArcChoices(Row):
    """The choices of an ARC question: texts, and a label each."""

    text: Annotated[list[str], Field(min_length=2)]
    label: list[str]


class ArcRow(Row):
    """A question with named choices."""

    question: str
    choices: ArcChoices
    answerKey: str

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> Self:
        if len(self.choices.text) != len(self.choices.label) or self.answerKey not in self.choices.label:
            raise ValueError(f"answerKey {self.answerKey!r}; expected one of {self.choices.label}, one for each text")
        return self


class LabelledRow(Row):
    """A text, or a pair of texts, and its class."""

    text: str
    text_pair: str | None = None
    label: Annotated[int, Field(ge=0)]


class TargetsRow(Row):
    """An input and what may be written about it."""

    input: str
    targets: Annotated[list[str], Field(min_length=1)]


AnyRow = TypeVar("AnyRow", bound=Row)


def read_rows(path: Path, layout: type[AnyRow]) -> list[AnyRow]:
    """Read a JSONL file of evaluation rows.

    Raises:
        UsageError: no such file, no rows, or a malformed one, named by its line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"data {path}: {reason}; expected a JSONL file") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(layout.model_validate(json.loads(line)))
        except json.JSONDecodeError as error:
            raise UsageError(f"data {path}, line {number}: expected a JSON object ({error})") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "row"
            raise UsageError(f"data {path}, line {number}: {field}: {first['msg']}") from None
    if not rows:
        raise UsageError(f"data {path}: no rows; expected at least one")
    return rows


def finite(value: Any, name: str, path: Path, least: float = -math.inf, most: float = math.inf) -> float:
    """A number of a file of results.

    Args:
        value: what stands there.
        name: what it is called there.
        path: of the file.
        least, most: what it may be.

    Raises:
        UsageError: it is no number, not finite or out of that range.
    """
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (OverflowError, TypeError):
        number = math.nan
    if not (math.isfinite(number) and least <= number <= most):
        bounds = (
            ""
            if math.isinf(least)
            else f" of at least {least:g}"
            if math.isinf(most)
            else f" from {least:g} to {most:g}"
        )
        raise UsageError(f"{path}: {name} {shown(value)}; expected a finite number{bounds}")
    return number


@contextmanager
def read_as(expected: str, path: str | Path) -> Iterator[None]:
    """Around the reading of a result's fields: whatever is not there or of another kind is refused alike.

    Args:
        expected: what the file should be.
        path: the file.

    Raises:
        UsageError: names both, for a ValueError raised inside too. An error of this package raised inside stays.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, PrunePathError):
            raise
        raise UsageError(f"{path}: expected {expected}") from None
