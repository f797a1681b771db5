"""Which tau a request runs at: what it asks for, the checkpoint's curve and the operator's policy, made one number.

The front end resolves to answer a bad request with HTTP 400, the engine core to be sure, the workers because vLLM's own
warm-up requests pass neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import TauError
from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.model_executor.operator_policy import OperatorPolicy, operator_policy
from prunepath_vllm.tau import is_adaptive, parse_tau_range, resolve_tau

_ADAPTIVE_STEPS = 20
"""Steps per unit of tau in which load lowers it: requests of one tau share prefix-cache blocks."""

_ROUNDING = 1e-9
"""A tau looked up for a sparsity may miss a bound by the curve's interpolation."""


@dataclass(frozen=True)
class TauResolver:
    """Turns what a request asks for into the tau it runs at, by its engine's checkpoint and the operator's policy.

    Both cost a parse: keep one instance per engine.

    Attributes:
        prunepath: the checkpoint's block.
        policy: the operator's.
    """

    prunepath: PrunePathConfig
    policy: OperatorPolicy

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> "TauResolver | None":
        """The engine's; None where its model is not a PrunePath one.

        Raises:
            ConfigError: see :func:`operator_policy`.
        """
        if not is_prunepath(vllm_config.model_config.hf_config):
            return None
        return cls(vllm_config.model_config.hf_config.prunepath, operator_policy(vllm_config))

    def tau_of(self, requested: Mapping[str, Any], waiting: float = 0.0) -> float:
        """The tau that a request runs at.

        Args:
            requested: its extra arguments; keys other than ``tau`` and ``sparsity`` are not looked at.
            waiting: requests in the engine's queue; what ``"auto"`` and a range go by.

        Raises:
            TauError: what :func:`prunepath_vllm.tau.resolve_tau` refuses, or a tau outside the operator's bounds.
        """
        low, high = self.policy.min_tau, self.policy.max_tau
        if is_adaptive(requested.get("tau")) and requested.get("sparsity") is None:
            return self._adaptive_tau(requested["tau"], waiting)
        tau = resolve_tau(
            requested,
            default_tau=self.policy.default_tau,
            tau_curve=self.prunepath.tau_curve,
            max_tau=self.prunepath.max_tau,
        )
        if low - _ROUNDING <= tau <= high + _ROUNDING:
            return tau
        bounds = self._bounds
        sparsity = requested.get("sparsity")
        if sparsity is None:
            raise TauError(f"tau must be in {bounds}, got {tau}", parameter="tau", value=tau)
        raise TauError(
            f"sparsity {sparsity} means tau {tau:.4g} on this checkpoint, and tau must be in {bounds}",
            parameter="sparsity",
            value=sparsity,
        )

    def _adaptive_tau(self, tau: str | Mapping[str, Any], waiting: float) -> float:
        """Linear in the queue's length, from the range's high end at none to its low end at full_queue."""
        policy = self.policy
        low, high = parse_tau_range(tau) or policy.auto_range
        bottom, top = max(low, policy.min_tau), min(high, policy.max_tau)
        if bottom > top:
            raise TauError(
                f"tau range [{low}, {high}] has nothing in common with {self._bounds}", parameter="tau", value=tau
            )
        if waiting >= policy.full_queue:
            return bottom
        steps = round((top - bottom) * waiting / policy.full_queue * _ADAPTIVE_STEPS)
        return max(round(top - steps / _ADAPTIVE_STEPS, 6), bottom) if steps else top

    @property
    def _bounds(self) -> str:
        return f"[{self.policy.min_tau}, {self.policy.max_tau}] (this server's min_tau and max_tau)"

    def prompt_tau(self, tau: float) -> float:
        """The tau that the prompt of a request at `tau` is computed at."""
        return tau if self.policy.prefill_tau is None else self.policy.prefill_tau


def is_prunepath(hf_config: Any) -> bool:
    """Whether a transformers configuration is a PrunePath model's."""
    return str(getattr(hf_config, "model_type", "")).startswith("prunepath_")
