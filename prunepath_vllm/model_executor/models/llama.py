"""Llama with routed feed-forward layers."""

from vllm.model_executor.models import llama

from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.model_executor.models.glu import RoutedGLU
from prunepath_vllm.model_executor.models.utils import PrunePathModelMixin, built_instead


class PrunePathLlamaForCausalLM(PrunePathModelMixin, llama.LlamaForCausalLM):
    """PrunePath Llama for causal language modelling."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with built_instead(llama, "LlamaMLP", lambda layer: RoutedGLU(vllm_config, layer)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
