"""A low-rank training as one small file beside a dense model: the neurons' order, the updates, the routers.

merge_adapter(dense, adapter) makes the PrunePath checkpoint from it: no clustering, calibration or training.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunepath_vllm.checkpoint import read_config, read_tensor_index, stream_tensors, validate_checkpoint
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.conversion.rewrite import rewrite_checkpoint
from prunepath_vllm.errors import CheckpointError, UsageError
from prunepath_vllm.families import Family, family_of
from prunepath_vllm.files import check_absent_or_empty, new_directory, replace_file

ORDER = "{}.neuron_order"
"""Name of a layer's permutation, over the layer's feed-forward module: int16 (int32 beyond 32767 neurons) [F]."""
UP, DOWN = ".up", ".down"
"""Suffixes of a linear's update: [outputs, rank] and [rank, inputs]."""
METADATA = "prunepath"
DENSE_DIGEST = "dense_sha256"
"""Metadata: :func:`weights_digest` of the dense model."""


def weights_digest(path: str | Path) -> str:
    """SHA-256 of a checkpoint's weights, however they are cut into files: name, dtype, shape and bytes, by name."""
    lines = []
    for name, tensor in stream_tensors(path, read_tensor_index(Path(path))):
        content = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {content}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def neuron_order(dense: str | Path, converted: str | Path) -> list[Tensor]:
    """Per layer, the dense neurons in the order a conversion has put them: int64 [F].

    Raises:
        UsageError: the checkpoint was not converted from that dense model, or its weights were changed since.
    """
    dense, converted = Path(dense), Path(converted)
    if not dense.is_dir():
        raise UsageError(f"dense model {dense}: no such directory")
    family = family_of(read_config(converted), converted=True)
    orders = []
    for layer in range(family.num_layers(read_config(converted))):
        known: dict[bytes, list[int]] = {}
        for place, neuron in enumerate(_neurons(dense, family, layer)):
            known.setdefault(neuron, []).append(place)
        try:
            orders.append(torch.tensor([known[neuron].pop(0) for neuron in _neurons(converted, family, layer)]))
        except (KeyError, IndexError):
            raise UsageError(
                f"{converted}: layer {layer} has neurons that {dense} lacks; expected the dense model it was converted "
                "from with gate 'none'"
            ) from None
    return orders


def _neurons(path: Path, family: Family, layer: int) -> list[bytes]:
    """Every neuron of a layer as the bytes of its weights: equal exactly where the neurons are."""
    names = [f"{name}.weight" for name in [*family.inputs(layer), family.output(layer)]]
    *inputs, output = (_read(path, family, name).float() for name in names)
    rows = [family.out_in(weight) for weight in inputs] + [family.out_in(output).T]
    return [row.tobytes() for row in torch.cat(rows, dim=1).numpy()]


def _read(path: Path, family: Family, name: str) -> Tensor:
    """One tensor, by its name in a converted checkpoint.

    Checkpoints of a bare backbone lack its prefix, and dense ones may hold gate and up as one.
    """
    tensors = read_tensor_index(path)
    module, part, count = name.rpartition(".")[0], 0, 1
    if family.merged is not None and name not in tensors:
        layer = next(int(word) for word in module.split(".") if word.isdigit())
        part, count = family.inputs(layer).index(module), 2
        name = name.replace(module, family.merged.format(layer))
    ((_, tensor),) = stream_tensors(path, tensors, [name if name in tensors else name.removeprefix(family.base_prefix)])
    return tensor.chunk(count)[part]


def save_adapter(
    dense: str | Path,
    checkpoint: str | Path,
    orders: list[Tensor],
    trained: Mapping[str, Tensor],
    *,
    destination: str | Path,
) -> Path:
    """Write what a low-rank training changed, in bfloat16.

    Args:
        dense: the dense model: the digest of its weights goes into the adapter's metadata.
        checkpoint: the merged checkpoint: its configuration goes there as well.
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
    metadata = {
        "format": "pt",
        METADATA: json.dumps(config["prunepath_config"]),
        DENSE_DIGEST: weights_digest(dense),
    }
    destination = Path(destination)
    save = functools.partial(save_file, tensors, metadata=metadata)
    replace_file(destination, save, like=Path(checkpoint) / "config.json")
    return destination


def read_adapter(path: str | Path) -> tuple[dict[str, Tensor], PrunePathConfig, str | None]:
    """An adapter's tensors, the configuration of the checkpoint it makes, its dense model's digest if it has that.

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
    try:
        content = json.loads(metadata[METADATA])
    except ValueError as error:
        raise CheckpointError(f"{path}: {METADATA!r} in its metadata is no JSON ({error})") from None
    block = PrunePathConfig.parse(content, where=f"{path}: metadata")
    return tensors, block, metadata.get(DENSE_DIGEST)


def merge_adapter(dense: str | Path, adapter: str | Path, destination: str | Path) -> Path:
    """Make the PrunePath checkpoint that a low-rank training ended with.

    Args:
        dense: directory of the dense model the training started from.
        adapter: of :func:`save_adapter`.
        destination: directory to create; appears complete or not at all.

    Returns:
        `destination`.

    Raises:
        UsageError: `destination` is there already.
        CheckpointError: the adapter is not one, or was trained on another dense model.
        ConfigError: the dense model is of another family or size.
    """
    dense, destination = Path(dense), Path(destination)
    tensors, block, expected = read_adapter(adapter)
    check_absent_or_empty(destination)
    found = expected and weights_digest(dense)
    if found != expected:
        raise CheckpointError(
            f"{dense}: the digest of its weights is {found}; expected {expected}, the model {adapter} was trained on"
        )
    with new_directory(destination) as staging:
        # The split is made up: every tensor that depends on it is written anew below.
        convert(
            dense,
            staging,
            expert_size=block.expert_size,
            split="random",
            router_input=block.router.input,
            router_rank=block.router.rank,
        )
        summary = validate_checkpoint(staging)
        updates: dict[str, Tensor | None] = {}
        for layer in range(summary.num_layers):
            updates |= _ordered(dense, summary.family, layer, tensors, tuple(summary.tensors))
        for name, tensor in tensors.items():
            linear = name.removesuffix(UP)
            if linear != name:
                weight = updates.get(f"{linear}.weight")
                weight = _read(dense, summary.family, f"{linear}.weight") if weight is None else weight
                update = summary.family.out_in(tensor.float() @ _wanted(tensors, f"{linear}{DOWN}").float())
                if weight.shape != update.shape:
                    raise CheckpointError(f"{adapter}: {name} does not fit {linear}.weight {list(weight.shape)}")
                updates[f"{linear}.weight"] = weight.float() + update
            elif not name.endswith((DOWN, ORDER.removeprefix("{}"))):
                updates[name] = tensor
        unknown = sorted(name for name in updates if name not in summary.tensors and not name.endswith("router.bias"))
        if unknown:
            raise CheckpointError(f"{adapter}: {unknown[0]} is no tensor of {dense}; expected the adapter's own model")
        rewrite_checkpoint(summary, updates, **block.to_json())
    return destination


def _ordered(
    dense: Path, family: Family, layer: int, tensors: Mapping[str, Tensor], known: tuple[str, ...]
) -> dict[str, Tensor]:
    """One layer's dense feed-forward tensors, neurons in the adapter's order."""
    name = ORDER.format(family.ffn.format(layer))
    order = _wanted(tensors, name).long()
    neurons = family.intermediate_size(read_config(dense))
    if not torch.equal(order.sort().values, torch.arange(neurons)):
        raise CheckpointError(f"adapter: {name}: expected every neuron from 0 to {neurons - 1} once")
    axes = {name: axis for name, axis in family.neuron_axes(layer).items() if name in known}
    return {name: _read(dense, family, name).index_select(axis, order) for name, axis in axes.items()}


def _wanted(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"adapter: tensor {name} is missing")
    return tensors[name]
