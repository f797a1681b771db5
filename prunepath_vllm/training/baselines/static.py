"""Static expert pruning: the experts that contribute least over a text are dropped for every token alike."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prunepath_vllm.checkpoint import (
    WEIGHTS_FILE,
    CheckpointSummary,
    refuse_changed,
    stream_tensors,
    validate_checkpoint,
)
from prunepath_vllm.conversion.calibrate import load_model
from prunepath_vllm.errors import UsageError
from prunepath_vllm.tau import DENSE_TAU
from prunepath_vllm.training.baselines.common import (
    SEQUENCES,
    calibration_sequences,
    check_arguments,
    check_removes,
    compute_dtype,
    run_layer_by_layer,
    write_checkpoint,
)
from prunepath_vllm.training.losses import contribution_shares


def prune_experts(
    src: str | Path,
    dst: str | Path,
    *,
    sparsity: float,
    text: str | Path,
    sequences: int = SEQUENCES,
    device: str = "cpu",
) -> Path:
    """Drop the share `sparsity` of every layer's experts and write a dense checkpoint with narrower layers.

    Experts go by their mean share of the layer's squared contribution over the text. Every layer keeps as many.

    Args:
        src: PrunePath checkpoint directory with the gate "none"; its routers are not used.
        dst: directory to create.
        sparsity: in (0, 1), rounded to whole experts.
        text: UTF-8 text file (gzipped where it ends in .gz).
        sequences: of 512 tokens each, from its beginning.
        device: "cpu" or "cuda".

    Returns:
        `dst`.

    Raises:
        UsageError: an argument that makes no sense, a gated or quantised checkpoint, or a text that is
            missing or too short.
        ConfigError, CheckpointError: `src` is not a valid PrunePath checkpoint.
    """
    dst = Path(dst)
    check_arguments(src, dst, sparsity, device)
    summary = validate_checkpoint(src)
    prunepath = summary.prunepath
    refuse_changed(src, prunepath, "pruning")
    if prunepath.gate != "none":
        raise UsageError(f"{src}: gate {prunepath.gate!r}; expected 'none': without its router an expert has no gate")
    experts = prunepath.num_experts
    check_removes(
        sparsity, lambda share: round(experts * share), above=0.5 / experts, of=f"{experts} experts in a layer"
    )
    kept = experts - round(experts * sparsity)
    if kept < 1:
        raise UsageError(f"sparsity: {sparsity} leaves no expert of {experts}; expected less")
    tokens = calibration_sequences(src, text, sequences)
    model = compute_dtype(load_model(summary, device))
    shares = mean_shares(model, summary, tokens).cpu()
    best = shares.topk(kept, dim=1).indices.sort(dim=1).values
    record = dict(
        method="static experts",
        sparsity=1 - kept / experts,
        expert_size=prunepath.expert_size,
        text=Path(text).name,
        sequences=len(tokens),
        context=tokens.shape[1],
        base_model=prunepath.base_model,
    )
    write_checkpoint(dst, src, lambda folder: save_experts(summary, best, folder), record)
    return dst


def mean_shares(model: Any, summary: CheckpointSummary, tokens: Tensor) -> Tensor:
    """Mean over tokens of each expert's share of its layer's squared contribution.

    Args:
        model: of the checkpoint, with every expert giving its full output.
        summary: the checkpoint.
        tokens: int64 [N, S], without padding.

    Returns:
        float32 [L, E].
    """
    family, experts = summary.family, summary.prunepath.num_experts
    means: list[Tensor] = []

    def observe(down: Any, args: tuple[Tensor, ...]) -> None:
        norms = torch.linalg.vector_norm(family.out_in(down.weight).float(), dim=0)
        rows = (contribution_shares(sequence, norms, experts).mean(dim=0) for sequence in args[0])
        means.append(torch.stack(list(rows)).mean(dim=0))

    outputs = [model.get_submodule(family.output(layer)) for layer in range(summary.num_layers)]
    handles = [module.register_forward_pre_hook(observe) for module in outputs]
    run_layer_by_layer(model, family, summary.num_layers, tokens, tau=DENSE_TAU)
    for handle in handles:
        handle.remove()
    return torch.stack(means)


def save_experts(summary: CheckpointSummary, kept: Tensor, folder: Path) -> None:
    """Write the dense model that has only some experts of each layer.

    Args:
        summary: PrunePath checkpoint.
        kept: indices of each layer's experts, ascending, int64 [L, experts kept].
        folder: an empty directory.
    """
    family, size = summary.family, summary.prunepath.expert_size
    neurons = (kept.unsqueeze(-1) * size + torch.arange(size)).flatten(1)  # [L, F]
    dimensions: dict[str, tuple[int, int]] = {}  # tensor -> its layer, the dimension its neurons lie along
    dropped: set[str] = set()
    for layer in range(summary.num_layers):
        dimensions |= {name: (layer, axis) for name, axis in family.neuron_axes(layer).items()}
        dropped |= {f"{family.router(layer)}.{part}" for part in ("weight", "down.weight", "bias")}
    tensors: dict[str, Tensor] = {}
    for name, tensor in stream_tensors(summary.path, summary.tensors):
        if name in dimensions:
            layer, dim = dimensions[name]
            tensor = tensor.index_select(dim, neurons[layer])
        if name not in dropped:
            tensors[name] = tensor.contiguous()
    if family.merged is not None:
        for layer in range(summary.num_layers):
            parts = [tensors.pop(f"{name}.weight") for name in family.inputs(layer)]
            tensors[f"{family.merged.format(layer)}.weight"] = torch.cat(parts)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {key: value for key, value in summary.config.items() if key != "prunepath_config"}
    config |= {
        "architectures": [family.dense_architecture],
        "model_type": family.dense_model_type,
        family.intermediate_size_field: neurons.shape[1],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
