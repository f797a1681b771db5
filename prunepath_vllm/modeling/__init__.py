"""PrunePath models for transformers: ``from_pretrained``, ``forward`` and ``generate`` with ``tau``, without vLLM.

Importing this package imports neither torch nor transformers.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import CheckpointError
from prunepath_vllm.families import FAMILIES

__all__ = ["load_tokenizer", "prunepath_config_of", "register_auto_classes", "register_configs"]


def prunepath_config_of(config: Any) -> PrunePathConfig:
    """The parsed ``prunepath_config`` block of a transformers configuration.

    Raises:
        ConfigError: it has none, or one that does not parse.
    """
    return PrunePathConfig.parse(getattr(config, "prunepath_config", None))


def register_configs() -> None:
    """Teach AutoConfig and AutoTokenizer the PrunePath model types. Idempotent; imports no modelling file."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    for family in FAMILIES:
        config_class = _load(family.config_class)
        AutoConfig.register(family.model_type, config_class, exist_ok=True)
        # A tokenizer_config.json that names no class gets the dense family's, as it did before conversion.
        tokenizer_class = TOKENIZER_MAPPING.get(config_class.dense_config_class, None)
        if tokenizer_class is not None:
            AutoTokenizer.register(config_class, tokenizer_class=tokenizer_class, exist_ok=True)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a PrunePath or dense model: transformers warns of a model type that it was not taught.

    Raises:
        CheckpointError: it has none that transformers can read.
    """
    from transformers import AutoTokenizer

    register_configs()
    try:
        return AutoTokenizer.from_pretrained(path)
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: expected a tokenizer beside the weights, none can be read ({reason})") from None


def register_auto_classes() -> None:
    """Teach each Auto class the PrunePath classes, and pipelines their tau. Idempotent."""
    import transformers

    from prunepath_vllm.modeling.pipelines import teach_pipelines

    register_configs()
    for family in FAMILIES:
        auto_class = getattr(transformers, family.auto_class)
        auto_class.register(_load(family.config_class), _load(family.model_class), exist_ok=True)
    teach_pipelines()


def _load(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(import_module(module), name)
