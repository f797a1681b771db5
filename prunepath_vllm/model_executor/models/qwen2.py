"""Qwen2 with routed feed-forward layers."""

from vllm.model_executor.models import qwen2

from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.model_executor.models.glu import RoutedGLU
from prunepath_vllm.model_executor.models.utils import PrunePathModelMixin, built_instead


class PrunePathQwen2ForCausalLM(PrunePathModelMixin, qwen2.Qwen2ForCausalLM):
    """PrunePath Qwen2 for causal language modelling."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with built_instead(qwen2, "Qwen2MLP", lambda layer: RoutedGLU(vllm_config, layer)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
