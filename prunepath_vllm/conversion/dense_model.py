"""The tensors of a dense model, by its configuration, as transformers builds it."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from prunepath_vllm.checkpoint import TensorInfo
from prunepath_vllm.families import Family


def dense_tensors(family: Family, config: Mapping[str, Any]) -> tuple[dict[str, TensorInfo], re.Pattern[str]]:
    """The tensors of the dense model that a config.json describes; no memory is taken for them.

    Args:
        family: of the model.
        config: its config.json, checked.

    Returns:
        Tensor name -> its shape, the tied head's name left out, and a pattern of the names that transformers ignores.
    """
    import transformers

    fields = {name: value for name, value in config.items() if name != "quantization_config"}
    model_class = getattr(transformers, family.dense_architecture)
    with torch.device("meta"):
        model = model_class._from_config(
            getattr(transformers, family.dense_config_class).from_dict(fields), **family.dense_options
        )
    tied = set() if family.head(config) else {"lm_head.weight"}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *(re.escape(name) for name in tied)]
    infos = {
        name: TensorInfo("", "F32", tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    return infos, re.compile("|".join(f"(?:{one})" for one in ignored) or r"(?!)")
