"""Quality against FFN sparsity of a model in training or just trained, on held-out data."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from prunepath_vllm.training.model import TrainingModel

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Point:
    """Quality at one tau."""

    tau: float | None
    """None for a dense model."""
    ffn_sparsity: float
    """Eq. 15."""
    loss: float
    perplexity: float | None
    """Of a causal model."""
    accuracy: float | None
    """Of a classifier."""


@torch.no_grad()
def measure(
    training: TrainingModel, batches: Sequence[Batch], taus: Iterable[float | None], *, progress: bool = False
) -> list[Point]:
    """Quality at each tau, with the layers uncompiled, in the precision the caller has set.

    Args:
        training: the model; a dense one takes the taus [None].
        batches: of the collators in data.py, on any device; equally long sequences weigh alike.
        taus: each in (0, 1.05].
        progress: show a progress bar.
    """
    was_training = training.training
    training.eval()
    device = next(training.parameters()).device
    points: list[Point] = []
    taus = list(taus)
    with (
        torch.compiler.set_stance("force_eager"),
        tqdm(total=len(taus) * len(batches), desc="measuring quality", unit="batch", disable=not progress) as bar,
    ):
        for tau in taus:
            loss, sparsity, hits, count = 0.0, 0.0, 0, 0
            for batch in batches:
                output = training(**{key: value.to(device) for key, value in batch.items()}, tau=tau)
                size = len(batch["labels"])
                loss += float(output["task"]) * size
                sparsity += (1 - float(training.usage().double().mean())) * size if training.observers else 0.0
                if "logits" in output:
                    hits += int((output["logits"].argmax(dim=-1).cpu() == batch["labels"].cpu()).sum())
                count += size
                bar.update()
            mean = loss / count
            points.append(
                Point(
                    tau=tau,
                    ffn_sparsity=sparsity / count,
                    loss=mean,
                    perplexity=math.exp(min(mean, 100.0)) if training.causal else None,
                    accuracy=None if training.causal else hits / count,
                )
            )
    training.train(was_training)
    return points
