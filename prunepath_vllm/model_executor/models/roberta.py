"""RoBERTa for sequence classification with routed feed-forward layers."""

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.roberta import RobertaForSequenceClassification

from prunepath_vllm.model_executor.compat import VllmConfig
from prunepath_vllm.model_executor.layers.routed_ffn import ExpertInputs
from prunepath_vllm.model_executor.models.utils import PrunePathModelMixin, build_expert_linears, build_routed_ffn


class RoutedIntermediate(nn.Module):
    """Stands in for ``layer.intermediate``: the first linear and the router."""

    def __init__(self, vllm_config: VllmConfig, layer: int, inputs: ExpertInputs) -> None:
        super().__init__()
        self.dense = inputs
        self.ffn, self.router = build_routed_ffn(vllm_config, layer)


class RoutedRobertaLayer(nn.Module):
    """A RoBERTa layer whose two feed-forward linears, in two modules, are one routed layer."""

    def __init__(self, dense_layer: Any, vllm_config: VllmConfig, layer: int) -> None:
        super().__init__()
        self.attention: Any = dense_layer.attention
        self.output: Any = dense_layer.output
        del dense_layer.intermediate, self.output.dense
        inputs, self.output.dense = build_expert_linears(vllm_config, layer, glu=False, bias=True)
        self.intermediate = RoutedIntermediate(vllm_config, layer, inputs)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [T, H]; returns the same shape."""
        first = self.intermediate
        ahead = first.ffn.route_ahead(hidden_states, first.router) if first.router.routes_by_attention else None
        attention = self.attention(hidden_states)
        ffn = first.ffn(attention, first.router, first.dense, self.output.dense, ahead)
        return self.output.LayerNorm(ffn + attention)


class PrunePathRobertaForSequenceClassification(PrunePathModelMixin, RobertaForSequenceClassification):
    """PrunePath RoBERTa for sequence classification."""

    is_pooling_encoder = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        layers = self.roberta.encoder.layer
        for index, layer in enumerate(layers):
            layers[index] = RoutedRobertaLayer(layer, vllm_config, index)
