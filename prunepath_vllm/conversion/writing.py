"""What a new checkpoint is written with: shards of tensors, and the files that stand beside them."""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from prunepath_vllm.checkpoint import INDEX_FILE, WEIGHTS_FILE
from prunepath_vllm.conversion.model_card import QUALITY_FILE

MAX_SHARD_BYTES = 2 * 10**9

COPIED_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja")
"""Tokenizer, chat templates, generation settings; never pickles or code."""


def copy_files(source: Path, staging: Path) -> None:
    """Copy what stands beside a checkpoint's weights and configuration and stays true of another one made of it."""
    for pattern in COPIED_FILES:
        for file in source.glob(pattern):
            # What a training measured is the dense model's.
            written_anew = file.name in ("config.json", QUALITY_FILE) or file.name.endswith(".index.json")
            if file.is_file() and not written_anew:
                copy = staging / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


class ShardWriter:
    """Collects tensors and writes them in files of at most MAX_SHARD_BYTES (or one tensor)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shard: dict[str, Tensor] = {}
        self.shard_bytes = self.total_bytes = 0
        self.files: list[list[str]] = []
        """Tensor names of each shard written."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor for the current shard; the shard before it is written when it is full."""
        if self.shard and self.shard_bytes + tensor.nbytes > MAX_SHARD_BYTES:
            self._flush()
        self.shard[name] = tensor.contiguous()
        self.shard_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the last shard, give the files their names, and write the index where there are several."""
        self._flush()
        if len(self.files) == 1:
            self._temporary(0).rename(self.directory / WEIGHTS_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.files):
            file = f"model-{number + 1:05d}-of-{len(self.files):05d}.safetensors"
            self._temporary(number).rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        path = self._temporary(len(self.files))
        save_file(self.shard, path, metadata={"format": "pt"})
        self.files.append(list(self.shard))
        self.shard, self.shard_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        """Where a shard waits for its name, which needs the number of shards."""
        return self.directory / f"shard-{number}"
