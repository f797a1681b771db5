"""GPT-2 with routed feed-forward layers."""

from torch import Tensor
from vllm.model_executor.models import gpt2

from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.model_executor.models.utils import (
    PrunePathModelMixin,
    RoutedModule,
    build_expert_linears,
    build_routed_ffn,
    built_instead,
    route_by_attention,
)


class RoutedGPT2MLP(RoutedModule):
    """Stands in for ``block.mlp``, under the same parameter names plus ``router``."""

    def __init__(self, vllm_config: VllmConfig, layer: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = build_expert_linears(vllm_config, layer, glu=False, bias=True)
        self.ffn, self.router = build_routed_ffn(vllm_config, layer)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, H]; returns the same shape."""
        return self.ffn(x, self.router, self.c_fc, self.c_proj, self.take_ahead())


class PrunePathGPT2LMHeadModel(PrunePathModelMixin, gpt2.GPT2LMHeadModel):
    """PrunePath GPT-2 for causal language modelling."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with built_instead(gpt2, "GPT2MLP", lambda layer: RoutedGPT2MLP(vllm_config, layer)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        route_by_attention(self, vllm_config.model_config.hf_config)
