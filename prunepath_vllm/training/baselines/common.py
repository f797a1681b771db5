"""What the pruning baselines share: the calibration text and the directory they write."""

import json
import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunepath_vllm.arguments import check_new_directory
from prunepath_vllm.checkpoint import read_config
from prunepath_vllm.conversion.calibrate import sequence_length
from prunepath_vllm.conversion.text import read_sequences
from prunepath_vllm.devices import check_device
from prunepath_vllm.errors import UsageError
from prunepath_vllm.families import Family, family_of
from prunepath_vllm.files import check_apart, new_directory
from prunepath_vllm.modeling import load_tokenizer

SEQUENCES = 128
CONTEXT = 512
RECORD_FILE = "pruning.json"


def check_arguments(src: str | Path, dst: Path, sparsity: float, device: str) -> None:
    """Refuse a sparsity outside (0, 1), a GPU that is not there, and a target that is there or cannot be made.

    Raises:
        UsageError: names the argument; for a target that is not apart from the source, both.
    """
    if not 0 < sparsity < 1:
        raise UsageError(f"sparsity: {sparsity}; expected a number in (0, 1)")
    check_apart(dst, src)
    check_new_directory(dst, "DST")
    check_device(device)


def check_removes(sparsity: float, removed: Callable[[float], int], *, above: float, of: str) -> None:
    """Refuse a sparsity that rounds to nothing: the result would be a copy of the source.

    Args:
        sparsity: in (0, 1).
        removed: how many go at a sparsity: none below `above`, some above it.
        above: the exact bound, in (0, 1).
        of: what they go of, for the error.

    Raises:
        UsageError: with the smallest sparsity of three digits that removes something.
    """
    if removed(sparsity):
        return
    unit = 10.0 ** (math.floor(math.log10(above)) - 2)
    shown = (f"{steps * unit:.3g}" for steps in count(math.floor(above / unit)))
    least = next(value for value in shown if removed(float(value)))
    raise UsageError(f"sparsity: {sparsity:g} rounds to none of {of}; expected {least} or more")


def calibration_sequences(src: str | Path, text: str | Path, sequences: int) -> Tensor:
    """The beginning of a text for the model in `src`: int64 [sequences or fewer, up to 512].

    Raises:
        UsageError: the text is missing or has not one sequence.
    """
    config = read_config(src)
    length = sequence_length(family_of(config, converted="prunepath_config" in config), config, default=CONTEXT)
    tokenizer = load_tokenizer(src)
    return read_sequences(tokenizer, text, length=length, max_tokens=sequences * length)


def compute_dtype(model: Any) -> Any:
    """The model as it computes best: in float32 on a CPU, many of which are slow in half precision."""
    return model.float() if model.device.type == "cpu" else model


@torch.inference_mode()
def run_layer_by_layer(model: Any, family: Family, layers: int, tokens: Tensor, **options: Any) -> None:
    """One forward of the backbone over all of `tokens` [N, S] together, with progress by layer."""
    progress = tqdm(total=layers, desc="pruning", unit="layer")

    def count(*_: object) -> None:
        progress.update()

    handles = [model.get_submodule(family.output(layer)).register_forward_hook(count) for layer in range(layers)]
    with progress:
        model.base_model(input_ids=tokens.to(model.device), **options)
    for handle in handles:
        handle.remove()


def write_checkpoint(dst: Path, src: str | Path, save: Callable[[Path], None], record: dict[str, Any]) -> None:
    """A dense checkpoint with its tokenizer and what was done to it, complete or not at all."""
    with new_directory(dst) as folder:
        save(folder)
        load_tokenizer(src).save_pretrained(folder)
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def share_of_zeros(modules: list[nn.Module]) -> float:
    """Share of weights that are zero."""
    weights: list[Any] = [module.weight for module in modules]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
