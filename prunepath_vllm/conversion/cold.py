"""How often a text uses each expert; and those that it never uses leave the checkpoint, for low taus.

Shapes: L layers, E experts, D neurons per expert, K experts of a layer that are kept.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prunepath_vllm.checkpoint import (
    CheckpointSummary,
    ffn_tensor_shapes,
    quantised_tensors,
    refuse_changed,
    router_tensor_shapes,
    stream_tensors,
    validate_checkpoint,
)
from prunepath_vllm.config import ExpertUsage, PrunePathConfig, expected_sparsity, sparsity_curve
from prunepath_vllm.conversion.calibrate import (
    CONTEXT,
    calibration_sequences,
    in_a_fast_dtype,
    load_model,
    sequence_length,
)
from prunepath_vllm.conversion.model_card import write_model_card
from prunepath_vllm.conversion.rewrite import rewrite_checkpoint
from prunepath_vllm.conversion.writing import ShardWriter, copy_files
from prunepath_vllm.devices import check_device
from prunepath_vllm.errors import UsageError
from prunepath_vllm.files import check_absent_or_empty, check_writable, new_directory
from prunepath_vllm.tau import DENSE_TAU, parse_tau

SEQUENCES = 128


@dataclass(frozen=True)
class ColdExperts:
    """What was found out, and what became of it.

    Attributes:
        prunepath: the new checkpoint's block.
        lost_uses: share of the uses of experts on the text that were uses of one that has gone; 0 with share 0.
        bytes_before, bytes_after: of all tensors.
    """

    prunepath: PrunePathConfig
    lost_uses: float
    bytes_before: int
    bytes_after: int


def prune_cold_experts(
    src: str | Path,
    dst: str | Path,
    *,
    max_tau: float,
    text: str | Path,
    share: float = 0.0,
    sequences: int = SEQUENCES,
    device: str = "cpu",
) -> ColdExperts:
    """Write a checkpoint without the weights of experts that a text does not use at `max_tau`.

    Tokens at positions below dense_positions, which use every expert by definition, are not counted. A layer's kept
    experts come first, in the order they had; router rows move with them, and all stay. Each layer keeps at least its
    most used expert. `dst` appears complete or not at all.

    Args:
        src: PrunePath checkpoint directory; its experts may be quantised.
        dst: directory to create; may exist if empty.
        max_tau: in (0, 1); requests above it will be refused.
        text: UTF-8 text file (gzipped where it ends in .gz), like what the model will read.
        share: in [0, 1); experts that at most this share of the tokens use go too.
        sequences: of 512 tokens each, or of what the model takes, from the text's beginning.
        device: "cpu" or "cuda".

    Raises:
        UsageError: an argument out of range, `dst` is there, cannot be made or is not apart from `src`, `src` lacks
            experts already, the text is missing or too short, or every expert is used.
        TauError: `max_tau` is no tau.
        ConfigError, CheckpointError: `src` is not a valid PrunePath checkpoint, or not finite.
    """
    dst = Path(dst)
    max_tau = _sparse_tau(max_tau, "max_tau")
    if not 0 <= share < 1:
        raise UsageError(f"share: {share}; expected a number in [0, 1)")
    check_absent_or_empty(dst, source=src)
    check_device(device)
    summary = validate_checkpoint(src, check_values=True)
    refuse_changed(src, summary.prunepath, "pruning", quantised=True)
    length = sequence_length(summary.family, summary.config, default=CONTEXT)
    tokens = _sequences(src, summary, text, sequences * length)
    check_writable(dst)

    counts, counted = count_uses(summary, tokens, max_tau, device)
    keep = counts > share * counted
    keep[torch.arange(len(keep)), counts.argmax(dim=1)] = True
    if keep.all():
        raise UsageError(
            f"text {text}: at tau {max_tau} every expert is used by more than the share {share} of its {counted} "
            "tokens; expected a lower max tau or a higher share"
        )
    block = _block(summary, keep, _usage(counts.gather(1, _order(keep)), counted, max_tau, text))
    config = summary.config | {"prunepath_config": block.to_json()}
    with new_directory(dst) as staging:
        copy_files(summary.path, staging)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        before, after = _write_weights(summary, staging, keep)
        validate_checkpoint(staging)
        write_model_card(staging)
    return ColdExperts(block, float(counts[~keep].sum() / counts.sum()), before, after)


def record_usage(
    checkpoint: str | Path,
    text: str | Path,
    *,
    tau: float,
    max_tokens: int = SEQUENCES * CONTEXT,
    device: str = "cpu",
) -> ExpertUsage:
    """Measure how often a text uses each expert of a checkpoint, and put it down there, in place, as ``expert_usage``.

    No tensor changes. The engine then holds the most used experts first: with ``host_experts`` they stay on the GPU.

    Args:
        checkpoint: PrunePath checkpoint directory; its experts may be quantised.
        text: UTF-8 text file (gzipped where it ends in .gz), like what the model will read.
        tau: in (0, 1), like what requests will ask for.
        max_tokens: how much of the text to read.
        device: "cpu" or "cuda".

    Raises:
        UsageError: an argument out of range, experts are missing already, the text is missing or too short, or the
            directory cannot be written.
        TauError: `tau` is no tau.
        ConfigError, CheckpointError: not a valid PrunePath checkpoint.
    """
    tau = _sparse_tau(tau, "usage tau")
    check_device(device)
    summary = validate_checkpoint(checkpoint)
    refuse_changed(checkpoint, summary.prunepath, "measuring uses", quantised=True)
    tokens = _sequences(checkpoint, summary, text, max_tokens)
    check_writable(summary.path)
    counts, counted = count_uses(summary, tokens, tau, device)
    usage = _usage(counts, counted, tau, text)
    rewrite_checkpoint(summary, {}, format_version=2, expert_usage=usage.model_dump())
    return usage


def _sparse_tau(value: float, name: str) -> float:
    tau = parse_tau(value, name)
    if tau >= DENSE_TAU:
        raise UsageError(
            f"{name.replace('_', ' ')}: {tau}; expected a number in (0, 1): from 1 on a token uses every expert"
        )
    return tau


def _sequences(checkpoint: str | Path, summary: CheckpointSummary, text: str | Path, max_tokens: int) -> Tensor:
    """Of a text's beginning, int64 [N, S]; some of their tokens choose among experts."""
    tokens = calibration_sequences(checkpoint, summary.family, summary.config, text, max_tokens=max_tokens, minimum=1)
    if tokens.shape[1] <= summary.prunepath.dense_positions:
        raise UsageError(
            f"{checkpoint}: dense_positions {summary.prunepath.dense_positions}; expected fewer than "
            f"{tokens.shape[1]}, the tokens of a sequence"
        )
    return tokens


def _usage(counts: Tensor, counted: int, tau: float, text: str | Path) -> ExpertUsage:
    """What a checkpoint says of uses: int64 [L, E] of so many tokens."""
    shares = (counts.double() / counted).tolist()
    rounded = [[float(f"{share:.4g}") for share in row] for row in shares]
    return ExpertUsage(text=Path(text).name, tokens=counted, tau=tau, shares=rounded)


@torch.inference_mode()
def count_uses(summary: CheckpointSummary, tokens: Tensor, tau: float, device: str) -> tuple[Tensor, int]:
    """How many tokens used each expert at a tau.

    Args:
        summary: the checkpoint.
        tokens: int64 [N, S], without padding.
        tau: of all of them.
        device: "cpu" or "cuda".

    Returns:
        int64 [L, E], and the tokens that were counted: those at positions from dense_positions on.
    """
    model: Any = in_a_fast_dtype(load_model(summary, device))
    skip = summary.prunepath.dense_positions
    counts = torch.zeros(summary.num_layers, summary.prunepath.num_experts, dtype=torch.int64, device=device)
    for sequence in tqdm(tokens, desc="counting uses", unit="sequence"):
        layers = model.base_model(sequence[None].to(device), tau=tau, output_active_experts=True).active_experts
        counts += torch.stack([active[0, skip:].sum(dim=0) for active in layers])
    return counts.cpu(), tokens[:, skip:].numel()


def cut_curve(prunepath: PrunePathConfig, max_tau: float) -> list[tuple[float, float]] | None:
    """The tau curve up to `max_tau`, with a point there by interpolation; None where there is none."""
    curve = sparsity_curve(prunepath)
    if prunepath.tau_curve is None or curve is None:
        return None
    points = [point for point in prunepath.tau_curve if point[0] <= max_tau]
    if not points or points[-1][0] < max_tau:
        (sparsity,) = expected_sparsity(torch.tensor([max_tau]).double().numpy(), curve).tolist()
        points.append((max_tau, min([round(sparsity, 4), *(s for _, s in points)])))
    return points


def _block(summary: CheckpointSummary, keep: Tensor, usage: ExpertUsage) -> PrunePathConfig:
    max_tau = usage.tau
    changed: dict[str, Any] = dict(
        format_version=2,
        default_tau=min(summary.prunepath.default_tau, max_tau),
        tau_curve=cut_curve(summary.prunepath, max_tau),
        expert_usage=usage.model_dump(),
        kept_experts=[list(range(int(row.sum()))) for row in keep],
        max_tau=max_tau,
    )
    return PrunePathConfig.parse(summary.prunepath.to_json() | changed)


def _order(keep: Tensor) -> Tensor:
    """The experts of each layer, int64 [L, E]: kept ones (bool [L, E]) first, otherwise as they were."""
    return (~keep).to(torch.int8).sort(dim=1, stable=True).indices


def _write_weights(summary: CheckpointSummary, staging: Path, keep: Tensor) -> tuple[int, int]:
    """Stream all tensors to `staging`, experts and router rows in their new order. Bytes before and after."""
    family, prunepath, order = summary.family, summary.prunepath, _order(keep)
    axes: dict[str, tuple[int, Tensor]] = {}  # of tensors with neurons: their axis, the experts to take along it
    rows: dict[str, Tensor] = {}  # of the routers
    for layer in range(summary.num_layers):
        kept = order[layer, : int(keep[layer].sum())]
        neurons = family.neuron_axes(layer)
        axes |= {
            name: (neurons[name], kept) for name in ffn_tensor_shapes(family, summary.config, layer) if name in neurons
        }
        axes |= dict.fromkeys(quantised_tensors(family, layer).values(), (0, kept))
        for name in router_tensor_shapes(family, summary.config, prunepath, layer, bias=summary.router_bias):
            if not name.endswith(".down.weight"):
                rows[name] = order[layer]
    writer, before = ShardWriter(staging), 0
    for name, tensor in tqdm(
        stream_tensors(summary.path, summary.tensors), total=len(summary.tensors), desc="writing", unit="tensor"
    ):
        before += tensor.nbytes
        if name in axes:
            axis, kept = axes[name]
            tensor = take_experts(tensor, axis, kept, prunepath.num_experts)
        elif name in rows:
            tensor = tensor[rows[name]]
        writer.add(name, tensor)
    writer.finish()
    return before, writer.total_bytes


def take_experts(tensor: Tensor, axis: int, experts: Tensor, num_experts: int) -> Tensor:
    """The neurons of `experts`, int64 [K], along an axis of E * D: K * D there, in that order."""
    split = tensor.unflatten(axis, (num_experts, -1)).movedim(axis, 0)
    return split[experts].movedim(0, axis).flatten(axis, axis + 1)
