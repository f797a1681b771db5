"""Routes beside the engine's own, on the same app."""

from typing import Any

from fastapi import APIRouter, Request

from prunepath_vllm import __version__
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.families import FAMILIES
from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.model_executor.engine_config import server_options
from prunepath_vllm.tau import DENSE_TAU, MAX_TAU

router = APIRouter()


@router.get("/prunepath/info")
async def get_info(request: Request) -> dict[str, Any]:
    """The model's experts and curve, and what a request may ask for."""
    state = request.app.state
    return info(state.vllm_config, state.args.served_model_name or [state.args.model])


def info(vllm_config: VllmConfig, served_names: list[str]) -> dict[str, Any]:
    """The answer of ``GET /prunepath/info``.

    Args:
        vllm_config: the engine's.
        served_names: names that requests may use for the model.
    """
    hf_config = vllm_config.model_config.hf_config
    prunepath: PrunePathConfig = hf_config.prunepath
    family = next(row for row in FAMILIES if row.model_type == hf_config.model_type)
    options = server_options(vllm_config)
    config = hf_config.to_dict()
    return {
        "version": __version__,
        "model": {
            "served_names": served_names,
            "architecture": family.architecture,
            "base_model": prunepath.base_model,
            "num_layers": family.num_layers(config),
            "hidden_size": family.hidden_size(config),
            "intermediate_size": prunepath.intermediate_size,
            "max_model_len": vllm_config.model_config.max_model_len,
        },
        "experts": {
            "num_experts": prunepath.num_experts,
            "expert_size": prunepath.expert_size,
            "selection": prunepath.selection,
            "threshold": prunepath.threshold,
            "gate": prunepath.gate,
            "dense_positions": prunepath.dense_positions,
        },
        "tau_curve": prunepath.tau_curve,
        "defaults": {"tau": options.default_tau, "prefill_tau": options.prefill_tau},
        "limits": {
            "min_tau": options.min_tau,
            "max_tau": options.max_tau,
            "accepted_tau": f"(0, {MAX_TAU}]",
            "accepted_sparsity": "[0, 1)" if prunepath.tau_curve else None,
            "dense_from_tau": DENSE_TAU,
        },
    }
