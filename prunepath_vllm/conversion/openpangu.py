"""openPangu-Embedded, published with code of its own, is Llama with biases on all four attention projections.

Its configuration and tokenizer are written down here as what transformers and vLLM know; its code is never run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunepath_vllm.errors import ConfigError

MODEL_TYPE = "PanguEmbedded"
ARCHITECTURE = "PanguEmbeddedForCausalLM"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


def is_openpangu(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is openPangu-Embedded's."""
    return config.get("model_type") == MODEL_TYPE


def as_llama(source: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the Llama that computes what openPangu-Embedded does.

    Args:
        source: the model's directory.
        config: its config.json; ``bias`` says whether q, k, v and o have biases.

    Raises:
        ConfigError: another architecture, a ``bias`` that is no truth value, or no tokenizer.json.
    """
    if config.get("architectures") != [ARCHITECTURE]:
        raise ConfigError(
            f"{source}: architectures: got {config.get('architectures')!r}; "
            f"expected [{ARCHITECTURE!r}] with model_type {MODEL_TYPE!r}"
        )
    bias = config.get("bias", config.get("attention_bias", False))
    if not isinstance(bias, bool):
        raise ConfigError(f"{source}: bias: {bias!r}; expected true or false")
    if not (source / TOKENIZER).is_file():
        raise ConfigError(
            f"{source}: no {TOKENIZER}: the tokenizer that comes with the model is Python code, which is not run; "
            f"expected a {TOKENIZER} of the same vocabulary beside the weights"
        )
    kept = {key: value for key, value in config.items() if key not in ("bias", "auto_map")}
    return kept | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": bias}


def mend_tokenizer_config(directory: Path) -> None:
    """Let a converted checkpoint's tokenizer_config.json name the class that reads tokenizer.json."""
    path = directory / TOKENIZER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    settings.pop("auto_map", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
