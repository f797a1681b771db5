"""Change some tensors and the ``prunepath_config`` of a checkpoint directory, all or nothing."""

import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from prunepath_vllm.checkpoint import INDEX_FILE, CheckpointSummary, read_json, validate_checkpoint
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.conversion.model_card import CARD_FILE, write_model_card
from prunepath_vllm.files import replace_directory, replace_file, staging_directory


def rewrite_checkpoint(summary: CheckpointSummary, tensors: Mapping[str, Tensor | None], **fields: Any) -> None:
    """Replace a checkpoint directory by one with other tensors and configuration; its other files stay.

    The new directory is completed beside the old one, which steps aside only then, under the name ``.NAME.old``; inside
    it, where the old one is a mount point, which cannot be renamed.
    Needs space for the shards that change; one of them is in memory at a time.

    Args:
        summary: the checkpoint, validated.
        tensors: name -> new value, stored in the dtype of the tensor it replaces (a router's bias: of its weight), or
            None to remove the tensor.
        **fields: new values of ``prunepath_config``.

    Raises:
        UsageError: the directory cannot be written.
        ConfigError, CheckpointError: the result would not be a valid checkpoint; nothing has changed then.
    """
    directory = summary.path.resolve()
    staging = staging_directory(directory)
    try:
        # The staging directory may be in the old one.
        ignore = shutil.ignore_patterns(staging.name)
        shutil.copytree(directory, staging, copy_function=_link_or_copy, ignore=ignore, dirs_exist_ok=True)
        _write_tensors(summary, staging, tensors)
        block = PrunePathConfig.parse(summary.prunepath.to_json() | fields)
        _write_json(staging / "config.json", summary.config | {"prunepath_config": block.to_json()})
        (staging / CARD_FILE).unlink(missing_ok=True)  # a link: the old card must stay as it is
        write_model_card(staging)
        validate_checkpoint(staging)
        staging.chmod(directory.stat().st_mode)
        replace_directory(directory, staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _link_or_copy(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # a file system without hard links
        shutil.copy2(source, destination)


def _write_tensors(summary: CheckpointSummary, staging: Path, tensors: Mapping[str, Tensor | None]) -> None:
    known = summary.tensors
    # A tensor the checkpoint lacks, a router's bias, goes where its weight is.
    home = {name: known[name if name in known else f"{name.removesuffix('.bias')}.weight"].file for name in tensors}
    for file in sorted(set(home.values())):
        shard = load_file(summary.path / file)
        for name in (name for name in tensors if home[name] == file):
            value = tensors[name]
            if value is None:
                shard.pop(name, None)
            else:
                dtype = shard[name if name in shard else f"{name.removesuffix('.bias')}.weight"].dtype
                shard[name] = value.detach().to("cpu", dtype).contiguous()
        save = functools.partial(save_file, shard, metadata={"format": "pt"})
        replace_file(staging / file, save, like=staging / file)
    if (staging / INDEX_FILE).exists():
        index = read_json(staging / INDEX_FILE)
        for name, value in tensors.items():
            if value is None:
                index["weight_map"].pop(name, None)
            else:
                index["weight_map"][name] = home[name]
        _write_json(staging / INDEX_FILE, index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    replace_file(path, lambda new: new.write_text(text, encoding="utf-8"), like=path)
