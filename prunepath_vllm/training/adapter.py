"""A low-rank training as one small file beside a dense model: the neurons' order, the updates, the routers.

merge_adapter(dense, adapter) makes the PrunePath checkpoint from it: no clustering, calibration or training.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunepath_vllm.checkpoint import read_config, read_tensor_index, stream_tensors
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import CheckpointError, UsageError
from prunepath_vllm.families import family_of

ORDER = "{}.neuron_order"
"""Name of a layer's permutation, over the layer's feed-forward module: int16 (int32 beyond 32767 neurons) [F]."""
UP, DOWN = ".up", ".down"
"""Suffixes of a linear's update: [outputs, rank] and [rank, inputs]."""
METADATA = "prunepath"


def neuron_order(dense: str | Path, converted: str | Path) -> list[Tensor]:
    """Per layer, the dense neurons in the order a conversion has put them: int64 [F].

    Raises:
        UsageError: the checkpoint was not converted from that dense model, or its weights were changed since.
    """
    dense, converted = Path(dense), Path(converted)
    if not dense.is_dir():
        raise UsageError(f"dense model {dense}: no such directory")
    family = family_of(read_config(converted), converted=True)
    sides = [(dense, read_tensor_index(dense)), (converted, read_tensor_index(converted))]
    orders = []
    for layer in range(family.num_layers(read_config(converted))):
        name = f"{family.inputs(layer)[-1]}.weight"
        rows: list[list[bytes]] = []
        for path, tensors in sides:
            ((_, weight),) = stream_tensors(path, tensors, [name])
            weight = weight.T if family.conv1d else weight
            rows.append([row.tobytes() for row in weight.float().contiguous().numpy()])
        places: dict[bytes, list[int]] = {}
        for place, row in enumerate(rows[0]):
            places.setdefault(row, []).append(place)
        try:
            orders.append(torch.tensor([places[row].pop(0) for row in rows[1]]))
        except (KeyError, IndexError):
            raise UsageError(f"{converted}: {name} has neurons that {dense} lacks; expected its dense model") from None
    return orders


def save_adapter(
    checkpoint: str | Path, orders: list[Tensor], trained: Mapping[str, Tensor], *, destination: str | Path
) -> Path:
    """Write what a low-rank training changed, in bfloat16.

    Args:
        checkpoint: the merged checkpoint: its configuration goes into the adapter's metadata.
        orders: of :func:`neuron_order`.
        trained: every trained parameter, by its name in the low-rank model.
        destination: the file.
    """
    config = read_config(checkpoint)
    family = family_of(config, converted=True)
    kind = torch.int16 if family.intermediate_size(config) <= 2**15 else torch.int32
    tensors = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in trained.items()}
    for layer, order in enumerate(orders):
        tensors[ORDER.format(family.ffn.format(layer))] = order.to(kind)
    block = json.dumps(config["prunepath_config"])
    destination = Path(destination)
    save_file(tensors, destination, metadata={"format": "pt", METADATA: block, "model_type": config["model_type"]})
    return destination


def read_adapter(path: str | Path) -> tuple[dict[str, Tensor], PrunePathConfig]:
    """An adapter's tensors and the configuration of the checkpoint it makes.

    Raises:
        CheckpointError: no such file, or not an adapter.
        ConfigError: its configuration does not parse.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            metadata: Any = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    if METADATA not in metadata:
        raise CheckpointError(f"{path}: no {METADATA!r} in its metadata; expected an adapter")
    return tensors, PrunePathConfig.parse(json.loads(metadata[METADATA]), where=f"{path}: metadata")
