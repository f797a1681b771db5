"""How long the engine's queue is, for requests that leave their tau to the server."""

from typing import Any

from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats

logger = init_logger("vllm.prunepath")


class QueueLength(AggregateStatLoggerBase):
    """Keeps what the scheduler of each engine said last, at the end of a step: no call to it, no wait."""

    def __init__(self) -> None:
        self.waiting: dict[int, int] = {}

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        *args: Any,
        engine_idx: int = 0,
        **kwargs: Any,
    ) -> None:
        """vLLM's call after every step."""
        if scheduler_stats is not None:
            self.waiting[engine_idx] = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs

    def log_engine_initialized(self) -> None:
        """Nothing to log."""

    @property
    def mean(self) -> float:
        """Requests waiting per engine; there are several under data parallelism."""
        return sum(self.waiting.values()) / max(1, len(self.waiting))


def waiting_requests(engine: Any) -> float:
    """Requests waiting per engine after its last step; 0 before the first, and with statistics turned off.

    Args:
        engine: vLLM's ``AsyncLLM``, which is listened to from the first call on; None in a server that only renders.
    """
    if engine is None:
        return 0.0
    manager: StatLoggerManager | None = getattr(engine, "logger_manager", None)
    if manager is None:
        logger.warning_once("--disable-log-stats hides the queue: requests that leave their tau to it get the highest")
        return 0.0
    queue = next((one for one in manager.stat_loggers if isinstance(one, QueueLength)), None)
    if queue is None:
        queue = QueueLength()
        manager.stat_loggers.append(queue)
    return queue.mean
