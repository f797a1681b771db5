"""Perplexity against FFN sparsity of several trainings and baselines: one figure and one Markdown table.

    python -m prunepath_vllm.benchmarks.training_curves --dense dense=runs/dense/model/quality.json \\
        --curve full=runs/full/model/quality.json --models Wanda=wanda50.json@0.5,wanda70.json@0.7 --plot out.png

Reads what a training leaves in quality.json, or what ``prunepath eval --task wikitext --output`` writes.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from prunepath_vllm.benchmarks.report import markdown
from prunepath_vllm.checkpoint import read_json
from prunepath_vllm.errors import PrunePathError, UsageError
from prunepath_vllm.evaluation.figures import read_share, split_label
from prunepath_vllm.evaluation.plots import new_figure, save_figure

SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
TOP = 100
"""Where the figure ends, relative to the dense model: what is beyond is of no use, and would flatten the rest."""
Curve = list[tuple[float, float]]
"""(FFN sparsity, perplexity), ascending in sparsity."""


def read_curve(path: str, metric: str = "perplexity") -> Curve:
    """Every point of one file: FFN sparsity and the metric.

    Raises:
        UsageError: no such file, or it does not hold the metric.
        CheckpointError: not JSON.
    """
    if not Path(path).is_file():
        raise UsageError(f"{path}: no such file; expected quality.json of a training, or results of prunepath eval")
    points: Any = read_json(Path(path)).get("points")
    try:
        # A share counted in float32 may differ from 0 in its last bit.
        return sorted((round(float(point["ffn_sparsity"]), 6), float(point[metric])) for point in points)
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path}: expected points with an ffn_sparsity and a {metric}") from None


def read_models(files: str) -> Curve:
    """One point of each of several files, FILE or FILE@SPARSITY, separated by commas: models with one sparsity each.

    A file's sparsest point counts; @SPARSITY says the sparsity where the model was pruned and measured as a dense one.

    Raises:
        UsageError: as :func:`read_curve`, or a sparsity outside [0, 1).
    """
    curve = []
    for entry in files.split(","):
        path, _, given = entry.partition("@")
        sparsity, perplexity = read_curve(path)[-1]
        if given:
            sparsity = read_share(entry, given)
        curve.append((sparsity, perplexity))
    return sorted(curve)


def perplexity_at(curve: Curve, sparsity: float) -> float | None:
    """Log perplexity is taken as linear in sparsity between neighbours; None outside of what was measured."""
    for (low, below), (high, above) in pairwise(curve):
        if low <= sparsity <= high and low < high:
            share = (sparsity - low) / (high - low)
            return math.exp((1 - share) * math.log(below) + share * math.log(above))
    return next((perplexity for measured, perplexity in curve if measured == sparsity), None)


def table(curves: Mapping[str, Curve], dense: float, *, sparsities: Sequence[float] = SPARSITIES) -> str:
    """Markdown: a row a method, a column a sparsity; perplexity and, in brackets, its ratio to the dense model's."""
    rows = []
    for label, curve in curves.items():
        values = [perplexity_at(curve, sparsity) for sparsity in sparsities]
        rows.append([label, *("-" if v is None else f"{v:,.4g} ({v / dense:.3g})" for v in values)])
    return markdown(["method", *(f"{sparsity:g}" for sparsity in sparsities)], rows)


def plot(curves: Mapping[str, Curve], dense: tuple[str, float], path: str) -> None:
    """Draw every curve on a logarithmic axis that ends at TOP; the dense model is a horizontal line.

    Raises:
        UsageError: matplotlib is missing, or cannot write that format.
    """
    figure, (axes,) = new_figure()
    axes.axhline(dense[1], linestyle="--", color="gray", label=dense[0])
    for label, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=label)
    axes.set(
        xlabel="FFN sparsity", ylabel="perplexity", yscale="log", xlim=(0, 1), ylim=(0.9 * dense[1], TOP * dense[1])
    )
    axes.legend()
    save_figure(figure, path)


def run(argv: Sequence[str] | None = None) -> None:
    """Print the table; write it and the figure where asked."""
    parser = argparse.ArgumentParser(prog="training_curves", description=__doc__.splitlines()[0])
    parser.add_argument("--dense", required=True, metavar="LABEL=FILE", help="the dense model to compare with")
    parser.add_argument("--curve", action="append", default=[], metavar="LABEL=FILE", help="one model, many taus")
    parser.add_argument(
        "--models", action="append", default=[], metavar="LABEL=FILE[@SPARSITY],...", help="a model for each sparsity"
    )
    parser.add_argument("--table", metavar="FILE", help="write the table here as well")
    parser.add_argument("--plot", metavar="FILE", help="write the figure (.png, .pdf, .svg)")
    args = parser.parse_args(argv)
    label, file = split_label(args.dense)
    sparsity, dense = read_curve(file)[0]
    if sparsity != 0:
        raise UsageError(f"--dense {file}: FFN sparsity {sparsity:g}; expected a dense model's, 0")
    curves = {name: read_curve(path) for name, path in map(split_label, args.curve)}
    curves |= {name: read_models(files) for name, files in map(split_label, args.models)}
    text = f"Perplexity (ratio to {label}'s {dense:.4g}) by FFN sparsity:\n\n{table(curves, dense)}\n"
    print(text)
    if args.table:
        Path(args.table).write_text(text, encoding="utf-8")
    if args.plot:
        plot(curves, (label, dense), args.plot)


if __name__ == "__main__":
    try:
        run()
    except PrunePathError as error:
        raise SystemExit(f"training_curves: {error}") from None
