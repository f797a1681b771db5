"""The routed GLU feed-forward block of Llama and Qwen2."""

from torch import Tensor, nn

from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.model_executor.layers.routed_ffn import ExpertInputs, ExpertOutputs
from prunepath_vllm.model_executor.models.utils import build_routed_ffn


class RoutedGLU(nn.Module):
    """Stands in for ``layer.mlp``, under the same parameter names plus ``router``."""

    def __init__(self, vllm_config: VllmConfig, layer: int) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        bias = getattr(config, "mlp_bias", False)
        self.gate_up_proj = ExpertInputs(config.hidden_size, config.prunepath, glu=True, bias=bias)
        self.down_proj = ExpertOutputs(config.hidden_size, config.prunepath, bias=bias)
        self.ffn, self.router = build_routed_ffn(vllm_config, layer)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, H]; returns the same shape."""
        return self.ffn(x, self.router, self.gate_up_proj, self.down_proj)
