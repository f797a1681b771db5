"""Configuration of a PrunePath Qwen2 model."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config

from prunepath_vllm.modeling.configuration_utils import PrunePathConfigMixin


@strict
class PrunePathQwen2Config(PrunePathConfigMixin, Qwen2Config):
    """Qwen2Config plus the ``prunepath_config`` block of a checkpoint.

    Raises:
        ConfigError: the block does not parse, or num_experts * expert_size is not the feed-forward size.
    """

    model_type = "prunepath_qwen2"
    dense_config_class: ClassVar[type] = Qwen2Config

    prunepath_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if "sliding_attention" not in (self.layer_types or ()):
            self.sliding_window = None  # vLLM gives every layer the window of a model that has one
