"""The module that is trained: a model, dense or PrunePath, together with its loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prunepath_vllm.families import FAMILIES, Family
from prunepath_vllm.modeling.routing import Router
from prunepath_vllm.training.head import linear_cross_entropy, shifted
from prunepath_vllm.training.losses import TERMS, RouterTerms, mean_terms


class TrainingModel(nn.Module):
    """Computes task loss plus weighted router terms; a dense model has no router terms and takes no tau."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        teacher: PreTrainedModel | None = None,
        teacher_share: float = 0.0,
        compiled: bool = False,
    ) -> None:
        """Wrap a model.

        Args:
            model: causal or a sequence classifier.
            teacher: dense causal model to distil from; frozen.
            teacher_share: of its predictions in the target.
            compiled: compile every layer, and the loss, with torch.compile.
        """
        super().__init__()
        self.model = model
        self.family = family_of_model(model)
        self.causal = model.get_output_embeddings() is not None
        self._teacher = (teacher,)  # in a tuple: not a submodule, so neither trained nor saved
        self.teacher_share = teacher_share
        self.compiled = compiled
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.observers = [self._observe(layer, router) for layer, router in enumerate(self.routers)]
        self.term_weights: Tensor
        self.register_buffer("term_weights", torch.zeros(len(TERMS)), persistent=False)
        if compiled:
            # One graph for all layers, compiled once: seconds instead of minutes for the whole model's.
            for part in (model, teacher):
                for module in part.modules() if part is not None else ():
                    if isinstance(module, GradientCheckpointingLayer):
                        module.compile(fullgraph=True, dynamic=False)

    def _observe(self, layer: int, router: Router) -> RouterTerms:
        output: Any = self.model.get_submodule(self.family.output(layer))

        def weight() -> Tensor:
            return output.weight

        experts = router.weight.shape[0]
        router.observer = RouterTerms(experts, output_weight=weight, dim=1 if self.family.conv1d else 0)
        return router.observer

    def set_terms(self, weights: Mapping[str, float], *, threshold: float | None) -> None:
        """Which router terms count from now on, and how much; the others are not computed."""
        values = torch.tensor([float(weights.get(name, 0.0)) for name in TERMS])
        self.term_weights.copy_(values)
        for observer in self.observers:
            observer.wanted = frozenset(name for name in TERMS if weights.get(name))
            observer.threshold = observer.threshold if threshold is None else threshold

    def set_routing(self, *, selection: Any, gate: Any, threshold: float | None, straight_through: float = 0.0) -> None:
        """Change every router's selection rule and gate, and the weight of selection's gradient."""
        for router in self.routers:
            router.selection, router.gate, router.threshold = selection, gate, threshold
            router.straight_through = straight_through

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
            ``loss`` with gradient; ``task`` and, of a PrunePath model, ``terms`` [len(TERMS)] without; of a classifier
            ``logits`` [B, classes].
        """
        mask = None if attention_mask is None else attention_mask.float()
        for observer in self.observers:
            observer.prepare(mask)
        options: dict[str, Any] = dict(input_ids=input_ids, attention_mask=attention_mask)
        if self.observers:
            options["tau"] = tau
        result: dict[str, Tensor] = {}
        if self.causal:
            task = self._causal_loss(options, labels)
        else:
            output = self.model(**options, labels=labels)
            task = output.loss
            result["logits"] = output.logits.detach()
        loss = task
        if self.observers:
            terms = mean_terms(self.observers)
            loss = task + (terms * self.term_weights).sum()
            result["terms"] = terms.detach()
        return result | {"loss": loss, "task": task.detach()}

    def _causal_loss(self, options: dict[str, Any], labels: Tensor) -> Tensor:
        hidden = self.model.base_model(**options, use_cache=False).last_hidden_state.flatten(0, 1)
        (teacher,) = self._teacher
        target = None
        if teacher is not None and self.training:
            with torch.no_grad():
                states = teacher.base_model(
                    input_ids=options["input_ids"], attention_mask=options["attention_mask"], use_cache=False
                ).last_hidden_state
            target = (states.flatten(0, 1), teacher.get_output_embeddings().weight)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return linear_cross_entropy(
            hidden,
            self.model.get_output_embeddings().weight,
            shifted(labels),
            teacher=target,
            share=self.teacher_share if target is not None else 0.0,
            compiled=self.compiled and self.training,
        )

    def usage(self) -> Tensor:
        """Share of the last batch's tokens that used each expert, float32 [L, E]."""
        return torch.stack([observer.usage for observer in self.observers if observer.usage is not None])

    def spread(self) -> Tensor:
        """Mean entropy of each router's softmax over the last batch, float32 [L]."""
        return torch.stack([observer.spread for observer in self.observers if observer.spread is not None])


def family_of_model(model: PreTrainedModel) -> Family:
    """The row of a model, dense or PrunePath."""
    kind = model.config.model_type
    return next(family for family in FAMILIES if kind in (family.model_type, family.dense_model_type))
