"""PrunePath GPT-2 for transformers."""

from typing import Any

from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block, GPT2LMHeadModel, GPT2Model

from prunepath_vllm.modeling.configuration_gpt2 import PrunePathGPT2Config
from prunepath_vllm.modeling.inference import RoutedFeedForward
from prunepath_vllm.modeling.modeling_utils import ROUTING_OUTPUTS, RoutedCausalLM, RoutedDecoder
from prunepath_vllm.modeling.quantised import expert_linear
from prunepath_vllm.modeling.routing import Router


class PrunePathGPT2MLP(RoutedFeedForward, GPT2MLP):
    """GPT2MLP cut into experts."""

    act: nn.Module
    c_fc: nn.Module
    c_proj: nn.Module
    dropout: nn.Module

    def __init__(self, config: PrunePathGPT2Config, layer: int, *, router_bias: bool) -> None:
        block, hidden = config.prunepath, config.hidden_size
        neurons = block.neurons(layer)
        super().__init__(neurons, config)
        if block.expert_dtype is not None:
            self.c_fc = expert_linear(block, hidden, neurons, conv1d=True)
            self.c_proj = expert_linear(block, neurons, hidden, is_output=True, conv1d=True)
        self.router = Router(hidden, block, layer, bias=router_bias)
        self.activation = config.activation_function

    def linears(self) -> tuple[list[Any], Any]:
        """See the base class."""
        return [self.c_fc], self.c_proj

    def neurons(self, x: Tensor) -> Tensor:
        """See the base class."""
        return self.act(self.c_fc(x))

    def project(self, neurons: Tensor) -> Tensor:
        """See the base class."""
        return self.dropout(self.c_proj(neurons))


class PrunePathGPT2Block(GPT2Block):
    """GPT2Block with a routed feed-forward layer."""

    def __init__(self, config: PrunePathGPT2Config, layer_idx: int, *, router_bias: bool) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.mlp = PrunePathGPT2MLP(config, layer_idx, router_bias=router_bias)
        self.routes_by_attention = config.prunepath.router.input == "attention"

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        *_cross_attention: None,
        tau: Tensor,
        native: bool = False,
        encoder_attention_mask: None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [B, S, H] and tau float32 [B, S] to [B, S, H]; the rest is for attention."""
        normed = self.ln_1(hidden_states)
        attended, _ = self.attn(normed, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        router_input = normed if self.routes_by_attention else None
        return hidden_states + self.mlp(self.ln_2(hidden_states), tau, router_input, native=native)


class PrunePathGPT2Model(RoutedDecoder, GPT2Model):
    """GPT2Model with routed feed-forward layers."""

    config_class = PrunePathGPT2Config
    _no_split_modules = ["PrunePathGPT2Block"]  # noqa: RUF012
    _can_record_outputs = {**GPT2Model._can_record_outputs, **ROUTING_OUTPUTS}  # noqa: RUF012

    def __init__(self, config: PrunePathGPT2Config, *, router_bias: bool = False) -> None:
        super().__init__(config)
        self.h = nn.ModuleList(
            PrunePathGPT2Block(config, index, router_bias=router_bias) for index in range(config.num_hidden_layers)
        )
        self.post_init()


class PrunePathGPT2LMHeadModel(RoutedCausalLM, GPT2LMHeadModel):
    """GPT2LMHeadModel with routed feed-forward layers and a tau per sequence."""

    config_class = PrunePathGPT2Config
    dense_class = GPT2LMHeadModel

    def __init__(self, config: PrunePathGPT2Config, *, router_bias: bool = False) -> None:
        super().__init__(config)
        self.transformer = PrunePathGPT2Model(config, router_bias=router_bias)
        self.post_init()
