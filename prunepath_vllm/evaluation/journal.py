"""A run's results as they come, so that an interrupted run goes on where it stopped."""

import json
import os
from pathlib import Path
from typing import Any

from prunepath_vllm.errors import UsageError


class Journal:
    """An append-only JSONL file: a header that says what is measured, then one record per (tau, shard).

    A last line that was cut off by a crash is dropped. Without a path, nothing is kept.

    Raises:
        UsageError: the file holds another run, or something else.
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[str, Any] = {}
        self.header: dict[str, Any] | None = None
        """To be written before the first record: a run that is refused leaves no file."""
        if path is None:
            return
        try:
            complete = path.read_bytes().decode().split("\n")[:-1] if path.is_file() else []
            found, *records = [json.loads(line) for line in complete] or [None]
            self.records = {record["key"]: record["value"] for record in records}
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path}: not the results of an evaluation; expected another --output") from None
        if found is not None and found != header:
            differing = next(name for name in {**found, **header} if found.get(name) != header.get(name))
            raise UsageError(
                f"{path}: an unfinished run with another {differing}; expected the same run, another --output, or "
                "the file removed"
            )
        self.header = header if found is None else None
        if found is not None and (size := sum(len(line.encode()) + 1 for line in complete)) < path.stat().st_size:
            os.truncate(path, size)

    def get(self, key: str) -> Any:
        """The value kept under `key`, or None."""
        return self.records.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep `value` under `key`, on disk before this returns."""
        self.records[key] = value
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                if self.header is not None:
                    file.write(json.dumps(self.header) + "\n")
                    self.header = None
                file.write(json.dumps({"key": key, "value": value}) + "\n")
                file.flush()
                os.fsync(file.fileno())
