"""Low-rank updates of a model's linears: W + up down, trained with W frozen; small enough to ship as an adapter."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunepath_vllm.modeling.routing import Router


class LowRankLinear(nn.Module):
    """A linear whose weight is frozen and whose update is a product of two thin matrices.

    The update is added to the weight before the product with the tokens: with many tokens that costs less than two
    more products a token. A bias, if any, is trained whole.
    """

    def __init__(self, linear: nn.Module, rank: int) -> None:
        """Take over `linear` (nn.Linear, or GPT-2's Conv1D); the function does not change: up starts at 0."""
        super().__init__()
        base: Any = linear
        self.conv1d = isinstance(linear, Conv1D)
        self.base = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.bias = base.bias
        outputs, inputs = self.base.T.shape if self.conv1d else self.base.shape
        options: dict[str, Any] = dict(device=self.base.device, dtype=torch.float32)
        self.up = nn.Parameter(torch.zeros(outputs, rank, **options))
        self.down = nn.Parameter(torch.randn(rank, inputs, **options) * inputs**-0.5)

    @property
    def weight(self) -> Tensor:
        """The updated weight, in the layout of the linear it stands for."""
        update = self.up @ self.down
        return self.base + (update.T if self.conv1d else update)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] to [..., outputs]."""
        weight = self.weight
        return F.linear(x, weight.T if self.conv1d else weight, self.bias)


def add_low_rank(model: PreTrainedModel, rank: int) -> dict[str, LowRankLinear]:
    """Replace every linear of a model's backbone by a low-rank one and freeze its embeddings and language head.

    Routers, norms, biases and a classification head stay trainable.

    Args:
        model: causal or a sequence classifier.
        rank: of every update.

    Returns:
        Name in the backbone -> the new module.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    if head is not None:
        head.requires_grad_(False)
    routers = {id(p) for module in backbone.modules() if isinstance(module, Router) for p in module.parameters()}
    linears = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in routers
    }
    for parameter in backbone.parameters():
        if parameter.dim() > 1 and id(parameter) not in routers:
            parameter.requires_grad_(False)
    replaced: dict[str, LowRankLinear] = {}
    for name, linear in linears.items():
        parent, _, attribute = name.rpartition(".")
        replaced[name] = LowRankLinear(linear, rank)
        setattr(backbone.get_submodule(parent), attribute, replaced[name])
    return replaced


@torch.no_grad()
def merge_low_rank(backbone: nn.Module) -> None:
    """Put plain linears back, their updates added; the function stays what it was."""
    for name, module in [(n, m) for n, m in backbone.named_modules() if isinstance(m, LowRankLinear)]:
        weight = nn.Parameter(module.weight)
        plain: Any
        if module.conv1d:
            plain = Conv1D(weight.shape[1], weight.shape[0])
        else:
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
        plain.weight, plain.bias = weight, module.bias
        parent, _, attribute = name.rpartition(".")
        setattr(backbone.get_submodule(parent), attribute, plain)
