"""What a checkpoint is worth and costs at each tau, and the tau that a loss of quality allows."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunepath_vllm.conversion.model_card import QUALITY_FILE
from prunepath_vllm.conversion.rewrite import rewrite_checkpoint
from prunepath_vllm.engine_environment import runs_on_cpu
from prunepath_vllm.errors import PrunePathError, UsageError
from prunepath_vllm.evaluation.plots import pareto_front
from prunepath_vllm.evaluation.runner import Run
from prunepath_vllm.files import replace_file
from prunepath_vllm.tau import DENSE_TAU, level_curve

LOWER_IS_BETTER = ("perplexity",)
INPUT_TOKENS, OUTPUT_TOKENS = 32, 48
"""Of the requests that time a decode step."""


class SpeedError(PrunePathError):
    """The engine could not be timed."""


def sweep(run: Run, max_loss: float, *, speed: bool) -> dict[str, Any]:
    """Measure what the run's journal lacks, and choose a tau.

    Args:
        run: over a PrunePath checkpoint, with a tau of 1 or more among its taus.
        max_loss: loss of quality to accept, relative to the dense model where the run has one, else to tau 1.
        speed: also time the engine's decode step, one sequence at a time, where the checkpoint generates text.

    Returns:
        ``Run.results()``, where each point has its relative ``loss``, whether it is on the ``pareto`` front, and with
        `speed` decode_step_ms and tokens_per_second; ``max_loss``; ``recommended``, a point; and ``peak_gib``, a
        worker's memory (on a GPU: the GPU's), None without `speed`.

    Raises:
        SpeedError: the engine failed.
    """
    result = run.results()
    points = result["points"]
    for point, loss in zip(points, losses(points, run.task.metrics[0]), strict=True):
        point["loss"] = loss
    front = pareto_front([(point["ffn_sparsity"], -point["loss"]) for point in points])
    for i, point in enumerate(points):
        point["pareto"] = i in front
    result |= dict(max_loss=max_loss, recommended=recommend(points, max_loss), peak_gib=None)
    if speed and run.checkpoint.causal:
        timed = decode_steps(run, [point["tau"] for point in points if point["tau"] is not None])
        for point in points:
            if point["tau"] is not None:
                step = timed[str(point["tau"])]["decode_step_ms"]
                point |= dict(decode_step_ms=step, tokens_per_second=1e3 / step)
        result["peak_gib"] = max((row["peak_gib"] for row in timed.values() if row["peak_gib"]), default=None)
    return result


def losses(points: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """Relative loss of each point against the first that is dense, or has tau 1 or more; below 0 where it is better.

    A perplexity's loss is its rise, an accuracy's its fall, both as a share of the reference.
    """
    reference = next(point for point in points if point["tau"] is None or point["tau"] >= DENSE_TAU)[metric]
    sign = 1 if metric in LOWER_IS_BETTER else -1
    return [sign * (point[metric] - reference) / reference if reference else 0.0 for point in points]


def recommend(points: Sequence[Mapping[str, Any]], max_loss: float) -> dict[str, Any]:
    """The sparsest point that loses at most `max_loss`, as does every less sparse one.

    A lucky point beyond one that fails is noise, so the search ends at the first that fails. The first point, at tau 1,
    stands where nothing else does.
    """
    sparse = sorted((point for point in points if point["tau"] is not None), key=lambda point: point["ffn_sparsity"])
    chosen = sparse[0]
    for point in sparse:
        if point["loss"] > max_loss:
            break
        chosen = point
    return dict(chosen)


def decode_steps(run: Run, taus: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Time of a decode step by tau, {"decode_step_ms", "peak_gib"}, as ``prunepath bench latency`` measures it.

    Raises:
        SpeedError: the engine failed.
    """
    known = {str(tau): run.journal.get(f"speed/{tau}") for tau in taus}
    missing = [tau for tau in taus if known[str(tau)] is None]
    if not missing:
        return known
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "latency.json"
        command = ["bench", "latency", str(run.checkpoint.path), "--tau", ",".join(map(str, missing))]
        command += ["--batch-size", "1", "--num-iters", "0", "--dtype", run.checkpoint.dtype]
        command += ["--input-len", str(INPUT_TOKENS), "--output-len", str(OUTPUT_TOKENS)]
        command += ["--max-model-len", str(run.checkpoint.context(default=2 * (INPUT_TOKENS + OUTPUT_TOKENS)))]
        if runs_on_cpu():
            command.append("--enforce-eager")  # as the package's other offline engines: compiling takes minutes
        # A process of its own: the engine keeps what memory it takes.
        process = subprocess.run(
            [sys.executable, "-m", "prunepath_vllm.entrypoints.cli", *command, "--output", str(output)],
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if process.returncode:
            raise SpeedError(f"the engine could not be timed: exit code {process.returncode}, see above, or --no-speed")
        measured = json.loads(output.read_text())["sparse"]
    for row in measured["rows"]:
        value = dict(decode_step_ms=row["decode_step_ms"], peak_gib=measured["peak_gib"])
        known[str(row["tau"])] = value
        run.journal.put(f"speed/{row['tau']}", value)
    return known


def write_to_checkpoint(run: Run, result: Mapping[str, Any]) -> None:
    """Put the measured tau curve into the checkpoint's config.json, and the qualities into its model card.

    The tau of requests that name none stays what it was.

    Raises:
        CheckpointError, ConfigError: the checkpoint has been broken meanwhile; it stays as it is.
    """
    summary = run.checkpoint.summary
    assert summary is not None
    points = sorted((point for point in result["points"] if point["tau"] is not None), key=lambda one: one["tau"])
    quality = [
        {
            "tau": point["tau"],
            "ffn_sparsity": point["ffn_sparsity"],
            "loss": math.log(point["perplexity"]) if "perplexity" in point else None,
            "perplexity": point.get("perplexity"),
            "accuracy": point.get("accuracy"),
        }
        for point in points
    ]
    if run.task.metrics[0] in ("perplexity", "accuracy"):  # what the card shows is what was swept
        chosen = {name: result["recommended"][name] for name in ("tau", "ffn_sparsity", "loss")}
        data = str(result.get("text") or result["task"])
        content = dict(data=data, points=quality, max_loss=result["max_loss"], recommended=chosen)
        # The card shows it only beside the curve that was measured with it: a crash in between hides it.
        text = json.dumps(content, indent=2) + "\n"
        card = summary.path / QUALITY_FILE
        replace_file(card, lambda new: new.write_text(text, encoding="utf-8"), like=summary.path / "config.json")
    curve = level_curve((point["tau"], point["ffn_sparsity"]) for point in points)
    rewrite_checkpoint(summary, {}, tau_curve=curve)


def parse_loss(text: str) -> float:
    """A share in [0, 1), as 2% or 0.02.

    Raises:
        UsageError: anything else.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise UsageError(f"--max-loss {text}: expected a share below 1, as 2% or 0.02")
    return share
