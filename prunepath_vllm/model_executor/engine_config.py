"""What the engine's configuration must look like for a PrunePath model: checked and completed once, at start-up."""

import os
from typing import Any

from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.errors import ConfigError, UnsupportedFeatureError
from prunepath_vllm.model_executor.compat import VerifyAndUpdateConfig, VllmConfig, current_platform
from prunepath_vllm.tau import parse_tau

_WORKERS = {
    "cpu": "prunepath_vllm.model_executor.worker_cpu.PrunePathCPUWorker",
    "cuda": "prunepath_vllm.model_executor.worker_gpu.PrunePathGPUWorker",
}


class PrunePathEngineConfig(VerifyAndUpdateConfig):
    """vLLM's per-architecture hook; registered for every PrunePath architecture."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what would give wrong output, validate the checkpoint, and let tau in.

        Raises:
            UnsupportedFeatureError: names the feature.
            ConfigError: names the field.
            CheckpointError: names the tensor.
        """
        model_config = vllm_config.model_config
        server_default_tau(vllm_config)
        _refuse_unsupported(vllm_config)
        if os.path.isdir(model_config.model) and vllm_config.load_config.load_format != "dummy":
            validate_checkpoint(model_config.model)
        _choose_worker(vllm_config)

        from prunepath_vllm.model_executor.requests import install_request_hooks

        install_request_hooks()


def server_default_tau(vllm_config: VllmConfig) -> float:
    """The tau of requests that name none: the server's ``--additional-config``, else the checkpoint's.

    Raises:
        ConfigError: an unknown key under ``prunepath``.
        TauError: a default_tau out of range.
    """
    prunepath = vllm_config.model_config.hf_config.prunepath
    additional = vllm_config.additional_config
    options: Any = additional.get("prunepath", {}) if isinstance(additional, dict) else {}
    if not isinstance(options, dict):
        raise ConfigError(f"additional_config.prunepath: expected an object, got {options!r}")
    if unknown := set(options) - {"default_tau"}:
        raise ConfigError(f"additional_config.prunepath: unknown key {sorted(unknown)[0]!r}; expected 'default_tau'")
    if "default_tau" not in options:
        return prunepath.unset_tau
    return parse_tau(options["default_tau"], "additional_config.prunepath.default_tau")


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    drafts_with_us = draft is not None and draft is not vllm_config.model_config and _is_prunepath(draft.hf_config)
    refused = {
        "quantization": vllm_config.model_config.quantization is not None,
        "LoRA adapters (--enable-lora)": vllm_config.lora_config is not None,
        "dual-batch overlap (--enable-dbo)": parallel.enable_dbo or getattr(parallel, "ubatch_size", 0) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "a PrunePath draft model in speculative decoding": drafts_with_us,
    }
    for feature, used in refused.items():
        if used:
            raise UnsupportedFeatureError(f"PrunePath models do not support {feature}; expected it to be off")


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
