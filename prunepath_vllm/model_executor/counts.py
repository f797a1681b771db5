"""Counting the experts that tokens used, on the worker: nothing here waits for the device inside a step.

Layers add to static buffers of their own: the active experts of each row of a step, and the experts that a step read.
They are summed up on the device now and then, and read on the host only when somebody asks: at a scrape of /metrics, or
at the end of a request that wanted a report.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from prometheus_client import Counter
from torch import Tensor
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from prunepath_vllm.config import PrunePathConfig, expected_sparsity, sparsity_curve
from prunepath_vllm.model_executor.compat import async_tensor_h2d
from prunepath_vllm.tau import DENSE_TAU

GROUPS = ("first", "middle", "last")
"""Thirds of the model's layers, as /metrics has them."""

REPORT_KEY = "prunepath_report"
"""Key of a request's extra arguments: a name under which its experts are counted. Offline the caller's own; over HTTP
the server gives one to each request that asks."""

MAX_REPORTS = 1024
"""Reports kept on a worker; those counted least recently give way, in case nobody comes for them."""

_MAX_ROW = 1 << 30
"""A row is summed up before it may grow beyond; int32 ends at twice that."""


@dataclass
class _Report:
    """A request that wants to know: its entry on the device, and the tokens it has run, of prompt and answer."""

    entry: int
    tokens: list[int] = field(default_factory=lambda: [0, 0])


class ExpertCounts:
    """Experts of this worker's steps by layer: active ones, of all requests and of those that asked, and read ones.

    Attributes:
        active: per layer of this worker, int32 [max_num_batched_tokens] on the model's device: experts active at each
            row, over the steps since they were last summed up.
        read: per layer, int64 [1] on the model's device: experts whose weights were read, over the same steps; [2] with
            experts in host memory: the second entry counts those of them.
        host_bytes: of one expert on this rank, where some lie in host memory; else 0.
        dense_runs: int64 scalar on the host: runs of a layer that took every expert, whatever its tokens chose.
    """

    def __init__(self, prunepath: PrunePathConfig, num_layers: int, max_tokens: int, host_bytes: int = 0) -> None:
        self.host_bytes = host_bytes
        self.num_experts = prunepath.num_experts
        self.num_layers = num_layers
        self.max_tokens = max_tokens
        self.active: list[Tensor] = []
        self.read: list[Tensor] = []
        self.dense_runs = torch.zeros((), dtype=torch.int64, device="cpu")
        self.groups: list[int] = []  # of each layer in `active`
        # Since the last publication; [2 or 3, layers] from the first sum on: active, read, and read on the host.
        self.totals = torch.zeros((), dtype=torch.int64)
        self.tokens, self.steps = 0, 0
        self.steps_in_buffers = 0
        self.reports: dict[str, _Report] = {}
        self.reported: Tensor | None = None
        self.step_rows: Tensor | None = None
        # Every rank of a tensor-parallel group counts the same, every stage of a pipeline has layers of its own.
        self.speaks = get_tensor_model_parallel_rank() == 0
        first = self.speaks and get_pp_group().is_first_rank
        # Only where the server's /metrics can read another process.
        exported = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self.step_counters = _StepCounters(prunepath) if first and exported else None
        self.exported = self.speaks and exported

    @torch.inference_mode()
    def restart(self) -> None:
        """Forget what ran so far: profiling, graph capture, and on a GPU warm-up requests, steps like any other."""
        self._clear()
        self.dense_runs.zero_()
        self.totals.zero_()
        self.tokens, self.steps = 0, 0
        if self.step_counters is not None:
            self.step_counters.clear()

    def buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        """New buffers in `active` and `read`, for a layer, numbered through the whole model, to add to."""
        self.groups.append(layer * len(GROUPS) // self.num_layers)
        self.active.append(torch.zeros(self.max_tokens, dtype=torch.int32))
        self.read.append(torch.zeros(2 if self.host_bytes else 1, dtype=torch.int64))
        return self.active[-1], self.read[-1]

    def begin_step(
        self,
        taus: np.ndarray,
        computed: np.ndarray,
        scheduled: np.ndarray,
        prompt_lens: np.ndarray,
        reports: Sequence[str | None],
    ) -> None:
        """Prepare for a step that is about to run.

        Args:
            taus: float32 [num_reqs].
            computed: int [num_reqs], tokens whose keys and values are there already.
            scheduled: int [num_reqs], tokens of this step.
            prompt_lens: int [num_reqs].
            reports: per request the name to count it under, or None; empty where none has one.
        """
        self.tokens += int(scheduled.sum())
        self.steps += 1
        if self.step_counters is not None:
            self.step_counters.add(taus, scheduled)
        if self.step_rows is not None or reports or self.steps_in_buffers >= self._max_steps:
            self._sum_up()
        self.steps_in_buffers += 1
        if reports:
            self._mark_rows(computed, scheduled, prompt_lens, reports)

    @functools.cached_property
    def _max_steps(self) -> int:
        return _MAX_ROW // self.num_experts

    def _mark_rows(
        self, computed: np.ndarray, scheduled: np.ndarray, prompt_lens: np.ndarray, reports: Sequence[str | None]
    ) -> None:
        """Note which entry of `reported` each row of the step belongs to."""
        entries = []
        for name, start, count, prompt_len in zip(reports, computed, scheduled, prompt_lens, strict=True):
            in_prompt = int(min(max(prompt_len - start, 0), count))
            if name is None:
                entries += [2 * MAX_REPORTS] * int(count)
                continue
            report = self._report(name)
            report.tokens[0] += in_prompt
            report.tokens[1] += int(count) - in_prompt
            entries += [2 * report.entry] * in_prompt + [2 * report.entry + 1] * (int(count) - in_prompt)
        self.step_rows = async_tensor_h2d(np.array(entries, dtype=np.int64), device=self.totals.device)

    def _report(self, name: str) -> _Report:
        if self.reported is None:
            # One entry each for prompt and answer, and the last for everybody else.
            size = (len(self.active), 2 * MAX_REPORTS + 1)
            self.reported = torch.zeros(size, dtype=torch.int64, device=self.totals.device)
        if name not in self.reports:
            if len(self.reports) == MAX_REPORTS:
                entry = self.reports.pop(next(iter(self.reports))).entry
            else:
                entry = min(set(range(MAX_REPORTS)) - {report.entry for report in self.reports.values()})
            self.reported[:, 2 * entry : 2 * entry + 2] = 0
            self.reports[name] = _Report(entry)
        else:
            # What goes first was counted least recently: it has ended, most likely.
            self.reports[name] = self.reports.pop(name)
        return self.reports[name]

    def _sum_up(self) -> None:
        """Bring what the buffers hold where it belongs; device work alone."""
        rows = torch.stack(self.active)
        if self.step_rows is not None:
            assert self.reported is not None
            self.reported.index_add_(1, self.step_rows, rows[:, : self.step_rows.shape[0]].long())
            self.step_rows = None
        self.totals = self.totals + torch.cat([rows.sum(dim=1)[None], torch.stack(self.read).t()])
        self._clear()

    def _clear(self) -> None:
        torch._foreach_zero_([*self.active, *self.read])
        self.steps_in_buffers = 0

    @torch.inference_mode()
    def take_report(self, name: str) -> list[tuple[list[int], int]] | None:
        """What was counted under a name, which is forgotten. Waits for the device.

        Returns:
            Of prompt and of answer, summed over tokens: the experts active in each of this worker's layers, and those
            that a layer could have had. None where the name is unknown or another rank speaks for this one.
        """
        if self.step_rows is not None:
            self._sum_up()
        report = self.reports.pop(name, None)
        if report is None or not self.speaks:
            return None
        assert self.reported is not None
        active = self.reported[:, 2 * report.entry : 2 * report.entry + 2].t().tolist()
        return [(active[part], report.tokens[part] * self.num_experts) for part in range(2)]

    @torch.inference_mode()
    def publish(self) -> None:
        """Bring the Prometheus counters up to date. Waits for the device."""
        if not self.exported or not self.steps:
            return
        self._sum_up()
        active, read, *on_host = self.totals.tolist()
        counters = _counters()
        for experts in on_host:
            counters["host"].inc(sum(experts) * self.host_bytes * get_tensor_model_parallel_world_size())
        for layer, group in enumerate(self.groups):
            labels = {"layers": GROUPS[group]}
            counters["active"].labels(**labels).inc(active[layer])
            counters["possible"].labels(**labels).inc(self.tokens * self.num_experts)
            counters["read"].labels(**labels).inc(read[layer])
            counters["readable"].labels(**labels).inc(self.steps * self.num_experts)
        dense = int(self.dense_runs)
        counters["runs"].labels(path="dense").inc(dense)
        counters["runs"].labels(path="sparse").inc(self.steps * len(self.groups) - dense)
        self.totals.zero_()
        self.dense_runs.zero_()
        self.tokens, self.steps = 0, 0
        if self.step_counters is not None:
            self.step_counters.publish()


class _StepCounters:
    """What is known of steps from host values alone."""

    def __init__(self, prunepath: PrunePathConfig) -> None:
        self.curve = sparsity_curve(prunepath)
        self.last_step: tuple[bytes, bytes] | None = None
        self.step_tokens, self.step_inactive, self.step_dense = 0, 0.0, False
        self.clear()

    def add(self, taus: np.ndarray, scheduled: np.ndarray) -> None:
        """Count one step: `taus` float32 [num_reqs], `scheduled` int [num_reqs] tokens."""
        step = (taus.tobytes(), scheduled.tobytes())
        if step != self.last_step:  # decode repeats itself: most steps only add what the last one added
            self.last_step = step
            self.step_tokens = int(scheduled.sum())
            self.step_dense = bool((taus >= DENSE_TAU).all())
            if self.curve is not None:
                self.step_inactive = float(expected_sparsity(taus, self.curve) @ scheduled)
        self.tokens += self.step_tokens
        self.inactive += self.step_inactive
        self.steps[self.step_dense] += 1

    def publish(self) -> None:
        """Hand over what has been counted since the last time."""
        counters = _counters()
        counters["tokens"].inc(self.tokens)
        for kind, steps in zip(("routed", "dense"), self.steps, strict=True):
            counters["steps"].labels(kind=kind).inc(steps)
        if self.curve is not None:
            counters["inactive"].inc(self.inactive)
        self.clear()

    def clear(self) -> None:
        """Count from 0 again."""
        self.tokens, self.inactive, self.steps = 0, 0.0, [0, 0]


COUNTERS = {
    "tokens": ("prunepath:tokens", "Tokens that went through the model.", ()),
    "steps": ("prunepath:steps", "Engine steps; in those of kind dense every token uses every expert.", ("kind",)),
    "inactive": (
        "prunepath:expected_ffn_sparsity_tokens",
        "Sum over tokens of the FFN sparsity that the checkpoint's tau_curve gives for their tau; divided by "
        "prunepath:tokens_total it is the expected mean.",
        (),
    ),
    "active": ("prunepath:experts_active", "Experts that were active, summed over tokens and layers.", ("layers",)),
    "possible": (
        "prunepath:experts_possible", "Experts there were, summed over the same tokens and layers.", ("layers",)
    ),
    "read": (
        "prunepath:experts_read", "Experts whose weights were read, summed over steps and layers.", ("layers",)
    ),
    "readable": (
        "prunepath:experts_readable", "Experts there were, summed over the same steps and layers.", ("layers",)
    ),
    "host": (
        "prunepath:host_bytes_read", "Bytes of expert weights that GPUs read from host memory (host_experts).", ()
    ),
    "runs": (
        "prunepath:layer_runs",
        "Layers run, once a step; those of path dense read every expert, whatever their tokens chose.",
        ("path",),
    ),
}  # fmt: skip
"""Name, meaning and labels of each, as /metrics has them."""


@functools.cache
def _counters() -> dict[str, Counter]:
    """Prometheus refuses a name twice in a process, and a process may build several models."""
    return {key: Counter(*described) for key, described in COUNTERS.items()}
