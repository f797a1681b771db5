"""transformers models of the GLU families: classes for each row of families.py, made when a name is first asked for.

For Qwen2's row they are PrunePathQwen2ForCausalLM, PrunePathQwen2Model and PrunePathQwen2DecoderLayer, attributes of
this module like ones that are written out: they can be imported and pickled.
"""

import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from prunepath_vllm.families import FAMILIES, Family
from prunepath_vllm.linears import attention_linears
from prunepath_vllm.modeling.inference import RoutedFeedForward
from prunepath_vllm.modeling.modeling_utils import ROUTING_OUTPUTS, Instead, RoutedCausalLM, RoutedDecoder
from prunepath_vllm.modeling.quantised import expert_linear, quantise_attention
from prunepath_vllm.modeling.routing import Router


def __getattr__(name: str) -> Any:
    for family in FAMILIES:
        if family.model_class.startswith(f"{__name__}:") and name in _class_names(family):
            globals().update(_classes(family))
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class RoutedGLU(RoutedFeedForward):
    """The gated feed-forward layer, cut into experts, under the dense layer's parameter names plus ``router``."""

    def __init__(self, config: Any, layer: int, activation: str, *, router_bias: bool) -> None:
        super().__init__()
        bias = bool(getattr(config, "mlp_bias", False))  # a family without the field refuses it: fields.py
        block = config.prunepath
        hidden, neurons = config.hidden_size, block.neurons(layer)
        self.gate_proj = expert_linear(block, hidden, neurons, bias=bias)
        self.up_proj = expert_linear(block, hidden, neurons, bias=bias)
        self.down_proj = expert_linear(block, neurons, hidden, bias=bias, is_output=True)
        self.activation, self.act_fn = activation, ACT2FN[activation]
        self.router = Router(hidden, block, layer, bias=router_bias)

    def linears(self) -> tuple[list[Any], Any]:
        """See the base class."""
        return [self.gate_proj, self.up_proj], self.down_proj

    def neurons(self, x: Tensor) -> Tensor:
        """See the base class."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def project(self, neurons: Tensor) -> Tensor:
        """See the base class."""
        return self.down_proj(neurons)


class RoutedDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer that hands its feed-forward layer tau and what its router reads. Before the dense class."""

    family: Family
    dense_class: Any

    def __init__(self, config: Any, layer_idx: int, *, router_bias: bool) -> None:
        super().__init__(config, layer_idx)
        activation = self.family.activation(vars(config))
        self.mlp = RoutedGLU(config, layer_idx, activation, router_bias=router_bias)
        self.routes_by_attention = config.prunepath.router.input == "attention"

    def forward(self, hidden_states: Tensor, *, tau: Tensor, native: bool = False, **kwargs: Any) -> Tensor:
        """Hidden states [B, S, H] and tau float32 [B, S] to [B, S, H]; the rest is for attention."""
        # The dense forward as it is, norms and multipliers of the family included, for a layer whose mlp knows its tau.
        mlp, attention = self.mlp, self.self_attn
        router_input: Tensor | None = None

        def attend(hidden_states: Tensor, **options: Any) -> Any:
            nonlocal router_input
            router_input = hidden_states
            return attention(hidden_states=hidden_states, **options)

        seen = {"self_attn": attend} if self.routes_by_attention else {}
        instead = Instead(self, mlp=lambda x: mlp(x, tau, router_input, native=native), **seen)
        return self.dense_class.forward(instead, hidden_states, **kwargs)


class RoutedGLUModel(RoutedDecoder):
    """A decoder of routed layers, without its head. Put it before the dense class."""

    decoder_layer: type[RoutedDecoderLayer]

    def __init__(self, config: Any, *, router_bias: bool = False) -> None:
        super().__init__(config)
        layers = (self.decoder_layer(config, i, router_bias=router_bias) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.post_init()


class RoutedGLUForCausalLM(RoutedCausalLM):
    """A decoder of routed layers with a language-model head. Put it before the dense class."""

    backbone: type[RoutedGLUModel]

    def __init__(self, config: Any, *, router_bias: bool = False, linear_dtype: str | None = None) -> None:
        super().__init__(config)
        self.model = self.backbone(config, router_bias=router_bias)
        if linear_dtype is not None:
            family = self.backbone.decoder_layer.family
            names = [name for layer in range(config.num_hidden_layers) for name in attention_linears(family, layer)]
            quantise_attention(self, names, getattr(torch, linear_dtype))
        self.post_init()


def _class_names(family: Family) -> tuple[str, str, str]:
    layer = f"{family.stem}DecoderLayer"
    return f"PrunePath{layer}", f"PrunePath{family.dense_backbone_class}", family.architecture


def _classes(family: Family) -> dict[str, type]:
    """The decoder layer, the backbone and the model with its head, by name."""
    import transformers

    module, config_name = family.config_class.split(":")
    config_class = getattr(import_module(module), config_name)
    dense_model = getattr(transformers, family.dense_architecture)
    dense = vars(sys.modules[dense_model.__module__])
    dense_layer, dense_backbone = dense[f"{family.stem}DecoderLayer"], dense[family.dense_backbone_class]
    layer_name, backbone_name, model_name = _class_names(family)

    def make(name: str, bases: tuple[type, type], what: str, **members: Any) -> Any:
        members |= {"__module__": __name__, "__doc__": f"{bases[1].__name__} {what}.", "dense_class": bases[1]}
        return type(name, bases, members)

    layer = make(layer_name, (RoutedDecoderLayer, dense_layer), "with a routed feed-forward layer", family=family)
    sdpa = {"_supports_sdpa": False} if family.caps_attention else {}
    backbone = make(
        backbone_name,
        (RoutedGLUModel, dense_backbone),
        "with routed feed-forward layers",
        config_class=config_class,
        decoder_layer=layer,
        **sdpa,
        _no_split_modules=[layer_name],
        _can_record_outputs={**dense_backbone._can_record_outputs, **ROUTING_OUTPUTS},
    )
    model = make(
        model_name,
        (RoutedGLUForCausalLM, dense_model),
        "with routed feed-forward layers and a tau per sequence",
        config_class=config_class,
        backbone=backbone,
        **sdpa,
    )
    return {layer_name: layer, backbone_name: backbone, model_name: model}
