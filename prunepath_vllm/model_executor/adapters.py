"""LoRA adapters: of a PrunePath model they change the attention's projections, and nothing else.

The engine wraps linears that it knows as such, by the last part of their names; experts and routers are none. What it
would leave out without a word, and what a router was not calibrated for, is refused here by the tensor's name.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunepath_vllm.checkpoint import check_finite, read_tensor_header, stream_tensors
from prunepath_vllm.errors import CheckpointError, UnsupportedFeatureError
from prunepath_vllm.families import family_of

ADAPTER_FILE = "adapter_model.safetensors"


def refuse_adapter(path: str | Path, config: Any) -> None:
    """Refuse the directory of an adapter that the model cannot take as a whole.

    Args:
        path: the directory, as PEFT writes it.
        config: the model's, of transformers.

    Raises:
        CheckpointError: there is no readable ``adapter_model.safetensors``, or it holds NaN or infinity.
        UnsupportedFeatureError: it changes more than attention; names the first such tensor.
    """
    mapping = config.to_dict()
    family = family_of(mapping, converted=True)
    if not (Path(path) / ADAPTER_FILE).is_file():
        raise CheckpointError(f"{path}: no {ADAPTER_FILE}; LoRA adapters in pickles are never loaded")
    tensors = read_tensor_header(path, ADAPTER_FILE)
    num_layers = family.num_layers(mapping)
    attentions = "|".join(re.escape(family.attention.format(layer)) for layer in range(num_layers))
    allowed = re.compile(
        rf"(base_model\.model\.)?({attentions})\.({'|'.join(family.adapted)})\.lora_[AB]\.weight", re.ASCII
    )
    refused = [name for name in tensors if not allowed.fullmatch(name)]
    if refused:
        raise UnsupportedFeatureError(
            f"{path}: the LoRA adapter changes {min(refused)} ({len(refused)} such tensors); PrunePath models take "
            f"adapters of attention alone ({', '.join(family.adapted)} of layers 0 to {num_layers - 1})"
        )
    for name, tensor in stream_tensors(path, tensors):
        check_finite(f"{path}: {name}", tensor)


def without_adapter_unchanged(shrink: Callable[..., None]) -> Callable[..., None]:
    """Wrap vLLM's first product of an adapter on a CPU: tokens without an adapter get none.

    Their index is -1, which the CPU operators of vLLM 0.32 take for the last adapter's place: beside a request with an
    adapter, one without would be answered with it.
    """

    @functools.wraps(shrink)
    def wrapped(inputs: Any, lora_b_weights: Any, output_tensor: Any, lora_indices_tensor: Any, *rest: Any) -> None:
        shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, *rest)
        output_tensor.masked_fill_((lora_indices_tensor < 0).unsqueeze(1), 0)

    return wrapped
