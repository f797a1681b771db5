"""Metrics as functions of mean per-item statistics, and bootstrap intervals of them."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Statistics = Mapping[str, float]
"""One item's contribution, or the mean over items."""

RESAMPLES = 1000
LEVEL = 0.95
LARGEST_NLL = 100.0


def _f1(mean: Statistics) -> float:
    counted = 2 * mean["true_positive"] + mean["false_positive"] + mean["false_negative"]
    return 2 * mean["true_positive"] / counted if counted else 0.0


METRICS: dict[str, Callable[[Statistics], float]] = {
    "perplexity": lambda mean: math.exp(min(mean["nll"] / mean["predicted"], LARGEST_NLL)),
    "accuracy": lambda mean: mean["accuracy"],
    "accuracy_norm": lambda mean: mean["accuracy_norm"],
    "f1": _f1,
    "rouge_l": lambda mean: mean["rouge_l"],
    "recall": lambda mean: mean["recall"],
}
"""Every metric, from the mean statistics of its items."""


def estimate(items: Sequence[Statistics], metrics: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """Each metric over the items, with the percentile bootstrap interval over items.

    Args:
        items: statistics, the same names in each; at least one.
        metrics: names in METRICS.

    Returns:
        metric -> (value, low, high): the interval covers LEVEL of RESAMPLES resamples, drawn with a fixed seed.
    """
    names = list(items[0])
    table = np.array([[item[name] for name in names] for item in items])  # [items, statistics]

    def value(metric: str, mean: np.ndarray) -> float:
        return float(METRICS[metric](dict(zip(names, mean.tolist(), strict=True))))

    generator = np.random.default_rng(0)
    means = [table[generator.integers(len(table), size=len(table))].mean(axis=0) for _ in range(RESAMPLES)]
    tail = (1 - LEVEL) / 2
    result = {}
    for metric in metrics:
        low, high = np.quantile([value(metric, mean) for mean in means], (tail, 1 - tail)).tolist()
        result[metric] = (value(metric, table.mean(axis=0)), low, high)
    return result
