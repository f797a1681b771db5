"""The operator's policy on tau: defaults, bounds and what load does, read from ``--additional-config``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from prunepath_vllm.errors import ConfigError
from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.tau import DENSE_TAU, MAX_TAU, PARAMETERS, parse_tau, shown

MODES = ("exact", "at_least")


@dataclass(frozen=True)
class OperatorPolicy:
    """What the operator allows and chooses: the ``prunepath`` object of ``--additional-config``.

    Attributes:
        default_tau: the tau of requests that name none; the checkpoint's unless given.
        min_tau, max_tau: what a request may ask for, both ends included; max_tau is at most the checkpoint's.
        prefill_tau: prompts are computed at this tau whatever their request's, so that they share prefix-cache blocks;
            None computes them at the request's.
        default_tau_by_model: default_tau of requests by the served name that they ask for; others get default_tau.
        full_queue: waiting requests from which on a request that leaves its tau to the server gets the lowest; as many
            as may run at once unless given.
        mode: "exact": every token gets its tau, whatever runs beside it; "at_least": its tau is the least that it gets,
            and where the engine computes every expert of a step anyway, none is left out.
        host_experts: share of every layer's experts, the least used, that lie in host memory instead of the GPU's.
        gpu_expert_gib: instead of it, GiB of each GPU's memory that the other experts may take.
        quantise_activations: whether a GPU that multiplies float8 may quantise what enters the dense products of float8
            experts; False widens the weights instead, slower, and as steps of few tokens do.
    """

    default_tau: float
    full_queue: int
    min_tau: float = 0.0
    max_tau: float = MAX_TAU
    prefill_tau: float | None = None
    default_tau_by_model: Mapping[str, float] = field(default_factory=dict)
    mode: str = "exact"
    quantise_activations: bool = True
    host_experts: float = 0.0
    gpu_expert_gib: float | None = None

    def host_share(self, expert_bytes: int) -> float:
        """The share of experts in host memory of a rank whose experts have so many bytes in all."""
        if self.gpu_expert_gib is None:
            return self.host_experts
        return max(0.0, 1 - self.gpu_expert_gib * 2**30 / expert_bytes)

    @property
    def auto_range(self) -> tuple[float, float]:
        """What ``"auto"`` ranges over: never below what the operator has named, never more than dense."""
        low = self.min_tau or self.default_tau
        return low, max(low, min(self.max_tau, DENSE_TAU))


OPERATORS_TAUS = tuple(one.name for one in fields(OperatorPolicy) if "tau" in one.name)
"""Of the policy, what a request may be thought to have, too."""


def refuse_unread_tau(given: Mapping[str, Any], place: str) -> None:
    """Refuse a tau where other defaults of an engine or a server stand, but nobody would read it.

    Args:
        given: the defaults.
        place: where they stand, in words.

    Raises:
        ConfigError: names the field.
    """
    for name in (*PARAMETERS, *OPERATORS_TAUS):
        if given.get(name) is not None:
            right = name if name in OPERATORS_TAUS else "default_tau"
            raise ConfigError(
                f"{name}: {shown(given[name])} in {place} is not read; expected additional_config.prunepath.{right}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def operator_policy(vllm_config: VllmConfig) -> OperatorPolicy:
    """Read and check the ``prunepath`` object of ``--additional-config``.

    Raises:
        ConfigError: an unknown key or mode, bounds that leave nothing, a default outside them, prefill_tau with a model
            that generates nothing, a full_queue that is no number of requests, or a share or memory that is none.
        TauError: a value that is no tau.
    """
    where = "additional_config.prunepath"
    additional = vllm_config.additional_config
    additional = additional if isinstance(additional, dict) else {}
    for key in additional:  # other keys are other plugins'
        if key != "prunepath" and (str(key).lower() == "prunepath" or key in OPERATORS_TAUS):
            raise ConfigError(f"additional_config.{key}: is not read; expected it in or as {where}")
    given: Any = additional.get("prunepath", {})
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: expected an object, got {given!r}")
    known = [one.name for one in fields(OperatorPolicy)]
    if unknown := set(given) - set(known):
        raise ConfigError(f"{where}: unknown key {min(unknown)!r}; expected one of {', '.join(known)}")
    full_queue = given.get("full_queue", vllm_config.scheduler_config.max_num_seqs)
    if isinstance(full_queue, bool) or not isinstance(full_queue, int) or full_queue < 1:
        raise ConfigError(f"{where}.full_queue: expected a whole number of requests, at least 1, got {full_queue!r}")
    mode = given.get("mode", "exact")
    if mode not in MODES:
        raise ConfigError(f"{where}.mode: expected one of {', '.join(MODES)}, got {mode!r}")
    quantise = given.get("quantise_activations", True)
    if not isinstance(quantise, bool):
        raise ConfigError(f"{where}.quantise_activations: expected true or false, got {quantise!r}")
    host, gib = given.get("host_experts", 0.0), given.get("gpu_expert_gib")
    if not _is_number(host) or not 0 <= host <= 1:
        raise ConfigError(f"{where}.host_experts: expected a share from 0 to 1, got {host!r}")
    if gib is not None and (not _is_number(gib) or not 0 < gib < math.inf):
        raise ConfigError(f"{where}.gpu_expert_gib: expected a number of GiB above 0, got {gib!r}")
    if gib is not None and "host_experts" in given:
        raise ConfigError(f"{where}.gpu_expert_gib: {gib} with host_experts {host}; expected one of the two")
    named = given.get("default_tau_by_model", {})
    if not isinstance(named, dict):
        raise ConfigError(f"{where}.default_tau_by_model: expected an object of served names and taus, got {named!r}")
    named = {name: parse_tau(value, f"{where}.default_tau_by_model.{name}") for name, value in named.items()}
    taus = {name: parse_tau(value, f"{where}.{name}") for name, value in given.items() if name.endswith("_tau")}
    prunepath = vllm_config.model_config.hf_config.prunepath
    highest = MAX_TAU if prunepath.max_tau is None else prunepath.max_tau
    for key in ("max_tau", "prefill_tau"):
        if taus.get(key, 0.0) > highest:
            raise ConfigError(
                f"{where}.{key}: {taus[key]} is above the checkpoint's max_tau {highest}, which keeps no weights of "
                "experts used above it alone; expected at most that"
            )
    defaults = {"default_tau": prunepath.unset_tau, "max_tau": highest}
    policy = OperatorPolicy(
        full_queue=full_queue,
        default_tau_by_model=named,
        mode=mode,
        quantise_activations=quantise,
        host_experts=host,
        gpu_expert_gib=gib,
        **{**defaults, **taus},
    )
    if policy.min_tau > policy.max_tau:
        raise ConfigError(f"{where}.min_tau: {policy.min_tau} is above max_tau {policy.max_tau}")
    source = "" if "default_tau" in given else " (the checkpoint's)"
    all_defaults = {"default_tau": (policy.default_tau, source)}
    all_defaults |= {f"default_tau_by_model.{name}": (tau, "") for name, tau in named.items()}
    for key, (tau, source) in all_defaults.items():
        if not policy.min_tau <= tau <= policy.max_tau:
            raise ConfigError(
                f"{where}.{key}: {tau}{source} is outside [{policy.min_tau}, {policy.max_tau}] (min_tau, max_tau); "
                "expected one that requests may ask for"
            )
    if policy.prefill_tau is not None and vllm_config.model_config.runner_type == "pooling":
        raise ConfigError(f"{where}.prefill_tau: this model is all prompt and generates nothing; expected it unset")
    return policy
