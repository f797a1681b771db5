"""Routers fitted to a text, without training: each softmax ranks its layer's experts by what leaving them out costs.

The cost of leaving out expert e at one token is y_e' F y_e: y_e is the expert's output, F the mean outer product of the
loss gradients at the layer's output (the Fisher matrix, labels drawn from the model itself). It estimates the rise in
loss, so it compares experts of one layer and layers with one another. docs/calibration.md has the measurements.

Shapes: N tokens, H hidden size, E experts, D neurons per expert, F = E * D.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel
from transformers.activations import ACT2FN

from prunepath_vllm.checkpoint import CheckpointSummary, check_finite, validate_checkpoint
from prunepath_vllm.conversion.rewrite import rewrite_checkpoint
from prunepath_vllm.conversion.text import read_sequences
from prunepath_vllm.devices import check_device
from prunepath_vllm.errors import UsageError
from prunepath_vllm.families import Family
from prunepath_vllm.kernels import reference
from prunepath_vllm.tau import DENSE_TAU, level_curve

MAX_TOKENS = 8192
CONTEXT = 512
HELD_OUT_SHARE = 8
"""One sequence in this many measures the tau curve and fits nothing."""

CURVE_TAUS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.995, 1.0)

RIDGE = 1e-2
"""Of the mean variance of a layer's inputs."""
SHARPNESS = (0.1, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0, 1.4, 2.0)
"""Candidate factors on the predicted log cost. 1 makes the softmax the share of the cost, 0 uniform."""
ANCHOR_TAU, ANCHOR_SPARSITY = 0.8, 0.5
"""Each layer's sharpness is chosen so that the model loses least at this tau, leaving out this share of experts."""
SHARPNESS_TOKENS = 512

SATURATING_BIAS = 32.0
"""Router bias under the sigmoid gate: exact in bfloat16, the same for all experts (so the softmax does not see it), and
the sigmoid of 32 + any logit this module fits is 1."""


@dataclass
class _Observation:
    """What one layer showed while the model read the text."""

    inputs: list[Tensor] = field(default_factory=list)
    """Of the feed-forward layer, [N, H] each, in the model's dtype."""
    fisher: Tensor | None = None
    """Sum of g g' over tokens, float32 [H, H]."""


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

    The function at tau >= 1 stays what it was. Under the sigmoid gate the fitted routers saturate the gates by a
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
        UsageError: arguments out of range, text missing or too short, threshold selection, or trained sigmoid gates.
        CheckpointError, ConfigError: not a valid checkpoint.
    """
    summary = validate_checkpoint(checkpoint)
    prunepath = summary.prunepath
    if prunepath.selection != "cumulative_mass":
        raise UsageError(f"{checkpoint}: selection {prunepath.selection!r} has no tau to calibrate for")
    if dense_positions is not None and dense_positions < 0:
        raise UsageError(f"dense positions: {dense_positions}; expected 0 or more")
    check_device(device)
    dense_positions = prunepath.dense_positions if dense_positions is None else dense_positions
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    length = sequence_length(summary.family, summary.config, context, default=CONTEXT)
    if length <= dense_positions:
        raise UsageError(f"context: {length}; expected more than the {dense_positions} dense positions")
    # At least one sequence to fit on and one to measure on.
    sequences = read_sequences(tokenizer, text, length=length, max_tokens=max_tokens, minimum=2)

    model = load_model(summary, device)
    factor = _output_factor(model, summary)
    held_out = max(1, len(sequences) // HELD_OUT_SHARE)
    # A causal model's first token is its attention sink: its costs, orders of magnitude above all others, would decide.
    skip = max(dense_positions, int(summary.family.auto_class == "AutoModelForCausalLM"))
    observations = _observe(model, summary, sequences[:-held_out], skip=skip, seed=seed)
    routers = _fit_routers(model, summary, observations)

    updates: dict[str, Tensor | None] = {}
    for layer, weight in enumerate(routers):
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
        check_finite(f"{name}.weight", router.weight)
        updates[f"{name}.weight"] = router.weight
        updates[f"{name}.bias"] = bias
    model.base_model.prunepath = prunepath.model_copy(update=dict(dense_positions=dense_positions))
    curve = _measure_curve(model, sequences[-held_out:])
    rewrite_checkpoint(summary, updates, dense_positions=dense_positions, tau_curve=curve)
    return curve


def sequence_length(family: Family, config: Mapping[str, Any], wanted: int | None = None, *, default: int) -> int:
    """Tokens per sequence: `wanted`, or `default` where the model of a config.json can take that many.

    Raises:
        UsageError: `wanted` is below 2 or more than the model takes.
    """
    field_name = "n_positions" if family.name == "gpt2" else "max_position_embeddings"
    limit = int(config.get(field_name, default))
    if family.name == "roberta":
        limit -= int(config.get("pad_token_id", 1)) + 1  # its position table starts behind the padding's row
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


def _observe(
    model: PreTrainedModel, summary: CheckpointSummary, sequences: Tensor, *, skip: int, seed: int
) -> list[_Observation]:
    """Run the model with every expert; keep each layer's inputs and, from every second sequence, its Fisher matrix."""
    observations = [_Observation() for _ in range(summary.num_layers)]
    handles = []
    for layer, seen in enumerate(observations):

        def keep_input(module: nn.Module, args: tuple[Tensor, Tensor], seen: _Observation = seen) -> None:
            seen.inputs.append(args[0].detach()[:, skip:].flatten(0, 1))

        def keep_gradient(gradient: Tensor, seen: _Observation) -> None:
            gradient = gradient[:, skip:].flatten(0, 1).float()
            product = gradient.T @ gradient
            seen.fisher = product if seen.fisher is None else seen.fisher + product

        def watch_output(module: nn.Module, args: object, output: Tensor, seen: _Observation = seen) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: keep_gradient(gradient, seen))

        router, down = summary.family.router(layer), summary.family.output(layer)
        handles.append(model.get_submodule(router).register_forward_pre_hook(keep_input))
        handles.append(model.get_submodule(down).register_forward_hook(watch_output))

    generator = torch.Generator().manual_seed(seed)
    embed = model.get_input_embeddings()
    for index, sequence in enumerate(tqdm(sequences, desc="reading the text", unit="sequence")):
        with torch.set_grad_enabled(index % 2 == 0):
            embeddings = embed(sequence[None].to(model.device)).requires_grad_(index % 2 == 0)
            logits = model(inputs_embeds=embeddings, tau=DENSE_TAU).logits.flatten(0, -2).float()
            if index % 2 == 0:
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
                F.cross_entropy(logits, drawn[:, 0].to(logits.device), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return observations


@torch.no_grad()
def _fit_routers(
    model: PreTrainedModel, summary: CheckpointSummary, observations: Sequence[_Observation]
) -> list[Tensor]:
    """One float32 router weight [E, H] per layer."""
    weights: list[Tensor] = []
    sparsities, losses = [], []
    for layer, seen in enumerate(tqdm(observations, desc="fitting routers", unit="layer")):
        inputs, metric = torch.cat(seen.inputs), seen.fisher
        if metric is None or not metric.any():  # a classifier with one label has no gradient: count the norm instead
            metric = torch.eye(inputs.shape[-1], device=inputs.device)
        experts = _neurons(model, summary, layer, inputs).float().unflatten(-1, (summary.prunepath.num_experts, -1))
        down = model.get_submodule(summary.family.output(layer)).weight.float()
        down = down if summary.family.conv1d else down.T  # [F, H]
        weight = fit_router(inputs, leaving_out_costs(experts, down, metric))
        weights.append(weight)

        few = torch.linspace(0, len(inputs) - 1, SHARPNESS_TOKENS).long().unique()
        sparsity, loss = _sharpness_losses(inputs[few], experts[few], down, metric, weight)
        sparsities.append(sparsity)
        losses.append(loss)
    chosen = choose_sharpness(torch.stack(sparsities), torch.stack(losses))
    return [weight * SHARPNESS[index] for weight, index in zip(weights, chosen, strict=True)]


def _neurons(model: PreTrainedModel, summary: CheckpointSummary, layer: int, inputs: Tensor) -> Tensor:
    """Activations after the non-linearity, [N, F]."""
    activation = ACT2FN[summary.family.activation(summary.config)]
    first, *up = (model.get_submodule(name)(inputs) for name in summary.family.inputs(layer))
    return activation(first) * up[0] if up else activation(first)


def leaving_out_costs(experts: Tensor, down: Tensor, metric: Tensor) -> Tensor:
    """y_e' M y_e of every expert's output y_e.

    Args:
        experts: neurons after the non-linearity, float32 [N, E, D].
        down: the second linear, float32 [F, H].
        metric: M, float32 [H, H], symmetric and positive semi-definite.

    Returns:
        float32 [N, E].
    """
    down = down.unflatten(0, experts.shape[1:])  # [E, D, H]
    quadratic = down @ metric @ down.transpose(1, 2)  # [E, D, D]
    return (torch.einsum("ned,edf->nef", experts, quadratic) * experts).sum(-1).clamp_min(0)


def fit_router(inputs: Tensor, costs: Tensor) -> Tensor:
    """Ridge regression, without intercept, of each expert's log cost relative to its token's mean log cost.

    Args:
        inputs: [N, H].
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


def _sharpness_losses(
    inputs: Tensor, experts: Tensor, down: Tensor, metric: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """FFN sparsity and mean cost of what is left out at the anchor tau, each [candidates], by sharpness."""
    logits = reference.router_logits(inputs, weight)
    tau = torch.tensor(ANCHOR_TAU, device=inputs.device)
    sparsities, losses = [], []
    for sharpness in SHARPNESS:
        left_out = ~reference.select_cumulative_mass(logits * sharpness, tau)
        missing = reference.scale_neurons(experts.flatten(1), left_out.float()) @ down
        sparsities.append(left_out.float().mean())
        losses.append(((missing @ metric) * missing).sum(-1).mean())
    return torch.stack(sparsities).cpu(), torch.stack(losses).cpu()


def choose_sharpness(sparsities: Tensor, losses: Tensor) -> list[int]:
    """The candidate of each layer that minimises the summed loss at a mean sparsity of ANCHOR_SPARSITY.

    Args:
        sparsities: float32 [L, candidates].
        losses: float32 [L, candidates].

    Returns:
        L indices: each layer's minimum of loss - price * sparsity, at the lowest price that reaches the mean sparsity.
    """
    low, high = 0.0, float(losses.max() / 1e-3)
    for _ in range(60):
        price = (low + high) / 2
        chosen = (losses - price * sparsities).argmin(dim=1, keepdim=True)
        if sparsities.gather(1, chosen).mean() < ANCHOR_SPARSITY:
            low = price
        else:
            high = price
    return (losses - high * sparsities).argmin(dim=1).tolist()


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
