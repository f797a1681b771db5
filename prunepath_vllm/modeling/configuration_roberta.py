"""Configuration of a PrunePath RoBERTa model."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import RobertaConfig

from prunepath_vllm.modeling.configuration_utils import PrunePathConfigMixin


@strict
class PrunePathRobertaConfig(PrunePathConfigMixin, RobertaConfig):
    """RobertaConfig plus the ``prunepath_config`` block of a checkpoint.

    Raises:
        ConfigError: the block does not parse, or num_experts * expert_size is not the feed-forward size.
    """

    model_type = "prunepath_roberta"
    dense_config_class: ClassVar[type] = RobertaConfig

    prunepath_config: dict[str, Any] | None = None
