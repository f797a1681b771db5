"""What the routers are taught: shares of what leaving an expert out costs, measured before a training begins.

Shapes: N tokens, H hidden size, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunepath_vllm.conversion import costs
from prunepath_vllm.families import Family

SEQUENCES, LENGTH = 16, 512
"""How much of the training data is worth reading for it."""


@dataclass(frozen=True)
class LayerCosts:
    """How one layer's contributions are measured."""

    metric: Tensor
    """float32 [H, H], symmetric: leaving out what adds y to the layer's output costs y' M y."""
    sharpness: float
    """The router is taught shares of the cost to this power."""


def layer_costs(
    model: PreTrainedModel, family: Family, num_experts: int, sequences: Sequence[Tensor], *, skip: int, seed: int
) -> list[LayerCosts]:
    """Measure every layer's costs on some text, with every expert active; the model stays as it was.

    The metric is the Fisher matrix of calibration (:mod:`prunepath_vllm.conversion.costs`), with a mean diagonal of 1.
    The sharpness is chosen as there, too, but for experts ranked by their costs themselves: a share of the cost itself
    would leave out nearly all of a layer in which a few experts cost most.

    Args:
        model: PrunePath model.
        family: its row.
        num_experts: E.
        sequences: token ids, int64 [S] each; at most LENGTH of each count.
        skip: of :func:`prunepath_vllm.conversion.costs.positions_to_skip`.
        seed: of the labels drawn for the loss gradients.
    """
    was_training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    short = [sequence[:LENGTH] for sequence in sequences]
    observations = costs.observe(model, family, short, skip=skip, seed=seed)
    metrics, measured = [], []
    with torch.no_grad():
        for layer, seen in enumerate(observations):
            inputs, metric = costs.few(torch.cat(seen.inputs)), seen.metric()
            down = costs.output_rows(model, family, layer).float()
            experts = costs.experts_of(model, family, layer, inputs, num_experts)
            logits = costs.log_costs(costs.leaving_out_costs(experts, down, metric))
            measured.append(costs.sharpness_losses(logits, experts, down, metric))
            metrics.append(metric / metric.diagonal().mean())
    for parameter in trainable:
        parameter.requires_grad_(True)
    model.train(was_training)
    return [LayerCosts(*pair) for pair in zip(metrics, costs.sharpness_by_layer(measured), strict=True)]
