"""Figures of an evaluation's results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunepath_vllm.errors import UsageError


def new_figure(columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its axes, side by side.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("matplotlib is not installed; expected prunepath-vllm[eval]") from None
    figure = Figure(figsize=(6 * columns, 4), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure; the suffix chooses the format.

    Raises:
        UsageError: matplotlib cannot write that format.
    """
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise UsageError(f"plot {path}: {error}") from None


def plot_points(result: Mapping[str, Any], metric: str, path: str | Path) -> None:
    """Draw a metric against FFN sparsity, with its intervals; a dense model is a horizontal line.

    Args:
        result: what ``Run.results`` returns.
        metric: a key of its points.
        path: file to write; its suffix chooses the format.

    Raises:
        UsageError: matplotlib is missing, or cannot write that format.
    """
    figure, (axes,) = new_figure()
    points = [
        dict(tau=point["tau"], ffn_sparsity=point["ffn_sparsity"], value=point[metric], low=low, high=high)
        for point, (low, high) in (
            (p, one[metric]) for p, one in zip(result["points"], result["intervals"], strict=True)
        )
    ]
    sparse = any(point["tau"] is not None for point in points)
    draw_points(axes, points, "PrunePath, by tau" if sparse else "dense", taus=True)
    axes.set(xlabel="FFN sparsity", ylabel=metric, title=f"{result['checkpoint']}: {result['task']}")
    axes.legend()
    save_figure(figure, path)


def draw_points(axes: Any, points: Sequence[Mapping[str, Any]], label: str, *, taus: bool) -> None:
    """Draw one method's points on `axes`, with their intervals; a dense model is a horizontal line.

    Args:
        axes: matplotlib's.
        points: tau (None: dense), ffn_sparsity, value, low and high (None: no interval); "pruned" where a dense one
            has a place on the line.
        label: in the legend.
        taus: write each point's tau beside it.
    """
    dense = [point for point in points if point["tau"] is None and not point.get("pruned")]
    for point in dense:
        name = label if len(points) == len(dense) else "dense"
        axes.axhline(point["value"], linestyle="--", color="gray", label=name)
    line = sorted((point for point in points if point not in dense), key=lambda point: point["ffn_sparsity"])
    if not line:
        return
    x, y = [point["ffn_sparsity"] for point in line], [point["value"] for point in line]
    # The percentile interval of a skewed statistic may leave its value outside.
    low = [max(0.0, point["value"] - (point["value"] if point["low"] is None else point["low"])) for point in line]
    high = [max(0.0, (point["value"] if point["high"] is None else point["high"]) - point["value"]) for point in line]
    axes.errorbar(x, y, yerr=[low, high], marker="o", capsize=3, label=label)
    for point in line:
        if taus and point["tau"] is not None:
            place = (point["ffn_sparsity"], point["value"])
            axes.annotate(f"{point['tau']:g}", place, textcoords="offset points", xytext=(4, 4), fontsize=7)


def plot_sweep(result: Mapping[str, Any], metric: str, path: str | Path) -> None:
    """Draw a sweep: quality against FFN sparsity, and against decode speed where it was measured.

    Points that another beats in both are hollow; the line joins the others, the Pareto front; a star is the tau that
    the sweep recommends.

    Args:
        result: what ``sweep`` returns.
        metric: a key of its points.
        path: file to write; its suffix chooses the format.

    Raises:
        UsageError: matplotlib is missing, or cannot write that format.
    """
    columns = [("ffn_sparsity", "FFN sparsity")]
    if any(point.get("tokens_per_second") for point in result["points"]):
        columns.append(("tokens_per_second", "decode tokens/s, batch 1"))
    figure, panels = new_figure(len(columns))
    for axes, (column, title) in zip(panels, columns, strict=True):
        points = [point for point in result["points"] if point.get(column) is not None]
        front = pareto_front([(point[column], -point["loss"]) for point in points])
        joined = sorted((points[i][column], points[i][metric]) for i in front)
        axes.plot(*zip(*joined, strict=True), "o-", label="Pareto front")
        others = [point for i, point in enumerate(points) if i not in front]
        axes.plot([p[column] for p in others], [p[metric] for p in others], "o", mfc="none", color="gray")
        for point in points:
            label = "dense" if point["tau"] is None else f"{point['tau']:g}"
            place = (point[column], point[metric])
            axes.annotate(label, place, textcoords="offset points", xytext=(4, 4), fontsize=7)
            if point["tau"] == result["recommended"]["tau"]:
                axes.plot(*place, "*", markersize=14, label=f"recommended: tau {label}")
        axes.set(xlabel=title, ylabel=metric)
        axes.legend()
    panels[0].set_title(f"{result['checkpoint']}, loss of at most {result['max_loss']:.1%}")
    save_figure(figure, path)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one equals or beats in both numbers, more being better; in their order."""
    front = []
    for i, (x, y) in enumerate(points):
        beaten = any(u >= x and v >= y and ((u, v) != (x, y) or j < i) for j, (u, v) in enumerate(points) if j != i)
        if not beaten:
            front.append(i)
    return front
