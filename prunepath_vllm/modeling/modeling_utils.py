"""What every PrunePath model shares: loading that refuses bad checkpoints, ``tau``, and routing statistics."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from prunepath_vllm.checkpoint import check_finite, validate_checkpoint
from prunepath_vllm.errors import CheckpointError, UnsupportedFeatureError, UsageError
from prunepath_vllm.families import FAMILIES
from prunepath_vllm.kernels import reference
from prunepath_vllm.modeling.inference import in_inference
from prunepath_vllm.modeling.routing import Router, Tau, parse_taus, refuse_other_names, token_taus

ROUTING_OUTPUTS = {"router_logits": OutputRecorder(Router, index=1), "active_experts": OutputRecorder(Router, index=2)}
"""Merge into a base model's ``_can_record_outputs``."""


class RoutedOutput:
    """What ``output_router_logits=True`` adds to a model's output; both are None otherwise.

    router_logits: one float32 [B, S, E] per layer, with gradient.
    active_experts: one bool [B, S, E] per layer.
    """

    router_logits: tuple[Tensor, ...] | None
    active_experts: tuple[Tensor, ...] | None

    @property
    def ffn_sparsity(self) -> Tensor | None:
        """Eq. 15 before its mean: float32 [L, B, S], the share of experts each token left out. Padding included."""
        if self.active_experts is None:
            return None
        return torch.stack([reference.ffn_sparsity(active) for active in self.active_experts])


@dataclass
class PrunePathCausalLMOutput(RoutedOutput, CausalLMOutputWithPast):
    """CausalLMOutputWithPast with routing statistics."""

    router_logits: tuple[Tensor, ...] | None = None
    active_experts: tuple[Tensor, ...] | None = None


@dataclass
class PrunePathSequenceClassifierOutput(RoutedOutput, SequenceClassifierOutput):
    """SequenceClassifierOutput with routing statistics."""

    router_logits: tuple[Tensor, ...] | None = None
    active_experts: tuple[Tensor, ...] | None = None


class Instead:
    """A module as its dense class's ``forward`` is to see it: some attributes replaced, for this one call.

    So tau reaches the feed-forward layer as an argument of that call. An attribute of the module itself would be shared
    by threads, and be another one's when gradient checkpointing runs the layer again.
    """

    def __init__(self, module: nn.Module, **instead: Any) -> None:
        self._module = module
        for name, value in instead.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class RoutedBackbone(PreTrainedModel):
    """A model without its head: turns ``tau`` into one value per token and records routing. Before the dense class."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.prunepath = config.prunepath
        family = next(family for family in FAMILIES if family.model_type == config.model_type)
        # Rotary embeddings have no table here.
        self.position_rows = family.positions(config.to_dict()) if family.gate is None else None

    def routed_forward(self, *, tau: Tau | None, positions: Tensor, batch_size: int, **kwargs: Any) -> Any:
        """The dense class's forward with token taus made from `tau`.

        Args:
            tau: as ``forward`` takes it; None means the configuration's default.
            positions: each token's position in its sequence, int [B or 1, S].
            batch_size: B.
            **kwargs: the dense forward's arguments.

        Raises:
            TauError: `tau` is not one, or is given by another name.
            UsageError: more tokens than the model has positions.
        """
        refuse_other_names(kwargs)
        self._check_positions(positions)
        block = self.prunepath
        tau = block.unset_tau if tau is None else tau
        taus = token_taus(tau, positions, batch_size, dense_positions=block.dense_positions, max_tau=block.max_tau)
        outputs = super().forward(tau=taus, **kwargs)
        if kwargs.get("output_router_logits") and self.training and torch.is_grad_enabled():
            self._check_router_gradient(outputs.router_logits)
        return outputs

    def _check_positions(self, positions: Tensor) -> None:
        """Refuse tokens behind the last row of a position table.

        On a GPU only what the shape alone tells: reading values would wait for the device in every step.

        Raises:
            UsageError: names the number of tokens and the model's.
        """
        limit = self.position_rows
        if limit is None or torch.compiler.is_compiling() or positions.numel() == 0:
            return
        if positions.device.type != "cpu" and positions.shape[-1] <= limit:
            return
        if (tokens := int(positions.max()) + 1) > limit:
            raise UsageError(
                f"a sequence of {tokens} tokens; expected at most {limit}, the positions that the model has"
            )

    def _check_router_gradient(self, router_logits: tuple[Tensor, ...]) -> None:
        trainable = any(module.weight.requires_grad for module in self.modules() if isinstance(module, Router))
        if trainable and not any(logits.requires_grad for logits in router_logits):
            raise UnsupportedFeatureError(
                "output_router_logits=True under gradient checkpointing with use_reentrant=True gives logits without "
                "gradient; expected gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


class RoutedDecoder(RoutedBackbone):
    """A causal backbone. Before the dense class."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        tau: Tau | None = None,
        **kwargs: Any,
    ) -> Any:
        """The dense forward, plus ``tau`` (a number or one per sequence).

        Raises:
            TauError: `tau` is out of range, or has not one value per sequence.
        """
        tokens = exactly_one(input_ids, inputs_embeds)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + tokens.shape[1], device=tokens.device).unsqueeze(0)
        recorded = any(
            kwargs.get(f"output_{name}", getattr(self.config, f"output_{name}", False)) for name in ROUTING_OUTPUTS
        )
        return self.routed_forward(
            tau=tau,
            native=in_inference(tokens.device) and not recorded and not self.training,
            positions=position_ids,
            batch_size=tokens.shape[0],
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class RoutedModel(PreTrainedModel):
    """A model with its head: loading that refuses what transformers would only warn about. Before the dense class."""

    _tp_plan = None
    _pp_plan = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``from_pretrained``, for checkpoints that are complete.

        Args:
            pretrained_model_name_or_path: a checkpoint directory, or a hub name.
            output_loading_info: return (model, loading info) instead of the model.
            ignore_mismatched_sizes: draw a tensor anew where its shape differs, for a head with other labels.

        Raises:
            CheckpointError: a tensor or file is missing, unexpected, mis-shaped or not finite.
            ConfigError: config.json does not describe a PrunePath model.
        """
        checkpoint = validate_checkpoint(checkpoint_directory(pretrained_model_name_or_path, kwargs))
        quantization = None
        if checkpoint.linear_dtype is not None:
            # Not for transformers' own support: it needs another package, rounds the scales to the model's dtype, and
            # after a forward saves what no reader takes.
            quantization, kwargs = _without_quantization(cls.config_class, checkpoint.path, kwargs)
            kwargs["linear_dtype"] = checkpoint.linear_dtype
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            router_bias=checkpoint.router_bias,
            **kwargs,
        )
        check_loaded(model, info, ignore_mismatched_sizes=ignore_mismatched_sizes)
        if quantization is not None:
            model.config.quantization_config = quantization
        return (model, info) if output_loading_info else model


class RoutedCausalLM(RoutedModel):
    """A causal language model: forward and generate with tau. Before the dense class."""

    dense_class: Any
    """transformers' class of the dense model."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        tau: Tau | None = None,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> PrunePathCausalLMOutput:
        """The dense model's forward, with two arguments more.

        Args:
            input_ids: [B, S], or `inputs_embeds` [B, S, H].
            attention_mask: [B, past + S], 0 at padding.
            position_ids: [B, S]; needed with left padding.
            past_key_values: the KV cache.
            inputs_embeds: instead of `input_ids`.
            labels: [B, S], -100 where no loss is taken.
            use_cache: return the KV cache.
            logits_to_keep: how many last positions to give logits for; 0 means all.
            tau: a number in (0, 1.05], or one per sequence; None means the checkpoint's default_tau.
            output_router_logits: return ``router_logits`` and ``active_experts``, and so ``ffn_sparsity``.
            **kwargs: anything else the dense backbone or the loss function takes.

        Raises:
            TauError: `tau` is out of range, or has not one value per sequence.
        """
        outputs: Any = None

        def backbone(*inputs: Any, **options: Any) -> Any:
            nonlocal outputs
            outputs = self.base_model(*inputs, tau=tau, return_dict=True, **options)
            return outputs

        # The dense forward: what it does between backbone and loss (a cap on the logits, a scale) is the family's.
        dense = self.dense_class.forward(
            Instead(self, **{self.base_model_prefix: backbone}),
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            output_router_logits=output_router_logits,
            output_active_experts=output_router_logits,
            return_dict=True,
            **kwargs,
        )
        return PrunePathCausalLMOutput(
            loss=dense.loss,
            logits=dense.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.get("router_logits"),
            active_experts=outputs.get("active_experts"),
        )

    def generate(
        self, inputs: Any = None, generation_config: Any = None, *args: Any, tau: Tau | None = None, **kwargs: Any
    ) -> Any:
        """transformers' ``generate``, with ``tau``: a number, or one per prompt (its beams and samples share it).

        A draft model (``assistant_model``), dense or PrunePath, runs at its own default.

        Raises:
            TauError: `tau` is out of range, has not one value per prompt, or is given by another name or in the
                generation configuration, where nothing reads it.
        """
        refuse_other_names([*kwargs, *vars(generation_config or self.generation_config)])
        if tau is not None:
            kwargs["tau"] = parse_taus(
                tau, max_tau=self.config.prunepath.max_tau
            )  # a tensor, where there are several, is expanded along with the prompts
        return super().generate(inputs, generation_config, *args, **kwargs)

    def generate_batch(self, inputs: Any, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate_batch``, at the checkpoint's default_tau: it packs requests into one sequence.

        Raises:
            TauError: a tau is given, which transformers would drop.
        """
        refuse_other_names(kwargs)
        return super().generate_batch(inputs, generation_config, *args, **kwargs)

    def init_continuous_batching(self, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """What ``generate_batch`` and a manager of one's own begin with; the same holds."""
        refuse_other_names(vars(generation_config or self.generation_config))
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        # Assisted generation hands the draft what it hands this model; a dense draft knows no tau, and a PrunePath one
        # has its own default. Which tokens are accepted is this model's word, at its tau.
        if kwargs.get("assistant_model") is not None:
            kwargs["model_kwargs"] = {name: value for name, value in kwargs["model_kwargs"].items() if name != "tau"}
        return super()._get_candidate_generator(**kwargs)


def exactly_one(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Return the one that is given.

    Raises:
        ValueError: both or neither are.
    """
    if input_ids is not None and inputs_embeds is None:
        return input_ids
    if inputs_embeds is not None and input_ids is None:
        return inputs_embeds
    raise ValueError("expected exactly one of input_ids and inputs_embeds")


def checkpoint_directory(name_or_path: str | os.PathLike[str], options: Mapping[str, Any]) -> Path:
    """The local directory of a checkpoint; a hub name is downloaded into the hub's cache, where transformers finds it.

    Args:
        name_or_path: a directory, or a hub name.
        options: from_pretrained's keyword arguments, of which those about the hub are read.
    """
    subfolder = options.get("subfolder", "")
    if os.path.isdir(name_or_path):
        return Path(name_or_path, subfolder)
    names = ("revision", "cache_dir", "token", "force_download", "local_files_only")
    hub_options = {name: options[name] for name in names if options.get(name) is not None}
    snapshot = snapshot_download(str(name_or_path), allow_patterns=["*.json", "*.safetensors"], **hub_options)
    return Path(snapshot, subfolder)


def _without_quantization(
    config_class: Any, path: Path, options: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Take ``quantization_config`` out of the configuration that from_pretrained will see.

    Args:
        config_class: the model's.
        path: the checkpoint's directory.
        options: from_pretrained's keyword arguments; those that are fields of the configuration change it.

    Returns:
        What was taken out, and the keyword arguments with the configuration.
    """
    rest = dict(options)
    config = rest.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
    else:
        config = config_class.from_pretrained(config or path)
        for name in (rest.keys() & config.to_dict().keys()) - {"dtype", "quantization_config"}:
            setattr(config, name, rest.pop(name))
    quantization, config.quantization_config = config.quantization_config, None
    return quantization, rest | {"config": config}


def check_loaded(model: PreTrainedModel, info: Mapping[str, Any], *, ignore_mismatched_sizes: bool) -> None:
    """Refuse a model that transformers has loaded with a warning.

    Args:
        model: the loaded model.
        info: its loading info (``output_loading_info=True``).
        ignore_mismatched_sizes: accept tensors of another shape.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected, mis-shaped or not finite.
    """
    for name in sorted(info["missing_keys"]):
        raise CheckpointError(f"{name}: missing from the checkpoint; expected by {type(model).__name__}")
    for name in sorted(info["unexpected_keys"]):
        raise CheckpointError(f"{name}: not a tensor of {type(model).__name__}; expected no tensor of that name")
    if not ignore_mismatched_sizes:
        for name, found, expected in sorted(info["mismatched_keys"]):
            raise CheckpointError(f"{name}: shape {list(found)} in the checkpoint; expected {list(expected)}")
    for message in info["error_msgs"]:
        raise CheckpointError(f"the checkpoint does not load: {message}")
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta:  # offloaded to disk
            check_finite(name, tensor)
