"""What it costs to leave an expert out, and how sharply each layer should tell its experts apart.

The cost of leaving out expert e at one token is y_e' F y_e: y_e is the expert's output, F the mean outer product of the
loss gradients at the layer's output (the Fisher matrix, labels drawn from the model itself). It estimates the rise in
loss, so it compares experts of one layer and layers with one another. Calibration fits routers to it, training teaches
it to them. benchmarks/results/NOTES.md has the measurements.

Shapes: N tokens, H hidden size, E experts, D neurons per expert, F = E * D.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from prunepath_vllm.errors import CheckpointError
from prunepath_vllm.families import Family
from prunepath_vllm.kernels import reference
from prunepath_vllm.modeling.quantised import QuantisedLinear
from prunepath_vllm.tau import DENSE_TAU

SHARPNESS = (0.1, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0, 1.4, 2.0)
"""Candidate factors on the log cost. 1 makes the softmax the share of the cost, 0 uniform."""
ANCHOR_TAU, ANCHOR_SPARSITY = 0.8, 0.5
"""Each layer's sharpness is chosen so that the model loses least at this tau, leaving out this share of experts."""
SHARPNESS_TOKENS = 512


@dataclass
class Observation:
    """What one layer showed while the model read a text."""

    inputs: list[Tensor] = field(default_factory=list)
    """Of the feed-forward layer, [N, H] each, in the model's dtype."""
    router_inputs: list[Tensor] = field(default_factory=list)
    """What its router read, likewise: the same, or the inputs of the block's self-attention."""
    fisher: Tensor | None = None
    """Sum of g g' over tokens, float32 [H, H]."""

    def metric(self) -> Tensor:
        """The Fisher matrix, or the identity where nothing had a gradient (a classifier with one label)."""
        if self.fisher is None or not self.fisher.any():
            return torch.eye(self.inputs[0].shape[-1], device=self.inputs[0].device)
        return self.fisher


def positions_to_skip(family: Family, dense_positions: int) -> int:
    """Positions at the beginning of a sequence that count nowhere.

    Those that use every expert anyway, and a causal model's first: the attention sink's costs, orders of magnitude
    above all others, would decide.
    """
    return max(dense_positions, int(family.auto_class == "AutoModelForCausalLM"))


def observe(
    model: PreTrainedModel, family: Family, sequences: Sequence[Tensor] | Tensor, *, skip: int, seed: int
) -> list[Observation]:
    """Run a model with every expert; keep each layer's inputs and, from every second sequence, its Fisher matrix.

    Args:
        model: PrunePath model, frozen, in evaluation mode.
        family: its row.
        sequences: token ids, int64 [S] each.
        skip: of :func:`positions_to_skip`.
        seed: of the labels drawn for the loss gradients.
    """
    observations = [Observation() for _ in range(model.config.num_hidden_layers)]
    handles = []
    for layer, seen in enumerate(observations):

        def keep_input(module: nn.Module, args: tuple[Tensor, ...], kept: list[Tensor]) -> None:
            kept.append(args[0].detach()[:, skip:].flatten(0, 1))

        def keep_gradient(gradient: Tensor, seen: Observation) -> None:
            gradient = gradient[:, skip:].flatten(0, 1).float()
            product = gradient.T @ gradient
            seen.fisher = product if seen.fisher is None else seen.fisher + product

        def watch_output(module: nn.Module, args: object, output: Tensor, seen: Observation = seen) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: keep_gradient(gradient, seen))

        for name, kept in ((family.ffn.format(layer), seen.inputs), (family.router(layer), seen.router_inputs)):
            hook = functools.partial(keep_input, kept=kept)
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        handles.append(model.get_submodule(family.output(layer)).register_forward_hook(watch_output))

    generator = torch.Generator().manual_seed(seed)
    embed = model.get_input_embeddings()
    for index, sequence in enumerate(tqdm(sequences, desc="reading the text", unit="sequence")):
        with torch.set_grad_enabled(index % 2 == 0):
            embeddings = embed(sequence[None].to(model.device)).requires_grad_(index % 2 == 0)
            logits = model(inputs_embeds=embeddings, tau=DENSE_TAU).logits.flatten(0, -2).float()
            if index % 2 == 0:
                backpropagate_drawn_labels(logits, generator)
    for handle in handles:
        handle.remove()
    return observations


def backpropagate_drawn_labels(logits: Tensor, generator: torch.Generator) -> None:
    """Backpropagate the loss of labels drawn from a model's own output, summed over its rows: float32 [N, classes].

    Raises:
        CheckpointError: logits that are not finite.
    """
    if not logits.isfinite().all():
        raise CheckpointError("the model's logits on the text are NaN or infinite; expected finite ones")
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
    F.cross_entropy(logits, drawn[:, 0].to(logits.device), reduction="sum").backward()


def experts_of(model: PreTrainedModel, family: Family, layer: int, inputs: Tensor, num_experts: int) -> Tensor:
    """A feed-forward layer's neurons after the non-linearity, float32 [N, E, D], of its inputs [N, H]."""
    activation = ACT2FN[family.activation(model.config.to_dict())]
    first, *up = (model.get_submodule(name)(inputs) for name in family.inputs(layer))
    neurons = activation(first) * up[0] if up else activation(first)
    return neurons.float().unflatten(-1, (num_experts, -1))


def output_rows(model: PreTrainedModel, family: Family, layer: int) -> Tensor:
    """The second linear of a feed-forward layer, a row a neuron: [F, H] in its dtype; float32 if quantised."""
    linear: Any = model.get_submodule(family.output(layer))
    return family.out_in(linear.dequantised() if isinstance(linear, QuantisedLinear) else linear.weight).T


def evenly_spread(count: int, wanted: int) -> Tensor:
    """Indices of at most `wanted` out of `count`, ascending."""
    return torch.linspace(0, count - 1, wanted).long().unique()


def few(tokens: Tensor) -> Tensor:
    """At most SHARPNESS_TOKENS rows of [N, ...]."""
    return tokens[evenly_spread(len(tokens), SHARPNESS_TOKENS)]


def log_costs(values: Tensor) -> Tensor:
    """Logarithm of costs [..., E], above a floor far below their token's mean: a dead expert's would be infinite."""
    floor = 1e-8 * values.mean(dim=-1, keepdim=True) + torch.finfo(torch.float32).tiny
    return (values + floor).log()


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


def sharpness_losses(logits: Tensor, experts: Tensor, down: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """FFN sparsity and mean cost of what is left out at the anchor tau, by sharpness.

    Args:
        logits: what ranks the experts before they are sharpened, float32 [N, E].
        experts: neurons after the non-linearity, float32 [N, E, D].
        down: the second linear, float32 [F, H].
        metric: M, float32 [H, H].

    Returns:
        two float32 [candidates], on the CPU.
    """
    tau = torch.tensor(ANCHOR_TAU, device=logits.device)
    sparsities, losses = [], []
    for sharpness in SHARPNESS:
        left_out = ~reference.select_cumulative_mass(logits * sharpness, tau)
        missing = reference.scale_neurons(experts.flatten(1), left_out.float()) @ down
        sparsities.append(left_out.float().mean())
        losses.append(((missing @ metric) * missing).sum(-1).mean())
    return torch.stack(sparsities).cpu(), torch.stack(losses).cpu()


def sharpness_by_layer(measured: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """The sharpness of every layer, chosen together from its :func:`sharpness_losses`."""
    sparsities, losses = (torch.stack(part) for part in zip(*measured, strict=True))
    return [SHARPNESS[index] for index in choose_sharpness(sparsities, losses)]


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
