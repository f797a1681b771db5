"""PrunePath Qwen2 for transformers."""

from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2MLP, Qwen2Model

from prunepath_vllm.modeling.configuration_qwen2 import PrunePathQwen2Config
from prunepath_vllm.modeling.modeling_utils import (
    ROUTING_OUTPUTS,
    RoutedCausalLM,
    RoutedDecoder,
    RoutedDecoderLayer,
    RoutedGLU,
)
from prunepath_vllm.modeling.routing import Router


class PrunePathQwen2MLP(RoutedGLU, Qwen2MLP):
    """Qwen2MLP cut into experts."""

    def __init__(self, config: PrunePathQwen2Config, *, router_bias: bool) -> None:
        super().__init__(config)
        self.router = Router(config.hidden_size, config.prunepath, bias=router_bias)


class PrunePathQwen2DecoderLayer(RoutedDecoderLayer, Qwen2DecoderLayer):
    """Qwen2DecoderLayer with a routed feed-forward layer."""

    def __init__(self, config: PrunePathQwen2Config, layer_idx: int, *, router_bias: bool) -> None:
        super().__init__(config, layer_idx)
        self.mlp = PrunePathQwen2MLP(config, router_bias=router_bias)


class PrunePathQwen2Model(RoutedDecoder, Qwen2Model):
    """Qwen2Model with routed feed-forward layers."""

    config_class = PrunePathQwen2Config
    _no_split_modules = ["PrunePathQwen2DecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {**Qwen2Model._can_record_outputs, **ROUTING_OUTPUTS}  # noqa: RUF012

    def __init__(self, config: PrunePathQwen2Config, *, router_bias: bool = False) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            PrunePathQwen2DecoderLayer(config, index, router_bias=router_bias)
            for index in range(config.num_hidden_layers)
        )
        self.post_init()


class PrunePathQwen2ForCausalLM(RoutedCausalLM, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with routed feed-forward layers and a tau per sequence."""

    config_class = PrunePathQwen2Config

    def __init__(self, config: PrunePathQwen2Config, *, router_bias: bool = False) -> None:
        super().__init__(config)
        self.model = PrunePathQwen2Model(config, router_bias=router_bias)
        self.post_init()
