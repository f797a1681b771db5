"""The module that is trained: a model, dense or PrunePath, together with its loss."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prunepath_vllm.conversion.costs import output_rows
from prunepath_vllm.families import FAMILIES, Family
from prunepath_vllm.modeling.routing import Router
from prunepath_vllm.training.head import linear_cross_entropy, shifted
from prunepath_vllm.training.losses import TERMS, RouterTerms, masked_mean, mean_terms
from prunepath_vllm.training.targets import LayerCosts


class TrainingModel(nn.Module):
    """Computes task loss plus weighted router terms; a dense model has no router terms and takes no tau."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        teacher: PreTrainedModel | None = None,
        teacher_share: float = 0.0,
        hidden_weight: float = 0.0,
        costs: Sequence[LayerCosts] = (),
        compiled: bool = False,
        sharded: bool = False,
    ) -> None:
        """Wrap a model.

        Args:
            model: causal or a sequence classifier.
            teacher: dense causal model to distil from; frozen.
            teacher_share: of its predictions in the target.
            hidden_weight: of :func:`hidden_distance` to its layers' outputs; its layers must be as many and as wide.
            costs: how contributions are measured, by layer; none: by their squared norms.
            compiled: compile every layer, and the loss, with torch.compile.
            sharded: the model will be sharded; then its layers are not compiled, as gathering them cannot be.
        """
        super().__init__()
        self.model = model
        self.family = family_of_model(model)
        self.causal = model.get_output_embeddings() is not None
        self._teacher = (teacher,)  # in a tuple: not a submodule, so neither trained nor saved
        self.teacher_share, self.hidden_weight = teacher_share, hidden_weight
        self.compiled = compiled
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.observers: list[RouterTerms] = []
        for layer, router in enumerate(self.routers):
            rows = functools.partial(output_rows, model, self.family, layer)
            router.observer = RouterTerms(router.weight.shape[0], rows, costs[layer] if costs else None)
            self.observers.append(router.observer)
        self.term_weights: Tensor
        self.register_buffer("term_weights", torch.zeros(len(TERMS)), persistent=False)
        if compiled:
            # One graph for all layers, compiled once: seconds instead of minutes for the whole model's. DDP's buckets
            # end inside layers, where dynamo would cut the graph, in all of this process; waiting for a layer is cheap.
            torch._dynamo.config.optimize_ddp = False
            for part in (None if sharded else model, teacher):
                for layer in layers_of(part) if part is not None else ():
                    layer.compile(fullgraph=True, dynamic=False)

    def set_terms(self, weights: Mapping[str, float], *, threshold: float | None) -> None:
        """Which router terms count from now on, and how much; the others are not computed."""
        values = torch.tensor([float(weights.get(name, 0.0)) for name in TERMS])
        self.term_weights.copy_(values)
        for observer in self.observers:
            observer.wanted = frozenset(name for name in TERMS if weights.get(name))
            observer.threshold = observer.threshold if threshold is None else threshold

    def set_routing(self, *, selection: Any, gate: Any, threshold: float | None) -> None:
        """Change every router's selection rule and gate."""
        for router in self.routers:
            router.selection, router.gate, router.threshold = selection, gate, threshold

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        tau: Sequence[float] | float | None = None,
    ) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            input_ids: int64 [B, S].
            labels: int64 [B, S] with -100 where none is learned, or classes [B].
            attention_mask: [B, S], 0 at padding.
            tau: as the model takes it.

        Returns:
            ``loss`` with gradient; ``task``, ``hidden`` where it counts and, of a PrunePath model, ``terms``
            [len(TERMS)] without; of a classifier ``logits`` [B, classes].
        """
        mask = None if attention_mask is None else attention_mask.float()
        for observer in self.observers:
            observer.prepare(mask)
        options: dict[str, Any] = dict(input_ids=input_ids, attention_mask=attention_mask)
        if self.observers:
            options["tau"] = tau
        result: dict[str, Tensor] = {}
        distance: Tensor | None = None
        if self.causal:
            task, distance = self._causal_loss(options, labels)
        else:
            output = self.model(**options, labels=labels)
            task = output.loss
            result["logits"] = output.logits.detach()
        loss = task
        if distance is not None:
            loss = loss + self.hidden_weight * distance
            result["hidden"] = distance.detach()
        if self.observers:
            terms = mean_terms(self.observers)
            loss = loss + (terms * self.term_weights).sum()
            result["terms"] = terms.detach()
        return result | {"loss": loss, "task": task.detach()}

    def _causal_loss(self, options: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The loss at the head, and the layers' distance to the teacher's where it counts."""
        (teacher,) = self._teacher if self.training else (None,)
        target = distance = None
        with ExitStack() as recording:
            outputs: list[list[Tensor]] = []
            if teacher is not None and self.hidden_weight:
                outputs = [recording.enter_context(layer_outputs(part)) for part in (self.model, teacher)]
            hidden = self.model.base_model(**options, use_cache=False).last_hidden_state.flatten(0, 1)
            if teacher is not None:
                with torch.no_grad():
                    states = teacher.base_model(
                        input_ids=options["input_ids"], attention_mask=options["attention_mask"], use_cache=False
                    ).last_hidden_state
                target = (states.flatten(0, 1), teacher.get_output_embeddings().weight)
        if outputs:
            measure = _compiled_hidden_distance if self.compiled else hidden_distance
            states, wanted = (torch.stack(of_layers) for of_layers in outputs)
            distance = measure(states, wanted, options["attention_mask"])
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        loss = linear_cross_entropy(
            hidden,
            self.model.get_output_embeddings().weight,
            shifted(labels),
            teacher=target,
            share=self.teacher_share if target is not None else 0.0,
            compiled=self.compiled and self.training,
        )
        return loss, distance

    def usage(self) -> Tensor:
        """Share of the last batch's tokens that used each expert, float32 [L, E]."""
        return torch.stack([observer.usage for observer in self.observers if observer.usage is not None])

    def spread(self) -> Tensor:
        """Mean entropy of each router's softmax over the last batch, float32 [L]."""
        return torch.stack([observer.spread for observer in self.observers if observer.spread is not None])


def hidden_distance(states: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over layers and tokens of ||h - t||^2 / ||t||^2. No gradient reaches the target.

    Args:
        states: h, [L, B, S, H].
        target: t, the same shape.
        mask: [B, S], 0 at padding.

    Returns:
        float32 scalar.
    """
    target = target.detach().float()
    distance = (states.float() - target).square().sum(dim=-1) / target.square().sum(dim=-1).clamp_min(1e-6)
    return masked_mean(distance.mean(dim=0), None if mask is None else mask.float())


_compiled_hidden_distance = torch.compile(hidden_distance, dynamic=False)


def layers_of(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """A model's layers, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def layer_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What each layer returns, [B, S, H], in a forward inside the block."""
    outputs: list[Tensor] = []

    def recorded(call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            outputs.append(output[0] if isinstance(output, tuple) else output)
            return output

        return run

    # Not hooks: torch.compile would trace them with the layer.
    layers: list[Any] = layers_of(model)
    compiled = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer._compiled_call_impl = recorded(layer._compiled_call_impl or layer._call_impl)
    try:
        yield outputs
    finally:
        for layer, call in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = call


def family_of_model(model: PreTrainedModel) -> Family:
    """The row of a model, dense or PrunePath."""
    kind = model.config.model_type
    return next(family for family in FAMILIES if kind in (family.model_type, family.dense_model_type))
