"""Configuration of a PrunePath Llama model."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from prunepath_vllm.modeling.configuration_utils import PrunePathConfigMixin


@strict
class PrunePathLlamaConfig(PrunePathConfigMixin, LlamaConfig):
    """LlamaConfig plus the ``prunepath_config`` block of a checkpoint.

    Raises:
        ConfigError: the block does not parse, or num_experts * expert_size is not the feed-forward size.
    """

    model_type = "prunepath_llama"
    dense_config_class: ClassVar[type] = LlamaConfig

    prunepath_config: dict[str, Any] | None = None
