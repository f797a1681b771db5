"""vLLM models of the GLU families: a class for each row of families.py, made when its name is first asked for.

PrunePathQwen2ForCausalLM, say, is an attribute of this module like one that is written out: vLLM's registry imports it
by ``module:name`` in every process.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from prunepath_vllm.errors import ConfigError
from prunepath_vllm.families import FAMILIES, Family
from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.model_executor.models.utils import (
    PrunePathModelMixin,
    RoutedModule,
    build_expert_linears,
    build_routed_ffn,
    built_instead,
    route_by_attention,
)


def __getattr__(name: str) -> Any:
    for family in FAMILIES:
        if family.engine_class == f"{__name__}:{name}":
            return globals().setdefault(name, _model_class(family))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class RoutedGLU(RoutedModule):
    """Stands in for ``layer.mlp``, under the same parameter names plus ``router``."""

    def __init__(self, vllm_config: VllmConfig, layer: int) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        bias = getattr(config, "mlp_bias", False)  # a family without the field refuses it: fields.py
        self.gate_up_proj, self.down_proj = build_expert_linears(vllm_config, layer, glu=True, bias=bias)
        self.ffn, self.router = build_routed_ffn(vllm_config, layer)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, H]; returns the same shape."""
        return self.ffn(x, self.router, self.gate_up_proj, self.down_proj, self.take_ahead())


class RoutedGLUForCausalLM(PrunePathModelMixin):
    """Builds vLLM's dense model with :class:`RoutedGLU` for its feed-forward layers. Put it before the dense class."""

    family: Family

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.model_config.dtype == torch.float16 and not self.family.float16:
            raise ConfigError(f"dtype: float16; expected bfloat16 or float32 ({self.family.name} overflows float16)")
        module, dense_ffn = self.family.engine_ffn.split(":")
        with built_instead(_engine_module(module), dense_ffn, lambda layer: RoutedGLU(vllm_config, layer)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        route_by_attention(self, vllm_config.model_config.hf_config)


def _model_class(family: Family) -> type:
    dense = getattr(_engine_module(family.engine_module), family.dense_architecture)
    members = {
        "__module__": __name__,
        "__doc__": f"PrunePath {family.stem} for causal language modelling.",
        "family": family,
        "embedding_modules": {},  # adapters change attention alone: adapters.py
        # Phi-3's dense checkpoints hold one tensor of both; converted ones hold two, as all families' do.
        "packed_modules_mapping": {**dense.packed_modules_mapping, "gate_up_proj": ["gate_proj", "up_proj"]},
    }
    return type(family.architecture, (RoutedGLUForCausalLM, dense), members)


def _engine_module(name: str) -> Any:
    return import_module(f"vllm.model_executor.models.{name}")
