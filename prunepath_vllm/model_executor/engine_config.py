"""What the engine's configuration must look like for a PrunePath model: checked and completed once, at start-up."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from vllm import envs

from prunepath_vllm.checkpoint import read_config, validate_checkpoint
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import CheckpointError, ConfigError, UnsupportedFeatureError
from prunepath_vllm.families import family_of
from prunepath_vllm.fields import usable_positions
from prunepath_vllm.linears import METHOD
from prunepath_vllm.model_executor.compat import VerifyAndUpdateConfig, VllmConfig, current_platform
from prunepath_vllm.model_executor.engine_core import install_in_engine_core
from prunepath_vllm.model_executor.operator_policy import operator_policy, refuse_unread_tau
from prunepath_vllm.model_executor.tau_resolution import is_prunepath

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


class PrunePathEngineConfig(VerifyAndUpdateConfig):
    """vLLM's per-architecture hook; registered for every PrunePath architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Bound the length of a sequence by the positions that its tokens can take.

        vLLM counts all rows of a position table, and lets users ask for more; reading beyond the last is undefined.

        Raises:
            ConfigError: ``max_model_len`` was given and is more; or see :func:`_refuse_other_config`.
        """
        _refuse_other_config(model_config)
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
        policy = operator_policy(vllm_config)
        if policy.host_experts or policy.gpu_expert_gib is not None:
            _refuse_with_host_experts(vllm_config)
        _check_length(model_config)
        _refuse_unsupported(vllm_config)
        _refuse_unread_taus(model_config)
        _refuse_connectors(vllm_config)
        if os.path.isdir(model_config.model) and vllm_config.load_config.load_format != "dummy":
            _refuse_other_experts(model_config.hf_config.prunepath, validate_checkpoint(model_config.model).prunepath)
        _choose_worker(vllm_config)

        import vllm.v1.engine.core  # noqa: F401  this process may be the engine core too

        # Not at the top: the plugin loads this module in every process, the front end has its own.
        from prunepath_vllm.model_executor.admission import install_in_input_processor

        install_in_input_processor()
        install_in_engine_core()


class DenseModelConfig(VerifyAndUpdateConfig):
    """The same hook for the dense architectures: it refuses a PrunePath checkpoint's weights, and touches nothing."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """See :func:`_refuse_other_config`; raises what it raises."""
        _refuse_other_config(model_config)


def _refuse_other_config(model_config: Any) -> None:
    """Refuse a PrunePath model's configuration for other weights, and another model's for a PrunePath checkpoint's.

    Left to the engine, the second would fail at the first tensor that the dense model has not.

    Raises:
        ConfigError: names the option.
    """
    path, weights = model_config.hf_config_path, model_config.model
    if path is None or not os.path.isdir(weights):
        return
    try:
        stored = read_config(weights).get("model_type")
    except CheckpointError:  # no PrunePath checkpoint, which validate_checkpoint names
        return
    served = model_config.hf_config.model_type
    if stored != served and any(str(one).startswith("prunepath_") for one in (stored, served)):
        raise ConfigError(
            f"--hf-config-path: {path} is of model_type {served!r}; expected {stored!r}, as the weights in {weights}"
        )


def _refuse_other_experts(served: PrunePathConfig, stored: PrunePathConfig) -> None:
    """Refuse a block that does not fit the checkpoint's tensors; transformers checks none that comes by an override.

    What no tensor depends on, such as the gate, may be overridden.

    Raises:
        ConfigError: names the field.
    """
    for name in ("num_experts", "expert_size", "router", "expert_dtype", "kept_experts", "max_tau"):
        found, expected = getattr(served, name), getattr(stored, name)
        if found != expected:
            raise ConfigError(
                f"prunepath_config.{name}: {found!r} (--hf-overrides or --hf-config-path); expected {expected!r}, as "
                "in the checkpoint"
            )


def _refuse_unread_taus(model_config: Any) -> None:
    """Refuse a tau where the other defaults of an engine stand, but nobody would read it.

    Raises:
        ConfigError: names the field.
    """
    # With "vllm", which is for whoever cannot change the file, no default is taken from it.
    file = {} if model_config.generation_config == "vllm" else model_config.try_get_generation_config()
    sampling = {**file, **model_config.override_generation_config}
    refuse_unread_tau(sampling, "generation_config.json or --override-generation-config")
    refuse_unread_tau(model_config.hf_config.to_dict(), "config.json or --hf-overrides")


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
    drafts_with_us = draft is not None and draft is not vllm_config.model_config and is_prunepath(draft.hf_config)
    family = family_of(vllm_config.model_config.hf_config.to_dict(), converted=True)
    refused = {
        # Its own would take the requests' tau past every check, which goes by it.
        "another model_type (--hf-overrides)": not is_prunepath(vllm_config.model_config.hf_config),
        "quantization": not _as_stored(vllm_config),
        f"LoRA adapters (--enable-lora) for {family.name}": vllm_config.lora_config is not None and not family.adapted,
        "dual-batch overlap (--enable-dbo)": parallel.enable_dbo or getattr(parallel, "ubatch_size", 0) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "a PrunePath draft model in speculative decoding": drafts_with_us,
        "vLLM's Rust front end (VLLM_USE_RUST_FRONTEND), which checks no tau": envs.VLLM_USE_RUST_FRONTEND,
    }
    for feature, used in refused.items():
        if used:
            raise UnsupportedFeatureError(f"PrunePath models do not support {feature}; expected it to be off")


def _as_stored(vllm_config: VllmConfig) -> bool:
    """Whether vLLM quantises nothing, or no more than what ``prunepath quantize --linears`` has stored.

    Raises:
        ConfigError: this device does not compute these linears; or ``quantization_config`` is another, by
            --hf-overrides. Names the field.
    """
    model_config = vllm_config.model_config
    if model_config.quantization is None:
        return True
    if model_config.quantization != METHOD or not is_prunepath(model_config.hf_config):
        return False
    stored = model_config.hf_config.linear_dtype
    if stored == "int8" and current_platform.device_type == "cpu":
        _check_int8_on_cpu(vllm_config)
    if stored is not None and current_platform.device_type == "cuda" and model_config.dtype == torch.float32:
        raise ConfigError(
            "dtype: float32; expected bfloat16 or float16, in which vLLM's products of quantised linears are on a GPU"
        )
    return stored is not None


def _check_int8_on_cpu(vllm_config: VllmConfig) -> None:
    """Refuse what vLLM's int8 linears cannot do on a CPU.

    Raises:
        ConfigError: the processor is an x86 on which oneDNN's sums of pairs saturate, or there are LoRA adapters, whose
            layers look for the weights that oneDNN has packed.
    """
    can = torch.cpu.get_capabilities()
    found = None
    if can.get("architecture") == "x86_64" and not (can.get("avx512_vnni") or can.get("avx_vnni")):
        found = "on a processor without VNNI, where vLLM's int8 products saturate"
    elif vllm_config.lora_config is not None:
        found = "with LoRA adapters (--enable-lora) on a CPU"
    if found is not None:
        raise ConfigError(
            f"quantization_config.format: 'int-quantized' {found}; expected 'float-quantized' (prunepath quantize "
            "--linears float8_e4m3fn), or none"
        )


def _refuse_with_host_experts(vllm_config: VllmConfig) -> None:
    """Experts in host memory are a GPU's, and lie where vLLM's own ways of moving weights would not find them."""
    offload = vllm_config.offload_config
    refused = {
        f"a {current_platform.device_type}: its memory is the host's": current_platform.device_type != "cuda",
        "sleep mode (--enable-sleep-mode)": vllm_config.model_config.enable_sleep_mode,
        "vLLM's own offload (--cpu-offload-gb, --offload-group-size)": bool(
            offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size
        ),
    }
    for what, used in refused.items():
        if used:
            raise UnsupportedFeatureError(
                f"additional_config.prunepath.host_experts and gpu_expert_gib do not go with {what}; "
                "expected one or the other"
            )


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
