"""Configuration of a PrunePath GPT-2 model."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

from prunepath_vllm.modeling.configuration_utils import PrunePathConfigMixin


@strict
class PrunePathGPT2Config(PrunePathConfigMixin, GPT2Config):
    """GPT2Config plus the ``prunepath_config`` block of a checkpoint.

    Raises:
        ConfigError: the block does not parse, or num_experts * expert_size is not the feed-forward size.
    """

    model_type = "prunepath_gpt2"
    dense_config_class: ClassVar[type] = GPT2Config

    prunepath_config: dict[str, Any] | None = None
