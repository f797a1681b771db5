"""Where a run stands: by steps or by the clock, in which stage, at which tau and learning rate."""

import math
import time

import torch

from prunepath_vllm.tau import MAX_TAU
from prunepath_vllm.training.recipe import Recipe, Schedule, Stage


class Course:
    """Progress of a run from 0 to 1, by optimizer steps or by the clock, whichever is further."""

    def __init__(self, recipe: Recipe, max_steps: int | None) -> None:
        """Begin; the clock runs from :meth:`start`.

        Args:
            recipe: whose stages and schedule to follow.
            max_steps: optimizer steps of the whole run, None where only the clock ends it.
        """
        self.schedule: Schedule = recipe.schedule
        self.stages: list[Stage] = recipe.stages
        self.seed = recipe.seed
        self.max_steps = max_steps
        total = sum(stage.share for stage in self.stages)
        ends, reached = [], 0.0
        for stage in self.stages:
            reached += stage.share / total
            ends.append(reached)
        self.ends = [*ends[:-1], 1.0]
        self.elapsed = 0.0
        """Seconds of training so far, those before a resume included, as last read by :meth:`tick`."""
        self._started = time.monotonic()

    def start(self, elapsed: float = 0.0) -> None:
        """Start the clock, `elapsed` seconds into the run."""
        self.elapsed = elapsed
        self._started = time.monotonic() - elapsed

    def tick(self) -> None:
        """Read the clock, the same on all processes."""
        self.elapsed = time.monotonic() - self._started
        if self.schedule.max_minutes is not None and torch.distributed.is_initialized():
            reading = [self.elapsed]
            torch.distributed.broadcast_object_list(reading, src=0)
            self.elapsed = reading[0]

    def progress(self, step: int) -> float:
        """Progress after `step` optimizer steps, in [0, 1]."""
        done = 0.0 if self.max_steps is None else step / self.max_steps
        if self.schedule.max_minutes is not None:
            done = max(done, self.elapsed / (60 * self.schedule.max_minutes))
        return min(done, 1.0)

    def stage(self, step: int) -> int:
        """Index of the stage that optimizer step `step` (counted from 0) belongs to."""
        progress = self.progress(step)
        return next((index for index, end in enumerate(self.ends) if progress < end), len(self.ends) - 1)

    def stage_progress(self, step: int) -> float:
        """Progress within that stage, in [0, 1]."""
        index = self.stage(step)
        begin = self.ends[index - 1] if index else 0.0
        return (self.progress(step) - begin) / (self.ends[index] - begin)

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, relative to the peak."""
        index = self.stage(step)
        first = max((i for i in range(index + 1) if self.stages[i].new_schedule), default=0)
        anew = (i for i in range(index + 1, len(self.stages)) if self.stages[i].new_schedule)
        last = next(anew, len(self.stages)) - 1
        begin = self.ends[first - 1] if first else 0.0
        done = (self.progress(step) - begin) / (self.ends[last] - begin)
        warmup, final = self.schedule.warmup, self.schedule.final
        if done < warmup:
            # The first step must not have rate 0; by the clock its length is unknown.
            return max(done / warmup, 0.01)
        down = (done - warmup) / (1 - warmup)
        shape = (1 + math.cos(math.pi * down)) / 2 if self.schedule.decay == "cosine" else 1 - down
        return final + (1 - final) * shape

    def taus(self, step: int, sequences: int, *, process: int, part: int) -> list[float]:
        """The tau of every sequence of a batch. Drawn from (seed, step, process, part) alone, so a resume repeats it.

        Args:
            step: optimizer step, counted from 0.
            sequences: B.
            process: rank among the processes.
            part: which of the batches accumulated in this step.
        """
        stage = self.stages[self.stage(step)]
        if stage.tau == "fixed":
            return [stage.tau_start] * sequences
        if stage.tau == "path":
            # Round t of T = 1..T, as in the paper: its first round is already below tau_start.
            done = min(math.floor(self.stage_progress(step) * stage.rounds) + 1, stage.rounds) / stage.rounds
            return [stage.tau_start + (stage.tau_end - stage.tau_start) * done] * sequences
        generator = torch.Generator().manual_seed(hash((self.seed, step, process, part)) % 2**63)
        # One draw from each of as many equal parts of the range, in random order: a batch always covers all of it.
        full = int(stage.full * sequences + torch.rand((), generator=generator))
        drawn = sequences - full
        draws = torch.arange(drawn) + torch.rand(drawn, generator=generator)
        taus = (stage.tau_end + (stage.tau_start - stage.tau_end) * draws / drawn).tolist() + [MAX_TAU] * full
        return [taus[i] for i in torch.randperm(sequences, generator=generator).tolist()]
