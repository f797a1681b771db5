"""Cross-entropy over a large vocabulary without keeping its logits: the head's product and the loss, chunk by chunk.

Shapes: N positions, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a position without a loss."""
CHUNK = 8192
"""Positions whose logits exist at a time."""


def _chunk_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None, share: float) -> tuple[Tensor, Tensor]:
    """Summed loss of some positions, and its gradient in their logits, in the logits' dtype."""
    wide = logits.float()
    largest = wide.amax(dim=-1, keepdim=True)
    log_total = (wide - largest).exp().sum(dim=-1, keepdim=True).log() + largest
    kept = labels != IGNORED
    label = torch.where(kept, labels, 0).unsqueeze(-1)
    loss = (log_total - wide.gather(-1, label)).squeeze(-1)
    gradient = (wide - log_total).exp()
    hit = torch.arange(logits.shape[-1], device=logits.device) == label
    if teacher is None:
        gradient = gradient - hit.float()
    else:
        # Cross-entropy to (1 - share) * label + share * teacher.
        target = teacher.float().softmax(dim=-1)
        loss = (1 - share) * loss + share * (log_total.squeeze(-1) - (target * wide).sum(dim=-1))
        gradient = gradient - (1 - share) * hit.float() - share * target
    loss = torch.where(kept, loss, 0.0).sum()
    return loss, torch.where(kept.unsqueeze(-1), gradient, 0.0).to(logits.dtype)


_compiled_chunk_loss: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_chunk_loss, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        share: float,
        compiled: bool,
        needs_gradient: bool,
    ) -> Tensor:
        chunk_loss = _compiled_chunk_loss if compiled else _chunk_loss
        count = (labels != IGNORED).sum().clamp_min(1)
        head = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradients = []
        head_gradient = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            teacher = None
            if teacher_hidden is not None and teacher_weight is not None:
                teacher = teacher_hidden[part] @ teacher_weight.to(teacher_hidden.dtype).T
            loss, gradient = chunk_loss(hidden[part] @ head.T, labels[part], teacher, share)
            total += loss
            if needs_gradient:
                hidden_gradients.append(gradient @ head)
            if head_gradient is not None:
                head_gradient += gradient.T @ hidden[part]
        if needs_gradient:
            if head_gradient is not None:
                head_gradient = (head_gradient / count).to(weight.dtype)
            ctx.save_for_backward(torch.cat(hidden_gradients) / count, head_gradient)
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        (scale,) = gradients
        head = None if weight is None else weight * scale.to(weight.dtype)  # a frozen head
        return hidden * scale.to(hidden.dtype), head, None, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    teacher: tuple[Tensor, Tensor] | None = None,
    share: float = 0.0,
    compiled: bool = False,
) -> Tensor:
    """Mean cross-entropy of softmax(hidden weight') over the positions that have a label.

    The gradient is computed with the loss, so that no chunk's logits are kept or computed twice.

    Args:
        hidden: [N, H]; the logits are computed in its dtype, the loss in float32.
        weight: the head, [V, H], any float dtype.
        labels: int64 [N], -100 where no loss is taken.
        teacher: (hidden states [N, H'], head [V, H']) of a model to distil; no gradient reaches it.
        share: of the teacher's distribution in the target; the label has the rest.
        compiled: fuse the loss of a chunk with torch.compile.

    Returns:
        float32 scalar.
    """
    states, head = teacher if teacher is not None else (None, None)
    with torch.autocast(hidden.device.type, enabled=False):
        # Inside the function gradients are always off.
        needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return _LinearCrossEntropy.apply(hidden, weight, labels, states, head, share, compiled, needed)


def shifted(labels: Tensor) -> Tensor:
    """What each position predicts: labels [B, S] moved one to the left, the last without one; flat [B * S]."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
