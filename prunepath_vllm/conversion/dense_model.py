"""The tensors of a dense model, by its configuration, as transformers builds it."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from prunepath_vllm.checkpoint import TensorInfo
from prunepath_vllm.errors import ConfigError
from prunepath_vllm.families import Family


def dense_tensors(family: Family, config: Mapping[str, Any]) -> tuple[dict[str, TensorInfo], re.Pattern[str]]:
    """The tensors of the dense model that a config.json describes; no memory is taken for them.

    Args:
        family: of the model.
        config: its config.json, checked.

    Returns:
        Tensor name -> its shape, a tied head left out; and a pattern of names that do not matter: those that
        transformers ignores, and the tied head's.

    Raises:
        ConfigError: transformers builds no model of it.
    """
    import transformers

    fields = {name: value for name, value in config.items() if name != "quantization_config"}
    padding = fields.get("pad_token_id")
    if isinstance(padding, int) and padding >= fields.get("vocab_size", 0):
        del fields["pad_token_id"]  # of no effect on shapes, and refused
    model_class = getattr(transformers, family.dense_architecture)
    options = {**family.dense_options, "attn_implementation": "eager"}  # which needs no package
    try:
        with torch.device("meta"):
            model = model_class._from_config(
                getattr(transformers, family.dense_config_class).from_dict(fields), **options
            )
    except Exception as error:  # transformers raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"transformers builds no {family.dense_architecture} of config.json ({reason})") from None
    tied = set() if family.head(config) else {"lm_head.weight"}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *(re.escape(name) for name in tied)]
    infos = {
        name: TensorInfo("", "F32", tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    return infos, re.compile("|".join(f"(?:{one})" for one in ignored) or r"(?!)")
