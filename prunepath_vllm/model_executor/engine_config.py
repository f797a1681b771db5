"""What the engine's configuration must look like for a PrunePath model: checked and completed once, at start-up."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vllm import envs

from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import ConfigError, TauError, UnsupportedFeatureError
from prunepath_vllm.families import family_of
from prunepath_vllm.fields import usable_positions
from prunepath_vllm.model_executor.compat import VerifyAndUpdateConfig, VllmConfig, current_platform
from prunepath_vllm.tau import DENSE_TAU, MAX_TAU, is_adaptive, parse_tau, parse_tau_range, resolve_tau

_WORKERS = {
    "cpu": "prunepath_vllm.model_executor.worker_cpu.PrunePathCPUWorker",
    "cuda": "prunepath_vllm.model_executor.worker_gpu.PrunePathGPUWorker",
}


KV_CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector")
"""KV connectors of vLLM that store keys and values under its block hashes, which differ between taus, and nothing else.
Others go by token ids alone, or hand over what a request elsewhere computed, at a tau that nobody compares."""

_CONNECTOR_SETTINGS = ("kv_connector", "kv_connector_module_path", "kv_connector_extra_config")
_OFFLOADING_SPEC = "CPUOffloadingSpec"
"""What OffloadingConnector stores to unless told otherwise; other specs share with other engines."""
_LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "dummy")
"""Those that read a checkpoint's safetensors by the names in it, and the one that reads nothing. Not pickles (pt,
npcache), not what an engine saved in its own layout (sharded_state, tensorizer), not other names (mistral)."""


REPORT_KEY = "prunepath_report"
"""Key of a request's extra arguments: a name under which its experts are counted. Offline the caller's own; over HTTP
the server gives one to each request that asks."""

_ADAPTIVE_STEPS = 20
"""Steps per unit of tau in which load lowers it: requests of one tau share prefix-cache blocks."""

_ROUNDING = 1e-9
"""A tau looked up for a sparsity may miss a bound by the curve's interpolation."""


class PrunePathEngineConfig(VerifyAndUpdateConfig):
    """vLLM's per-architecture hook; registered for every PrunePath architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Bound the length of a sequence by the positions that its tokens can take.

        vLLM counts all rows of a position table, and lets users ask for more; reading beyond the last is undefined.

        Raises:
            ConfigError: ``max_model_len`` was given and is more.
        """
        limit = _position_limit(model_config)
        if model_config.original_max_model_len in (None, -1):  # left to vLLM
            model_config.max_model_len = min(model_config.max_model_len, limit)
        _check_length(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what would give wrong output, validate the checkpoint, and let tau in.

        Raises:
            UnsupportedFeatureError: names the feature.
            ConfigError: names the field.
            CheckpointError: names the tensor.
        """
        model_config = vllm_config.model_config
        server_options(vllm_config)
        _check_length(model_config)
        _refuse_unsupported(vllm_config)
        _refuse_connectors(vllm_config)
        if os.path.isdir(model_config.model) and vllm_config.load_config.load_format != "dummy":
            validate_checkpoint(model_config.model)
        _choose_worker(vllm_config)

        import vllm.v1.engine.core  # noqa: F401  this process may be the engine core too

        from prunepath_vllm.model_executor.engine_core import install_in_engine_core
        from prunepath_vllm.model_executor.requests import install_request_hooks

        install_request_hooks()
        install_in_engine_core()


@dataclass(frozen=True)
class ServerOptions:
    """The operator's word on tau: the ``prunepath`` object of ``--additional-config``.

    Attributes:
        default_tau: the tau of requests that name none; the checkpoint's unless given.
        min_tau, max_tau: what a request may ask for, both ends included.
        prefill_tau: prompts are computed at this tau whatever their request's, so that they share prefix-cache blocks;
            None computes them at the request's.
        default_tau_by_model: default_tau of requests by the served name that they ask for; others get default_tau.
        full_queue: waiting requests from which on a request that leaves its tau to the server gets the lowest; as many
            as may run at once unless given.
    """

    default_tau: float
    full_queue: int
    min_tau: float = 0.0
    max_tau: float = MAX_TAU
    prefill_tau: float | None = None
    default_tau_by_model: Mapping[str, float] = field(default_factory=dict)

    @property
    def auto_range(self) -> tuple[float, float]:
        """What ``"auto"`` ranges over: never below what the operator has named, never more than dense."""
        low = self.min_tau or self.default_tau
        return low, max(low, min(self.max_tau, DENSE_TAU))


def server_options(vllm_config: VllmConfig) -> ServerOptions:
    """Read and check the ``prunepath`` object of ``--additional-config``.

    Raises:
        ConfigError: an unknown key, bounds that leave nothing, a default outside them, prefill_tau with a model that
            generates nothing, or a full_queue that is no number of requests.
        TauError: a value that is no tau.
    """
    where = "additional_config.prunepath"
    additional = vllm_config.additional_config
    given: Any = additional.get("prunepath", {}) if isinstance(additional, dict) else {}
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: expected an object, got {given!r}")
    known = [one.name for one in fields(ServerOptions)]
    if unknown := set(given) - set(known):
        raise ConfigError(f"{where}: unknown key {min(unknown)!r}; expected one of {', '.join(known)}")
    full_queue = given.get("full_queue", vllm_config.scheduler_config.max_num_seqs)
    if isinstance(full_queue, bool) or not isinstance(full_queue, int) or full_queue < 1:
        raise ConfigError(f"{where}.full_queue: expected a whole number of requests, at least 1, got {full_queue!r}")
    named = given.get("default_tau_by_model", {})
    if not isinstance(named, dict):
        raise ConfigError(f"{where}.default_tau_by_model: expected an object of served names and taus, got {named!r}")
    named = {name: parse_tau(value, f"{where}.default_tau_by_model.{name}") for name, value in named.items()}
    taus = {
        name: parse_tau(value, f"{where}.{name}")
        for name, value in given.items()
        if name not in ("full_queue", "default_tau_by_model")
    }
    defaults = {"default_tau": vllm_config.model_config.hf_config.prunepath.unset_tau}
    options = ServerOptions(full_queue=full_queue, default_tau_by_model=named, **{**defaults, **taus})
    if options.min_tau > options.max_tau:
        raise ConfigError(f"{where}.min_tau: {options.min_tau} is above max_tau {options.max_tau}")
    source = "" if "default_tau" in given else " (the checkpoint's)"
    all_defaults = {"default_tau": (options.default_tau, source)}
    all_defaults |= {f"default_tau_by_model.{name}": (tau, "") for name, tau in named.items()}
    for key, (tau, source) in all_defaults.items():
        if not options.min_tau <= tau <= options.max_tau:
            raise ConfigError(
                f"{where}.{key}: {tau}{source} is outside [{options.min_tau}, {options.max_tau}] (min_tau, max_tau); "
                "expected one that requests may ask for"
            )
    if options.prefill_tau is not None and vllm_config.model_config.runner_type == "pooling":
        raise ConfigError(f"{where}.prefill_tau: this model is all prompt and generates nothing; expected it unset")
    return options


@dataclass(frozen=True)
class Service:
    """What every request of an engine is held to; both parts cost a parse, so that a front end reads them once.

    Attributes:
        prunepath: the checkpoint's block.
        options: the operator's.
    """

    prunepath: PrunePathConfig
    options: ServerOptions

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> "Service | None":
        """The engine's; None where its model is not a PrunePath one.

        Raises:
            ConfigError: see :func:`server_options`.
        """
        if not _is_prunepath(vllm_config.model_config.hf_config):
            return None
        return cls(vllm_config.model_config.hf_config.prunepath, server_options(vllm_config))

    def tau_of(self, requested: Mapping[str, Any], waiting: float = 0.0) -> float:
        """The tau that a request runs at.

        Args:
            requested: its extra arguments; keys other than ``tau`` and ``sparsity`` are not looked at.
            waiting: requests in the engine's queue; what ``"auto"`` and a range go by.

        Raises:
            TauError: what :func:`prunepath_vllm.tau.resolve_tau` refuses, or a tau outside the operator's bounds.
        """
        low, high = self.options.min_tau, self.options.max_tau
        if is_adaptive(requested.get("tau")) and requested.get("sparsity") is None:
            return self._adaptive_tau(requested["tau"], waiting)
        tau = resolve_tau(requested, default_tau=self.options.default_tau, tau_curve=self.prunepath.tau_curve)
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
        options = self.options
        low, high = parse_tau_range(tau) or options.auto_range
        bottom, top = max(low, options.min_tau), min(high, options.max_tau)
        if bottom > top:
            raise TauError(
                f"tau range [{low}, {high}] has nothing in common with {self._bounds}", parameter="tau", value=tau
            )
        if waiting >= options.full_queue:
            return bottom
        steps = round((top - bottom) * waiting / options.full_queue * _ADAPTIVE_STEPS)
        return max(round(top - steps / _ADAPTIVE_STEPS, 6), bottom) if steps else top

    @property
    def _bounds(self) -> str:
        return f"[{self.options.min_tau}, {self.options.max_tau}] (this server's min_tau and max_tau)"

    def prompt_tau(self, tau: float) -> float:
        """The tau that the prompt of a request at `tau` is computed at."""
        return tau if self.options.prefill_tau is None else self.options.prefill_tau


def _position_limit(model_config: Any) -> int:
    config = model_config.hf_config.to_dict()
    limit = usable_positions(family_of(config, converted=True), config)
    assert limit is not None, "transformers' classes have a default"
    return limit


def _check_length(model_config: Any) -> None:
    limit = _position_limit(model_config)
    if model_config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len: {model_config.max_model_len}; expected at most {limit}, the positions that the model has"
        )


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    load_format = vllm_config.load_config.load_format
    if load_format not in _LOAD_FORMATS:
        what = "pickled weights" if load_format in ("pt", "npcache") else "weights in another layout"
        raise UnsupportedFeatureError(
            f"PrunePath models do not support {what} (load_format {load_format}); expected one of "
            + ", ".join(_LOAD_FORMATS)
        )
    parallel = vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    drafts_with_us = draft is not None and draft is not vllm_config.model_config and _is_prunepath(draft.hf_config)
    refused = {
        # Its own would take the requests' tau past every check, which goes by it.
        "another model_type (--hf-overrides)": not _is_prunepath(vllm_config.model_config.hf_config),
        "quantization": vllm_config.model_config.quantization is not None,
        "LoRA adapters (--enable-lora)": vllm_config.lora_config is not None,
        "dual-batch overlap (--enable-dbo)": parallel.enable_dbo or getattr(parallel, "ubatch_size", 0) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "a PrunePath draft model in speculative decoding": drafts_with_us,
        "vLLM's Rust front end (VLLM_USE_RUST_FRONTEND), which checks no tau": envs.VLLM_USE_RUST_FRONTEND,
    }
    for feature, used in refused.items():
        if used:
            raise UnsupportedFeatureError(f"PrunePath models do not support {feature}; expected it to be off")


def _refuse_connectors(vllm_config: VllmConfig) -> None:
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    settings = {} if transfer is None else {name: getattr(transfer, name) for name in _CONNECTOR_SETTINGS}
    if cache.kv_offloading_size is not None:  # vLLM writes the connector's name later
        native = cache.kv_offloading_backend == "native"
        settings["kv_connector"] = (
            KV_CONNECTORS[0] if native else f"of kv_offloading_backend {cache.kv_offloading_backend}"
        )
    if settings.get("kv_connector") is not None:
        _refuse_connector(settings)


def _refuse_connector(settings: Mapping[str, Any]) -> None:
    name, module, extra = (settings.get(key) for key in _CONNECTOR_SETTINGS)
    extra = extra or {}
    if name == "MultiConnector" and not module:
        for child in extra.get("connectors", []):
            _refuse_connector(child)
        return
    what = f"the KV connector {name}"
    if module:
        what += f" of {module}"
    elif name == "OffloadingConnector" and (spec := extra.get("spec_name", _OFFLOADING_SPEC)) != _OFFLOADING_SPEC:
        what += f" with spec_name {spec}"
    elif name in KV_CONNECTORS:
        return
    raise UnsupportedFeatureError(
        f"PrunePath models do not support {what}, which is not known to keep taus apart; "
        f"expected vLLM's own {' or '.join(KV_CONNECTORS)}"
    )


def _choose_worker(vllm_config: VllmConfig) -> None:
    """The V1 model runner has no per-model state: a worker class of ours brings tau to it. The V2 runner needs none."""
    parallel = vllm_config.parallel_config
    workers = {"auto", "vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker", *_WORKERS.values()}
    if parallel.worker_cls not in workers:
        raise UnsupportedFeatureError(
            f"PrunePath models bring their own worker class; got worker_cls {parallel.worker_cls!r}, expected 'auto' "
            "(worker_extension_cls is free)"
        )
    worker = _WORKERS.get(current_platform.device_type)
    if worker is None:
        raise UnsupportedFeatureError(
            f"PrunePath models run on cpu and cuda; this vLLM runs on {current_platform.device_type}"
        )
    parallel.worker_cls = worker


def _is_prunepath(hf_config: Any) -> bool:
    return str(getattr(hf_config, "model_type", "")).startswith("prunepath_")
