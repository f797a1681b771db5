"""Wanda (arXiv 2306.11695) on the feed-forward linears: weights pruned by magnitude times input norm, no training."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from prunepath_vllm.checkpoint import check_finite, read_config, read_tensor_index
from prunepath_vllm.errors import ConfigError
from prunepath_vllm.families import Family, family_of
from prunepath_vllm.training.baselines.common import (
    SEQUENCES,
    calibration_sequences,
    check_arguments,
    check_removes,
    compute_dtype,
    run_layer_by_layer,
    share_of_zeros,
    write_checkpoint,
)


def prune_with_wanda(
    src: str | Path,
    dst: str | Path,
    *,
    sparsity: float,
    text: str | Path,
    sequences: int = SEQUENCES,
    device: str = "cpu",
) -> Path:
    """Zero the share `sparsity` of every feed-forward linear's weights and write the model as a dense checkpoint.

    Args:
        src: directory of a dense model.
        dst: directory to create.
        sparsity: in (0, 1), of each output row.
        text: UTF-8 text file to calibrate on (gzipped where it ends in .gz).
        sequences: of 512 tokens each, from its beginning.
        device: "cpu" or "cuda".

    Returns:
        `dst`.

    Raises:
        UsageError: an argument that makes no sense, or a text that is missing or too short.
        ConfigError, CheckpointError: `src` is not a dense model of a known family, has no safetensors that can be read
            or is not finite.
    """
    dst = Path(dst)
    check_arguments(src, dst, sparsity, device)
    config = read_config(src)
    try:
        family = family_of(config, converted=False)
    except ConfigError as error:
        raise ConfigError(f"{src}: {error}") from None
    longest = max(family.hidden_size(config), family.intermediate_size(config))
    check_removes(
        sparsity,
        lambda share: pruned_of(longest, share),
        above=1 / longest,
        of=f"the {longest} weights in the longest rows of {src}",
    )
    read_tensor_index(src)
    tokens = calibration_sequences(src, text, sequences)
    auto_class = getattr(transformers, family.auto_class)
    options = dict(dtype="auto", use_safetensors=True, **family.dense_options)
    model = auto_class.from_pretrained(src, **options).eval().to(device)
    for name, weight in model.named_parameters():
        check_finite(name, weight)
    dtype = model.dtype
    model = compute_dtype(model)
    linears = prune_model(model, family, family.num_layers(config), tokens, sparsity)
    model = model.to(dtype)  # what is left of the weights is what it was
    record = dict(
        method="wanda",
        sparsity=share_of_zeros(linears),
        text=Path(text).name,
        sequences=len(tokens),
        context=tokens.shape[1],
        base_model=Path(src).resolve().name,
    )
    write_checkpoint(dst, src, model.save_pretrained, record)
    return dst


def prune_model(model: Any, family: Family, layers: int, tokens: Tensor, sparsity: float) -> list[nn.Module]:
    """Prune a dense model in place: each linear on its way, so that its inputs come from what is pruned already.

    Args:
        model: dense, in evaluation mode.
        family: its row.
        layers: how many it has.
        tokens: int64 [N, S], without padding.
        sparsity: share of each output row to zero.

    Returns:
        The pruned linears.
    """
    linears = []
    handles = []
    for layer in range(layers):
        for name in (*family.dense_inputs(layer), family.output(layer)):
            linear = model.get_submodule(name)
            linears.append(linear)
            handles.append(linear.register_forward_pre_hook(_Prune(sparsity, family)))
    run_layer_by_layer(model, family, layers, tokens)
    for handle in handles:
        handle.remove()
    return linears


class _Prune:
    """Before a linear computes: prune it by its input."""

    def __init__(self, sparsity: float, family: Family) -> None:
        self.sparsity, self.family = sparsity, family

    def __call__(self, linear: Any, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].flatten(0, -2)
        norms = torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32)
        prune_rows(self.family.out_in(linear.weight.data), norms, self.sparsity)


def prune_rows(weight: Tensor, norms: Tensor, sparsity: float) -> None:
    """Zero the weights of lowest |W| * ||x||_2 in every output row, in place.

    Args:
        weight: [out, in].
        norms: Euclidean norm of each input over all tokens, float32 [in].
        sparsity: share of each row, rounded down to whole weights.
    """
    scores = weight.abs().float() * norms
    lowest = scores.topk(pruned_of(weight.shape[1], sparsity), dim=1, largest=False).indices
    weight.scatter_(1, lowest, 0)


def pruned_of(length: int, sparsity: float) -> int:
    """How many weights of a row go."""
    return int(sparsity * length)
