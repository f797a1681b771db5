"""Qwen2 with routed feed-forward layers."""

from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.model_executor.models.glu import route_mlps
from prunepath_vllm.model_executor.models.utils import PrunePathModelMixin


class PrunePathQwen2ForCausalLM(PrunePathModelMixin, Qwen2ForCausalLM):
    """PrunePath Qwen2 for causal language modelling."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        route_mlps(self.model.layers, vllm_config)
