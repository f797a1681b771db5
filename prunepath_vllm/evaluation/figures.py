"""The paper's figures and tables, rebuilt from results of ``prunepath eval``, ``sweep``, ``train`` and ``bench``.

A *series* is one method: a label, and points from one or more files.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunepath_vllm.checkpoint import read_json
from prunepath_vllm.errors import UsageError
from prunepath_vllm.evaluation.plots import draw_points, new_figure, save_figure
from prunepath_vllm.evaluation.rows import finite, read_as
from prunepath_vllm.evaluation.tasks import TASKS
from prunepath_vllm.tau import MAX_TAU


@dataclass(frozen=True)
class Figure:
    """One of the paper's figures of a quality against FFN sparsity."""

    title: str
    metrics: tuple[str, ...]
    """Qualities that belong in it."""
    tasks: tuple[str, ...] = ()
    """Tasks that belong in it; any where empty."""
    taus: bool = False
    """Write each point's tau beside it."""
    panels: bool = False
    """Several tasks, a panel each."""


FIGURES = {
    "fig3": Figure("Figure 3: NLU, accuracy against FFN sparsity", ("accuracy",), panels=True),
    "fig4": Figure("Figure 4: NLG, quality against FFN sparsity", ("rouge_l", "perplexity"), panels=True),
    "fig5": Figure("Figure 5: MMLU by tau", ("accuracy",), ("mmlu",), taus=True),
    "fig7": Figure("Figure 7: experts from pretrained or fine-tuned weights", ("accuracy", "rouge_l", "perplexity")),
    "fig8": Figure("Figure 8: tau swept at inference", ("accuracy", "rouge_l", "perplexity"), taus=True),
    "table2": Figure("Table 2: effect of L_gate", ("accuracy", "accuracy_norm", "perplexity"), taus=True),
}
"""Those drawn from evaluations; fig2 and fig9 have their own."""


def read_series(argument: str) -> dict[str, Any]:
    """One method's points, from LABEL=FILE[@SPARSITY][,FILE...].

    Files are what ``prunepath eval`` or ``sweep`` writes with --output, or a training's quality.json. @SPARSITY is for
    a dense file with one point: a model pruned elsewhere, whose sparsity its evaluation does not know.

    Returns:
        {"label", "points"}; a point has task, metric, tau (None: dense), ffn_sparsity, value, low, high and file.

    Raises:
        UsageError: no label, no such file, a file of another kind, a number in it that is none or out of range, or a
            sparsity that does not fit.
    """
    label, files = split_label(argument)
    points: list[dict[str, Any]] = []
    for entry in files.split(","):
        name, _, sparsity = entry.partition("@")
        found = _read_points(Path(name))
        if sparsity:
            if len(found) != 1 or found[0]["tau"] is not None:
                raise UsageError(f"{entry}: @SPARSITY is for a file with one point, of a dense model")
            found[0] |= dict(ffn_sparsity=read_share(entry, sparsity), pruned=True)
        points += found
    return dict(label=label, points=points)


def _read_points(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected results of prunepath eval, sweep or train")
    content: Any = read_json(path)
    with read_as("results of prunepath eval, sweep or train", path):
        task = content.get("task") or content["data"]
        metric = TASKS[task].metrics[0] if task in TASKS else None
        if metric is None:  # a training's: perplexity of a language model, else accuracy
            metric = "perplexity" if content["points"][0]["perplexity"] is not None else "accuracy"
        intervals = content.get("intervals") or [{metric: (None, None)}] * len(content["points"])
        points = [
            _point(path, point, interval[metric], task, metric)
            for point, interval in zip(content["points"], intervals, strict=True)
        ]
        if not points or not isinstance(task, str):
            raise ValueError
    return points


def _point(path: Path, point: Mapping[str, Any], interval: Sequence[Any], task: str, metric: str) -> dict[str, Any]:
    value = finite(point[metric], metric, path)
    if metric == "perplexity" and value <= 0:
        raise UsageError(f"{path}: perplexity {value}; expected more than 0")
    low, high = (None if bound is None else finite(bound, metric, path) for bound in interval)
    return {
        "task": task,
        "metric": metric,
        "tau": None if point["tau"] is None else finite(point["tau"], "tau", path, 0, MAX_TAU),
        "ffn_sparsity": finite(point["ffn_sparsity"], "ffn_sparsity", path),
        "value": value,
        "low": low,
        "high": high,
        "file": path.name,
    }


def split_label(argument: str, expected: str = "LABEL=FILE, the method's name and its results") -> tuple[str, str]:
    """The two sides of LABEL=FILE.

    Raises:
        UsageError: one is missing; says what was `expected`.
    """
    label, _, value = argument.partition("=")
    if not label or not value:
        raise UsageError(f"{argument}: expected {expected}")
    return label, value


def read_share(entry: str, text: str) -> float:
    """The sparsity behind an entry's @.

    Raises:
        UsageError: it is none; names the entry.
    """
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UsageError(f"{entry}: sparsity {text}; expected a number in [0, 1)")
    return share


def quality_figure(name: str, series: Sequence[Mapping[str, Any]], image: str | Path) -> dict[str, Any]:
    """Draw one of FIGURES.

    Args:
        name: a key of FIGURES.
        series: from :func:`read_series`.
        image: file to write; its suffix chooses the format.

    Returns:
        The figure's data: {"figure", "title", "series"}.

    Raises:
        UsageError: a file whose task or metric does not belong in the figure, or no matplotlib.
    """
    figure = FIGURES[name]
    tasks = list(dict.fromkeys(point["task"] for one in series for point in one["points"]))
    for point in (point for one in series for point in one["points"]):
        if point["metric"] not in figure.metrics or (figure.tasks and point["task"] not in figure.tasks):
            wanted = ", ".join(figure.tasks or figure.metrics)
            raise UsageError(f"{point['file']}: {point['metric']} on {point['task']}; {name} shows {wanted}")
    if len(tasks) > 1 and not figure.panels:
        raise UsageError(f"{name}: one task expected, got {', '.join(tasks)}")
    drawing, panels = new_figure(len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        for one in series:
            draw_points(axes, [p for p in one["points"] if p["task"] == task], one["label"], taus=figure.taus)
        metric = next(p["metric"] for one in series for p in one["points"] if p["task"] == task)
        axes.set(xlabel="FFN sparsity", ylabel=metric, title=task, yscale="log" if metric == "perplexity" else "linear")
        axes.legend()
    drawing.suptitle(figure.title)
    save_figure(drawing, image)
    return dict(figure=name, title=figure.title, series=list(series))


def reconstruction_figure(series: Sequence[Mapping[str, Any]], image: str | Path) -> dict[str, Any]:
    """Figure 2: mean squared error of the layers' outputs by k. `series`: ``reconstruction()`` and a label each."""
    title = "Figure 2: error of the FFN output from the router's first k experts"
    drawing, (axes,) = new_figure()
    for one in series:
        axes.plot([point["k"] for point in one["points"]], [point["mse"] for point in one["points"]], "o-",
                  label=one["label"])  # fmt: skip
    axes.set(xlabel="experts kept, k", ylabel="MSE against all experts", xscale="log", title=title)
    axes.legend()
    save_figure(drawing, image)
    return dict(figure="fig2", title=title, series=list(series))


def read_latency(argument: str) -> list[dict[str, Any]]:
    """Decode latencies at batch 1 from LABEL=FILE, a file of ``prunepath bench latency --repeats 20``.

    Returns:
        One series per engine and tau: {"label", "tau", "step_ms" (one a prompt), "median_ms", "tokens_per_second",
        "peak_gib"}. The dense engine's is labelled Dense, the others LABEL (tau).

    Raises:
        UsageError: no label, no such file, a file of another kind, or a number in it that is none or out of range.
    """
    label, name = split_label(argument)
    if not Path(name).is_file():
        raise UsageError(f"{name}: no such file; expected results of prunepath bench latency")
    path = Path(name)
    content: Any = read_json(path)
    series = []
    with read_as("results of prunepath bench latency, with batch size 1", name):
        for engine in ("dense", "sparse"):
            part = content.get(engine) or {"rows": []}
            for row in part["rows"]:
                if row["batch_size"] != 1:
                    continue
                steps = [finite(step, "decode_steps_ms", path) for step in row["decode_steps_ms"]]
                middle = statistics.median(steps)
                if min(steps) <= 0:
                    raise UsageError(f"{path}: decode_steps_ms {min(steps)}; expected more than 0")
                tau = None if engine == "dense" else finite(row["tau"], "tau", path, 0, MAX_TAU)
                series.append(
                    {
                        "label": "Dense" if tau is None else f"{label} (tau {tau:g})",
                        "tau": tau,
                        "step_ms": steps,
                        "median_ms": middle,
                        "tokens_per_second": 1e3 / middle,
                        "peak_gib": None if part["peak_gib"] is None else finite(part["peak_gib"], "peak_gib", path, 0),
                    }
                )
        if not series:
            raise ValueError
    return series


def latency_figure(series: Sequence[Mapping[str, Any]], image: str | Path) -> dict[str, Any]:
    """Figure 9 and Table 3: time of a decode step, prompt by prompt. `series`: from :func:`read_latency`."""
    title = "Figure 9: decode step by prompt, batch 1"
    drawing, (axes,) = new_figure()
    for one in series:
        axes.plot(range(1, len(one["step_ms"]) + 1), one["step_ms"], "o-", label=one["label"])
    axes.set(xlabel="prompt", ylabel="ms", title=title)
    axes.legend()
    save_figure(drawing, image)
    return dict(figure="fig9", title=title, series=list(series))
