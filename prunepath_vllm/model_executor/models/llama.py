"""Llama with routed feed-forward layers."""

from vllm.model_executor.models.llama import LlamaForCausalLM

from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.model_executor.models.glu import route_mlps
from prunepath_vllm.model_executor.models.utils import PrunePathModelMixin


class PrunePathLlamaForCausalLM(PrunePathModelMixin, LlamaForCausalLM):
    """PrunePath Llama for causal language modelling."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        route_mlps(self.model.layers, vllm_config)
