"""PrunePath Llama for transformers."""

from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP, LlamaModel

from prunepath_vllm.modeling.configuration_llama import PrunePathLlamaConfig
from prunepath_vllm.modeling.modeling_utils import (
    ROUTING_OUTPUTS,
    RoutedCausalLM,
    RoutedDecoder,
    RoutedDecoderLayer,
    RoutedGLU,
)
from prunepath_vllm.modeling.routing import Router


class PrunePathLlamaMLP(RoutedGLU, LlamaMLP):
    """LlamaMLP cut into experts."""

    def __init__(self, config: PrunePathLlamaConfig, *, router_bias: bool) -> None:
        super().__init__(config)
        self.router = Router(config.hidden_size, config.prunepath, bias=router_bias)


class PrunePathLlamaDecoderLayer(RoutedDecoderLayer, LlamaDecoderLayer):
    """LlamaDecoderLayer with a routed feed-forward layer."""

    def __init__(self, config: PrunePathLlamaConfig, layer_idx: int, *, router_bias: bool) -> None:
        super().__init__(config, layer_idx)
        self.mlp = PrunePathLlamaMLP(config, router_bias=router_bias)


class PrunePathLlamaModel(RoutedDecoder, LlamaModel):
    """LlamaModel with routed feed-forward layers."""

    config_class = PrunePathLlamaConfig
    _no_split_modules = ["PrunePathLlamaDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {**LlamaModel._can_record_outputs, **ROUTING_OUTPUTS}  # noqa: RUF012

    def __init__(self, config: PrunePathLlamaConfig, *, router_bias: bool = False) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            PrunePathLlamaDecoderLayer(config, index, router_bias=router_bias)
            for index in range(config.num_hidden_layers)
        )
        self.post_init()


class PrunePathLlamaForCausalLM(RoutedCausalLM, LlamaForCausalLM):
    """LlamaForCausalLM with routed feed-forward layers and a tau per sequence."""

    config_class = PrunePathLlamaConfig

    def __init__(self, config: PrunePathLlamaConfig, *, router_bias: bool = False) -> None:
        super().__init__(config)
        self.model = PrunePathLlamaModel(config, router_bias=router_bias)
        self.post_init()
