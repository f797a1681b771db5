"""Routers fitted to a text, without training: each softmax ranks its layer's experts by what leaving them out costs.

benchmarks/results/NOTES.md has the measurements. Shapes: N tokens, H hidden size, E experts, D neurons per expert,
F = E * D.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from prunepath_vllm.checkpoint import CheckpointSummary, check_finite, refuse_changed, validate_checkpoint
from prunepath_vllm.conversion.costs import (
    Observation,
    experts_of,
    few,
    leaving_out_costs,
    observe,
    output_rows,
    positions_to_skip,
    sharpness_by_layer,
    sharpness_losses,
)
from prunepath_vllm.conversion.rewrite import rewrite_checkpoint
from prunepath_vllm.conversion.text import read_sequences
from prunepath_vllm.devices import check_device
from prunepath_vllm.errors import CheckpointError, UsageError
from prunepath_vllm.families import Family
from prunepath_vllm.files import check_writable
from prunepath_vllm.kernels import reference
from prunepath_vllm.kernels.cpu import has_fast_product
from prunepath_vllm.tau import level_curve

MAX_TOKENS = 8192
CONTEXT = 512
HELD_OUT_SHARE = 8
"""One sequence in this many measures the tau curve and fits nothing."""

CURVE_TAUS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.995, 1.0)

RIDGE = 1e-2
"""Of the mean variance of a layer's inputs."""

SATURATING_BIAS = 32.0
"""Router bias under the sigmoid gate: exact in bfloat16, the same for all experts (so the softmax does not see it), and
the sigmoid of 32 + any logit this module fits is 1."""


def calibrate(
    checkpoint: str | Path,
    text: str | Path,
    *,
    max_tokens: int = MAX_TOKENS,
    context: int | None = None,
    dense_positions: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> list[tuple[float, float]]:
    """Fit every router of a checkpoint to a text and measure its tau curve, in place.

    Each router is fitted to what it reads, low-rank ones by :func:`factor_router`. The function at tau >= 1 stays what
    it was. Under the sigmoid gate the fitted routers saturate the gates by a
    constant bias, and the second linears lose the factor 2 that made up for a zero router's gates. The directory is
    replaced as a whole: a crash leaves the old checkpoint.

    Args:
        checkpoint: PrunePath checkpoint directory.
        text: UTF-8 text file (gzipped where it ends in .gz), like what the model will read.
        max_tokens: how much of it to read.
        context: tokens per sequence; None takes 512, or what the model can take.
        dense_positions: new value of the configuration's field; None keeps it.
        seed: of the labels drawn for the loss gradients.
        device: "cpu" or "cuda".

    Returns:
        The measured (tau, FFN sparsity) pairs, ascending in tau.

    Raises:
        UsageError: arguments out of range, text missing or too short, threshold selection, trained sigmoid gates,
            quantised experts, or a directory that cannot be written.
        CheckpointError, ConfigError: not a valid checkpoint, or one whose activations on the text are not finite.
    """
    summary = validate_checkpoint(checkpoint)
    prunepath = summary.prunepath
    refuse_changed(checkpoint, prunepath, "calibrating")
    if prunepath.selection != "cumulative_mass":
        raise UsageError(f"{checkpoint}: selection {prunepath.selection!r} has no tau to calibrate for")
    if dense_positions is not None and dense_positions < 0:
        raise UsageError(f"dense positions: {dense_positions}; expected 0 or more")
    check_device(device)
    dense_positions = prunepath.dense_positions if dense_positions is None else dense_positions
    length = sequence_length(summary.family, summary.config, context, default=CONTEXT)
    if length <= dense_positions:
        raise UsageError(f"context: {length}; expected more than the {dense_positions} dense positions")
    sequences = calibration_sequences(
        checkpoint, summary.family, summary.config, text, context=context, max_tokens=max_tokens
    )
    check_writable(summary.path)

    model = in_a_fast_dtype(load_model(summary, device))
    factor = _output_factor(model, summary)
    held_out = max(1, len(sequences) // HELD_OUT_SHARE)
    skip = positions_to_skip(summary.family, dense_positions)
    observations = observe(model, summary.family, sequences[:-held_out], skip=skip, seed=seed)
    routers = _fit_routers(model, summary, observations)  # weight and down of every layer

    updates: dict[str, Tensor | None] = {}
    for layer, (weight, down_weight) in enumerate(routers):
        name = summary.family.router(layer)
        router: Any = model.get_submodule(name)
        with torch.no_grad():
            router.weight.copy_(weight)
            bias = torch.full_like(router.weight[:, 0], SATURATING_BIAS) if prunepath.gate == "sigmoid" else None
            router.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
            if factor != 1:
                down: Any = model.get_submodule(summary.family.output(layer))
                down.weight.mul_(factor)
                updates[f"{summary.family.output(layer)}.weight"] = down.weight
            if down_weight is not None:
                router.down.weight.copy_(down_weight)
                updates[f"{name}.down.weight"] = router.down.weight
                check_finite(f"{name}.down.weight", router.down.weight)
        check_finite(f"{name}.weight", router.weight)
        updates[f"{name}.weight"] = router.weight
        updates[f"{name}.bias"] = bias
    model.base_model.prunepath = prunepath.model_copy(update=dict(dense_positions=dense_positions))
    curve = _measure_curve(model, sequences[-held_out:])
    rewrite_checkpoint(summary, updates, dense_positions=dense_positions, tau_curve=curve)
    return curve


def calibration_sequences(
    model: str | Path,
    family: Family,
    config: Mapping[str, Any],
    text: str | Path,
    *,
    context: int | None = None,
    max_tokens: int = MAX_TOKENS,
    minimum: int = 2,
) -> Tensor:
    """The beginning of a text in sequences that a model takes.

    Args:
        model: directory with the tokenizer.
        family: of the model.
        config: its config.json.
        text: as :func:`calibrate` takes it.
        context: tokens per sequence, likewise.
        max_tokens: likewise.
        minimum: sequences that there must be: what routers are fitted to, and what they are measured on.

    Returns:
        int64 [sequences, length].

    Raises:
        UsageError: arguments out of range, text missing, unreadable or too short.
    """
    from prunepath_vllm.modeling import load_tokenizer

    length = sequence_length(family, config, context, default=CONTEXT)
    return read_sequences(load_tokenizer(model), text, length=length, max_tokens=max_tokens, minimum=minimum)


def sequence_length(family: Family, config: Mapping[str, Any], wanted: int | None = None, *, default: int) -> int:
    """Tokens per sequence: `wanted`, or `default` where the model of a config.json can take that many.

    Raises:
        UsageError: `wanted` is below 2 or more than the model takes.
    """
    limit = family.positions(config) or default
    if wanted is None:
        return min(default, limit)
    if not 2 <= wanted <= limit:
        raise UsageError(f"context: {wanted}; expected 2 to {limit}, the model's longest sequence")
    return wanted


def load_model(summary: CheckpointSummary, device: str) -> PreTrainedModel:
    """The transformers model of a checkpoint, in its own dtype, frozen, in evaluation mode."""
    import transformers

    from prunepath_vllm.modeling import register_auto_classes

    register_auto_classes()
    model = getattr(transformers, summary.family.auto_class).from_pretrained(summary.path, dtype="auto")
    return model.requires_grad_(False).eval().to(device)


def in_a_fast_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float32 on a CPU that is slow in its dtype, if that takes at most half of the memory."""
    if model.device.type == "cpu" and not has_fast_product(model.dtype):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if 4 * model.num_parameters() <= memory / 2:
            return model.float()
    return model


def _output_factor(model: PreTrainedModel, summary: CheckpointSummary) -> float:
    """What the second linears must be multiplied by once the gates are saturated: what the gates are now.

    Raises:
        UsageError: the gates depend on the token, so that no routers but these keep the model's function.
    """
    if summary.prunepath.gate == "none":
        return 1.0
    routers: list[Any] = [model.get_submodule(summary.family.router(layer)) for layer in range(summary.num_layers)]
    zero = all(not router.weight.any() and (router.bias is None or not router.bias.any()) for router in routers)
    if zero:
        return 0.5
    if all(router.bias is not None and bool((router.bias == SATURATING_BIAS).all()) for router in routers):
        return 1.0
    raise UsageError(
        f"{summary.path}: its sigmoid gates are trained; expected gate 'none', or routers that are zero or calibrated"
    )


@torch.no_grad()
def _fit_routers(
    model: PreTrainedModel, summary: CheckpointSummary, observations: Sequence[Observation]
) -> list[tuple[Tensor, Tensor | None]]:
    """Every layer's router, float32: its weight [E, H] and None, or [E, r] and the first factor [r, H]."""
    family, rank = summary.family, summary.prunepath.router.rank
    routers: list[tuple[Tensor, Tensor | None]] = []
    measured = []
    for layer, seen in enumerate(tqdm(observations, desc="fitting routers", unit="layer")):
        inputs, metric, down = torch.cat(seen.inputs), seen.metric(), output_rows(model, family, layer).float()
        experts = experts_of(model, family, layer, inputs, summary.prunepath.num_experts)
        router_inputs = torch.cat(seen.router_inputs)
        try:
            weight, first = fit_router(router_inputs, leaving_out_costs(experts, down, metric)), None
        except torch.linalg.LinAlgError:
            raise CheckpointError(
                f"{summary.path}: layer {layer}: no router can be fitted to its inputs on the text, which are all zero "
                "or too large; expected those of a model that works"
            ) from None
        if rank is not None:
            weight, first = factor_router(weight, router_inputs, rank)
        routers.append((weight, first))
        logits = reference.router_logits(few(router_inputs), weight, None, first)
        measured.append(sharpness_losses(logits, few(experts), down, metric))
    sharpness = sharpness_by_layer(measured)
    return [(weight * factor, first) for (weight, first), factor in zip(routers, sharpness, strict=True)]


def fit_router(inputs: Tensor, costs: Tensor) -> Tensor:
    """Ridge regression, without intercept, of each expert's log cost relative to its token's mean log cost.

    Args:
        inputs: what the router reads, [N, H].
        costs: [N, E], not negative.

    Returns:
        float32 [E, H].
    """
    inputs = inputs.float()
    target = (costs + 1e-6 * costs.median() + torch.finfo(costs.dtype).tiny).log()
    target = target - target.mean(dim=-1, keepdim=True)
    covariance = inputs.T @ inputs
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    return torch.linalg.solve(covariance, inputs.T @ target).T


def factor_router(weight: Tensor, inputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors of a router of low rank whose logits on `inputs` are nearest to a full one's.

    A weighted singular value decomposition: with C = inputs' inputs and U the first r eigenvectors of W C W', that is
    the principal directions of the logits, U U' W is the matrix of rank r that is nearest to W in the norm of C. Ranks
    above the number of experts leave nothing out; what they have beyond is zero.

    Args:
        weight: W, [E, H].
        inputs: what the router reads, [N, H].
        rank: r, 1 to H.

    Returns:
        float32 U [E, r] and U' W [r, H].
    """
    logits = inputs.double() @ weight.double().T
    directions = torch.linalg.eigh(logits.T @ logits).eigenvectors.flip(1)[:, :rank]  # [E, min(r, E)]
    directions = F.pad(directions, (0, rank - directions.shape[1]))
    return directions.float(), (directions.T @ weight.double()).float()


@torch.no_grad()
def _measure_curve(model: PreTrainedModel, sequences: Tensor) -> list[tuple[float, float]]:
    """FFN sparsity (eq. 15) of the model on held-out text, at each tau of CURVE_TAUS."""
    curve: list[tuple[float, float]] = []
    for tau in tqdm(CURVE_TAUS, desc="measuring the tau curve", unit="tau"):
        layers = [
            active.float().mean()
            for sequence in sequences.to(model.device)
            for active in model.base_model(sequence[None], tau=tau, output_active_experts=True).active_experts
        ]
        curve.append((tau, 1 - float(torch.stack(layers).mean())))
    return level_curve(curve)
