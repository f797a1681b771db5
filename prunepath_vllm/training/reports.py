"""What a run tells while it runs: a progress bar, log.jsonl, TensorBoard, and quality measured on the way."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from prunepath_vllm.errors import UsageError
from prunepath_vllm.training.measure import Point, measure
from prunepath_vllm.training.recipe import Recipe
from prunepath_vllm.training.trainer import PrunePathTrainer

LOG_FILE = "log.jsonl"
SHOWN = ("loss", "ffn_sparsity", "tokens_per_second")


class Reports(TrainerCallback):
    """Writes everything that is logged; on the main process only."""

    def __init__(self, trainer: PrunePathTrainer, held_out: Sequence[dict[str, Tensor]]) -> None:
        """Report on a trainer.

        Args:
            trainer: the run.
            held_out: batches to measure quality on during the run; empty where none is wanted.
        """
        self.trainer, self.held_out = trainer, held_out
        self.recipe: Recipe = trainer.recipe
        self.points_done = 0
        self.bar: tqdm | None = None
        self.writer: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the files."""
        if not state.is_world_process_zero:
            return
        self.bar = tqdm(total=100, desc="training", bar_format="{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]")
        if self.recipe.runtime.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UsageError(
                    "runtime.tensorboard: the tensorboard package is not installed; install it or set it to false"
                ) from None
            self.writer = SummaryWriter(str(Path(self.recipe.output) / "tensorboard"), purge_step=state.global_step)
        self.points_done = int(self.trainer.course.progress(state.global_step) * self.recipe.evaluation.points)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show progress; measure quality where a point is due."""
        if self.bar is None:
            return
        progress = self.trainer.course.progress(state.global_step)
        self.bar.update(round(100 * progress, 1) - self.bar.n)
        wanted = self.recipe.evaluation.points
        if self.held_out and int(progress * wanted) > self.points_done:
            self.points_done = int(progress * wanted)
            self._measure(state)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write a report."""
        if self.bar is None or not logs:
            return
        self.bar.set_postfix({key: f"{logs[key]:.4g}" for key in SHOWN if key in logs})
        self._append({"step": state.global_step, **logs})
        if self.writer is None:
            return
        for key, value in logs.items():
            self.writer.add_scalar(f"train/{key}", value, state.global_step)
        layers = self.trainer.totals.layers
        for key, name in (("sparsity", "ffn_sparsity"), ("entropy", "router_entropy")):
            for layer, value in enumerate(layers.get(key, ())):
                self.writer.add_scalar(f"{name}/layer_{layer:02d}", float(value), state.global_step)
        for layer, value in enumerate(layers.get("usage", ())):
            self.writer.add_histogram(f"expert_usage/layer_{layer:02d}", value, state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the files."""
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def _measure(self, state: TrainerState) -> None:
        trainer = self.trainer
        taus: list[float | None] = [None]
        if trainer.block is not None:
            taus = list(self.recipe.evaluation.taus)
        device = next(trainer.training.parameters()).device.type
        precision = torch.autocast(device, dtype=torch.bfloat16) if self.recipe.runtime.bf16 else nullcontext()
        with precision:
            points = measure(trainer.training, self.held_out, taus)
        trainer.totals.restart_clock()
        self._append({"step": state.global_step, "quality": [asdict(point) for point in points]})
        tqdm.write(f"step {state.global_step}: " + "  ".join(describe(point) for point in points))
        if self.writer is not None:
            for point in points:
                tau = "dense" if point.tau is None else f"tau_{point.tau:g}"
                self.writer.add_scalar(f"quality/{tau}", quality(point), state.global_step)

    def _append(self, row: dict[str, Any]) -> None:
        with open(Path(self.recipe.output) / LOG_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def quality(point: Point) -> float:
    """Perplexity of a causal model, accuracy of a classifier."""
    value = point.perplexity if point.accuracy is None else point.accuracy
    assert value is not None
    return value


def describe(point: Point) -> str:
    """A point in a few characters: quality@sparsity."""
    return f"{quality(point):.4g}@{point.ffn_sparsity:.2f}"
