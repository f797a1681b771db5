"""What the front end tells Prometheus. The workers' counters are in ``model_executor/tau.py``."""

import functools

from prometheus_client import Histogram

TAU_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0, 1.05)


def count_request(tau: float) -> None:
    """Count an admitted request by the tau it runs at."""
    _requested_tau().observe(tau)


@functools.cache
def _requested_tau() -> Histogram:
    return Histogram(
        "prunepath:request_tau",
        "Tau of admitted requests: what they asked for, what their sparsity means, or the default.",
        buckets=TAU_BUCKETS,
    )
