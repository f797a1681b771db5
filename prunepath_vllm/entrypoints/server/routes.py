"""Routes beside the engine's own, on the same app."""

from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from prunepath_vllm.entrypoints.server.knob import app_resolver
from prunepath_vllm.families import family_of
from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.model_executor.tau_resolution import TauResolver
from prunepath_vllm.tau import DENSE_TAU, MAX_TAU
from prunepath_vllm.version import __version__

router = APIRouter()

_PAGE_POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The page holds its own style and script, and talks to nobody but its server."""


@router.get("/prunepath", response_class=HTMLResponse)
async def get_playground() -> HTMLResponse:
    """The playground: a chat at two taus side by side."""
    page = resources.files("prunepath_vllm.entrypoints.server") / "playground.html"
    return HTMLResponse(page.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _PAGE_POLICY})


@router.get("/prunepath/info")
async def get_info(request: Request) -> dict[str, Any]:
    """The model's experts and curve, and what a request may ask for."""
    state = request.app.state
    resolver = app_resolver(request.app)
    assert resolver is not None  # these routes exist beside a PrunePath model alone
    return info(resolver, state.vllm_config, state.args.served_model_name or [state.args.model])


def info(resolver: TauResolver, vllm_config: VllmConfig, served_names: list[str]) -> dict[str, Any]:
    """The answer of ``GET /prunepath/info``.

    Args:
        resolver: of `vllm_config`'s engine.
        vllm_config: the engine's.
        served_names: names that requests may use for the model.
    """
    prunepath, options = resolver.prunepath, resolver.policy
    config = vllm_config.model_config.hf_config.to_dict()
    family = family_of(config, converted=True)
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
            "kept_share": prunepath.kept_share,
        },
        "memory": {"host_experts": options.host_experts, "gpu_expert_gib": options.gpu_expert_gib},
        "tau_curve": prunepath.tau_curve,
        "mode": options.mode,
        "defaults": {
            "tau": options.default_tau,
            "tau_by_model": options.default_tau_by_model,
            "prefill_tau": options.prefill_tau,
        },
        "limits": {
            "min_tau": options.min_tau,
            "max_tau": options.max_tau,
            "accepted_tau": f"(0, {prunepath.max_tau or MAX_TAU}]",
            "accepted_sparsity": "[0, 1)" if prunepath.tau_curve else None,
            "dense_from_tau": DENSE_TAU,
            "auto_tau": options.auto_range,
            "full_queue": options.full_queue,
        },
    }
