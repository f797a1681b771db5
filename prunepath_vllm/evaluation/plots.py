"""Figures of an evaluation's results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunepath_vllm.errors import UsageError


def plot_points(result: Mapping[str, Any], metric: str, path: str | Path, *, recommended: float | None = None) -> None:
    """Draw a metric against FFN sparsity, with its intervals; a dense model is a horizontal line.

    Args:
        result: what ``Run.results`` returns.
        metric: a key of its points.
        path: file to write; its suffix chooses the format.
        recommended: a tau to mark.

    Raises:
        UsageError: matplotlib is missing, or cannot write that format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("matplotlib is not installed; expected prunepath-vllm[eval]") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    sparse = []
    for point, interval in zip(result["points"], result["intervals"], strict=True):
        if point["tau"] is None:
            axes.axhline(point[metric], linestyle="--", color="gray", label="dense")
        else:
            sparse.append((point["ffn_sparsity"], point[metric], *interval[metric], point["tau"]))
    if sparse:
        x, y, low, high, taus = map(list, zip(*sorted(sparse), strict=True))
        # The percentile interval of a skewed statistic may leave its value outside.
        below = [max(0.0, value - edge) for value, edge in zip(y, low, strict=True)]
        above = [max(0.0, edge - value) for value, edge in zip(y, high, strict=True)]
        axes.errorbar(x, y, yerr=[below, above], marker="o", capsize=3, label="PrunePath, by tau")
        for sparsity, value, tau in zip(x, y, taus, strict=True):
            axes.annotate(f"{tau:g}", (sparsity, value), textcoords="offset points", xytext=(4, 4), fontsize=7)
            if tau == recommended:
                axes.plot(sparsity, value, "*", markersize=14, label=f"recommended tau {tau:g}")
    axes.set(xlabel="FFN sparsity", ylabel=metric, title=f"{result['checkpoint']}: {result['task']}")
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise UsageError(f"--plot {path}: {error}") from None
