"""PrunePath RoBERTa for transformers."""

from typing import Any

from torch import Tensor, nn
from transformers.models.roberta.modeling_roberta import (
    RobertaForSequenceClassification,
    RobertaIntermediate,
    RobertaLayer,
    RobertaModel,
)
from transformers.utils import can_return_tuple

from prunepath_vllm.modeling.configuration_roberta import PrunePathRobertaConfig
from prunepath_vllm.modeling.modeling_utils import (
    ROUTING_OUTPUTS,
    PrunePathSequenceClassifierOutput,
    RoutedBackbone,
    RoutedModel,
    exactly_one,
)
from prunepath_vllm.modeling.quantised import expert_linear
from prunepath_vllm.modeling.routing import Router, Tau


class PrunePathRobertaIntermediate(RobertaIntermediate):
    """RobertaIntermediate cut into experts; the second linear is RobertaOutput's."""

    def __init__(self, config: PrunePathRobertaConfig, layer: int, *, router_bias: bool) -> None:
        super().__init__(config)
        block = config.prunepath
        self.dense = expert_linear(block, config.hidden_size, block.neurons(layer))
        self.router = Router(config.hidden_size, block, layer, bias=router_bias)

    def forward(self, hidden_states: Tensor, tau: Tensor, router_input: Tensor | None = None) -> Tensor:
        """Hidden states [B, S, H] and tau float32 [B, S] to neurons [B, S, F]; the router reads `router_input`, or else
        the hidden states."""
        neurons = super().forward(hidden_states)
        return self.router.scale(hidden_states if router_input is None else router_input, neurons, tau)


class PrunePathRobertaLayer(RobertaLayer):
    """RobertaLayer with a routed feed-forward layer."""

    def __init__(self, config: PrunePathRobertaConfig, layer_idx: int, *, router_bias: bool) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.intermediate = PrunePathRobertaIntermediate(config, layer_idx, router_bias=router_bias)
        block = config.prunepath
        self.output.dense = expert_linear(block, block.neurons(layer_idx), config.hidden_size, is_output=True)
        self.routes_by_attention = config.prunepath.router.input == "attention"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *_cross_attention: None,
        tau: Tensor,
        encoder_attention_mask: None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [B, S, H] and tau float32 [B, S] to [B, S, H]; the rest is for attention."""
        attended, _ = self.attention(hidden_states, attention_mask, **kwargs)
        router_input = hidden_states if self.routes_by_attention else None
        return self.output(self.intermediate(attended, tau, router_input), attended)


class PrunePathRobertaModel(RoutedBackbone, RobertaModel):
    """RobertaModel with routed feed-forward layers."""

    config_class = PrunePathRobertaConfig
    _no_split_modules = ["RobertaEmbeddings", "PrunePathRobertaLayer"]  # noqa: RUF012
    _can_record_outputs = {**RobertaModel._can_record_outputs, **ROUTING_OUTPUTS}  # noqa: RUF012

    def __init__(
        self, config: PrunePathRobertaConfig, add_pooling_layer: bool = True, *, router_bias: bool = False
    ) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self.encoder.layer = nn.ModuleList(
            PrunePathRobertaLayer(config, index, router_bias=router_bias) for index in range(config.num_hidden_layers)
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        tau: Tau | None = None,
        **kwargs: Any,
    ) -> Any:
        """The dense forward, plus ``tau`` (a number or one per sequence).

        Raises:
            TauError: `tau` is out of range, or has not one value per sequence.
        """
        tokens = exactly_one(input_ids, inputs_embeds)
        first = self.embeddings.padding_idx + 1  # RoBERTa counts positions from here; padding stands at padding_idx
        if position_ids is not None:
            positions = position_ids
        elif input_ids is not None:
            positions = self.embeddings.create_position_ids_from_input_ids(input_ids, first - 1)
        else:
            positions = self.embeddings.create_position_ids_from_inputs_embeds(inputs_embeds, first - 1)
        return self.routed_forward(
            tau=tau,
            positions=positions - first,
            batch_size=tokens.shape[0],
            input_ids=input_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class PrunePathRobertaForSequenceClassification(RoutedModel, RobertaForSequenceClassification):
    """RobertaForSequenceClassification with routed feed-forward layers and a tau per sequence."""

    config_class = PrunePathRobertaConfig

    def __init__(self, config: PrunePathRobertaConfig, *, router_bias: bool = False) -> None:
        super().__init__(config)
        self.roberta = PrunePathRobertaModel(config, add_pooling_layer=False, router_bias=router_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        tau: Tau | None = None,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> PrunePathSequenceClassifierOutput:
        """The dense model's forward, with two arguments more.

        Args:
            input_ids: [B, S], or `inputs_embeds` [B, S, H].
            attention_mask: [B, S], 0 at padding.
            token_type_ids: [B, S].
            position_ids: [B, S]; made from `input_ids` where absent.
            inputs_embeds: instead of `input_ids`.
            labels: [B] classes, or [B, num_labels] targets, by the configuration's problem_type.
            tau: a number in (0, 1.05], or one per sequence; None means the checkpoint's default_tau.
            output_router_logits: return ``router_logits`` and ``active_experts``, and so ``ffn_sparsity``.
            **kwargs: anything else the dense backbone takes.

        Raises:
            TauError: `tau` is out of range, or has not one value per sequence.
        """
        outputs = self.roberta(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            tau=tau,
            output_router_logits=output_router_logits,
            output_active_experts=output_router_logits,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return PrunePathSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.get("router_logits"),
            active_experts=outputs.get("active_experts"),
        )
