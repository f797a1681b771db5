"""What a training changed as one small file beside a dense model: the neurons' order, the updates, the routers.

merge_adapter(dense, adapter) makes the PrunePath checkpoint from it: no clustering, calibration or training. Updates
of a low-rank training are exact; those of full fine-tuning are rounded to a few bits a weight.
"""

import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from prunepath_vllm.checkpoint import read_config, read_tensor_index, stream_tensors, validate_checkpoint
from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.conversion.convert import convert
from prunepath_vllm.conversion.rewrite import rewrite_checkpoint
from prunepath_vllm.conversion.rounding import quantise_weight
from prunepath_vllm.errors import CheckpointError, UsageError
from prunepath_vllm.families import Family, family_of
from prunepath_vllm.files import check_absent_or_empty, new_directory, replace_file
from prunepath_vllm.kernels.layer import dequantise
from prunepath_vllm.training.levels import from_levels
from prunepath_vllm.training.moments import input_moments
from prunepath_vllm.training.packed import pack_within, unpack

ORDER = "{}.neuron_order"
"""Name of a layer's permutation, over the layer's feed-forward module: int16 (int32 beyond 32767 neurons) [F]."""
UP, DOWN = ".up", ".down"
"""Suffixes of a linear's update: [outputs, rank] and [rank, inputs]."""
NUMBERS, STEP = ".numbers", ".step"
"""Suffixes of a weight's update in few bits, of :func:`prunepath_vllm.training.packed.pack_within`."""
CODES, SCALE = ".delta", ".delta_scale"
"""Suffixes of the same in an adapter of version 0.2.0, for :func:`prunepath_vllm.training.levels.from_levels`."""
FLOAT8, FLOAT8_SCALE = ".float8", ".float8_scale"
"""Suffixes of a matrix that is held itself, in float8 with a float32 scale per row."""
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


def order_of(adapter: str | Path, merged: str | Path) -> list[Tensor]:
    """What :func:`neuron_order` gave when an adapter was written, from the adapter and the checkpoint it makes.

    Raises:
        CheckpointError, ConfigError: as :func:`read_adapter`.
    """
    config = read_config(merged)
    family = family_of(config, converted=True)
    neurons, layers = family.intermediate_size(config), range(family.num_layers(config))
    tensors, *_ = read_adapter(adapter, [ORDER.format(family.ffn.format(layer)) for layer in layers])
    return [_order(tensors, family, layer, neurons) for layer in layers]


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
    tensors = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in trained.items()}
    return _write(dense, checkpoint, orders, tensors, Path(destination))


def save_delta(
    dense: str | Path,
    checkpoint: str | Path,
    orders: list[Tensor],
    *,
    bits: float,
    destination: str | Path,
    sequences: Sequence[Tensor] = (),
    lowest_tau: float = 0.25,
) -> Path:
    """Write the difference of a fine-tuned checkpoint to its dense model in a few bits a weight.

    Of matrices that differ, the difference is held as :func:`prunepath_vllm.training.packed.pack_within` rounds it, in
    most bits where it matters most; routers' matrices in float8, each row with a scale; vectors that differ in
    bfloat16. Merging gives the checkpoint back but for that rounding.

    Args:
        dense: the dense model.
        checkpoint: what it was converted to and trained.
        orders: of :func:`neuron_order`, of the conversion before the training.
        bits: the most that an entry takes, mean over all matrices that differ.
        destination: the file.
        sequences: token ids, int64 [S] each, to fit the rounding to, for causal models; none rounds every entry to the
            nearest.
        lowest_tau: the sequences run at taus from it to 1.
    """
    dense, checkpoint = Path(dense), Path(checkpoint)
    family = family_of(read_config(checkpoint), converted=True)
    index = read_tensor_index(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moments = _moments(checkpoint, sequences, lowest_tau, device) if sequences else {}
    tensors: dict[str, Tensor] = {}
    matrices: list[str] = []
    axes = {name: (axis, layer) for layer in range(len(orders)) for name, axis in family.neuron_axes(layer).items()}

    def change(name: str, tensor: Tensor) -> Tensor:
        """A weight's difference to the dense model's: float32."""
        before = _read(dense, family, name)
        if name in axes:
            axis, layer = axes[name]
            before = before.index_select(axis, orders[layer])
        return tensor.to(device).float() - before.to(device).float()

    def changes(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream_tensors(checkpoint, index, names):
            yield name, change(name, tensor)

    for name, tensor in tqdm(stream_tensors(checkpoint, index), total=len(index), desc="comparing", unit="tensor"):
        if ".router." in name and tensor.dim() == 2:
            tensors[f"{name}{FLOAT8}"], tensors[f"{name}{FLOAT8_SCALE}"] = quantise_weight(tensor, 0, "float8_e4m3fn")
        elif ".router." in name:
            tensors[name] = tensor.bfloat16()
        elif change(name, tensor).any():
            if tensor.dim() == 2:
                matrices.append(name)
            else:
                tensors[name] = tensor.bfloat16()
    for fitted in (True, False):  # errors with and without a moment do not compare
        alike = [name for name in matrices if (name in moments) is fitted]
        changed = functools.partial(changes, alike)
        for name, (numbers, step) in pack_within(bits, changed, moments if fitted else {}).items():
            tensors[f"{name}{NUMBERS}"], tensors[f"{name}{STEP}"] = numbers, step
    return _write(dense, checkpoint, orders, tensors, Path(destination))


def _moments(checkpoint: Path, sequences: Sequence[Tensor], lowest_tau: float, device: str) -> dict[str, Tensor]:
    """:func:`input_moments` of a causal checkpoint, each over its weight's rows: what an error of one entry costs."""
    from transformers import AutoModelForCausalLM

    from prunepath_vllm.modeling import register_auto_classes

    register_auto_classes()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).requires_grad_(False).eval().to(device)
    moments = input_moments(model, sequences, lowest_tau=lowest_tau, seed=0)
    return {name: moment / len(model.get_parameter(name)) for name, moment in moments.items()}


def _write(
    dense: str | Path, checkpoint: str | Path, orders: list[Tensor], tensors: dict[str, Tensor], destination: Path
) -> Path:
    config = read_config(checkpoint)
    family = family_of(config, converted=True)
    kind = torch.int16 if family.intermediate_size(config) <= 2**15 else torch.int32
    for layer, order in enumerate(orders):
        tensors[ORDER.format(family.ffn.format(layer))] = order.to(kind)
    _save(tensors, config, weights_digest(dense), destination, like=Path(checkpoint) / "config.json")
    return destination


def update_configuration(adapter: str | Path, checkpoint: str | Path) -> None:
    """Take a checkpoint's configuration, changed since, into the adapter that was written for it.

    Raises:
        CheckpointError, ConfigError: as :func:`read_adapter`.
    """
    tensors, _, digest = read_adapter(adapter)
    _save(tensors, read_config(checkpoint), digest, Path(adapter), like=Path(adapter))


def _save(
    tensors: dict[str, Tensor], config: Mapping[str, Any], digest: str | None, destination: Path, *, like: Path
) -> None:
    metadata = {"format": "pt", METADATA: json.dumps(config["prunepath_config"])}
    if digest is not None:
        metadata[DENSE_DIGEST] = digest
    replace_file(destination, functools.partial(save_file, tensors, metadata=metadata), like=like)


def read_adapter(
    path: str | Path, names: Collection[str] | None = None
) -> tuple[dict[str, Tensor], PrunePathConfig, str | None]:
    """An adapter's tensors, the configuration of the checkpoint it makes, its dense model's digest if it has that.

    Args:
        path: of the file.
        names: of the tensors to read, where it has them; None for all.

    Raises:
        CheckpointError: no such file, or not an adapter.
        ConfigError: its configuration does not parse.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            metadata: Any = handle.metadata() or {}
            held = handle.keys()
            tensors = {name: handle.get_tensor(name) for name in held if names is None or name in names}
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
    """Make the PrunePath checkpoint that a training ended with.

    Args:
        dense: directory of the dense model the training started from.
        adapter: of :func:`save_adapter` or :func:`save_delta`.
        destination: directory to create; appears complete or not at all.

    Returns:
        `destination`.

    Raises:
        UsageError: `destination` is there already, or not apart from `dense`.
        CheckpointError: the adapter is not one, or was trained on another dense model.
        ConfigError: the dense model is of another family or size.
    """
    dense, destination = Path(dense), Path(destination)
    check_absent_or_empty(destination, source=dense)
    tensors, block, expected = read_adapter(adapter)
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
            if name.endswith((UP, NUMBERS, CODES)):
                target = f"{name.removesuffix(UP)}.weight" if name.endswith(UP) else name.rpartition(".")[0]
                weight = updates.get(target)
                weight = _read(dense, summary.family, target) if weight is None else weight
                misfit = f"{adapter}: {name} does not fit {target} {list(weight.shape)}"
                try:
                    update = _update(summary.family, tensors, name, weight.shape)
                except (RuntimeError, ValueError) as error:
                    raise CheckpointError(f"{misfit} ({error})") from None
                if update.shape != weight.shape:
                    raise CheckpointError(misfit)
                updates[target] = weight.float() + update
            elif name.endswith(FLOAT8):
                scale = _wanted(tensors, name.removesuffix(FLOAT8) + FLOAT8_SCALE)
                updates[name.removesuffix(FLOAT8)] = dequantise(tensor, scale, torch.float32)
            elif not name.endswith((DOWN, STEP, SCALE, FLOAT8_SCALE, ORDER.removeprefix("{}"))):
                updates[name] = tensor
        unknown = sorted(name for name in updates if name not in summary.tensors and not name.endswith("router.bias"))
        if unknown:
            raise CheckpointError(f"{adapter}: {unknown[0]} is no tensor of {dense}; expected the adapter's own model")
        rewrite_checkpoint(summary, updates, **block.to_json())
    return destination


def _update(family: Family, tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """What is added to one weight of that shape."""
    if name.endswith(NUMBERS):
        step = _wanted(tensors, name.removesuffix(NUMBERS) + STEP)
        return unpack(tensors[name], *shape) * step.float()
    if name.endswith(CODES):
        return from_levels(tensors[name], _wanted(tensors, name.removesuffix(CODES) + SCALE), shape[-1])
    return family.out_in(tensors[name].float() @ _wanted(tensors, name.removesuffix(UP) + DOWN).float())


def _ordered(
    dense: Path, family: Family, layer: int, tensors: Mapping[str, Tensor], known: tuple[str, ...]
) -> dict[str, Tensor]:
    """One layer's dense feed-forward tensors, neurons in the adapter's order."""
    order = _order(tensors, family, layer, family.intermediate_size(read_config(dense)))
    axes = {name: axis for name, axis in family.neuron_axes(layer).items() if name in known}
    return {name: _read(dense, family, name).index_select(axis, order) for name, axis in axes.items()}


def _order(tensors: Mapping[str, Tensor], family: Family, layer: int, neurons: int) -> Tensor:
    """A layer's permutation of so many neurons: int64 [F]."""
    name = ORDER.format(family.ffn.format(layer))
    order = _wanted(tensors, name).long()
    if not torch.equal(order.sort().values, torch.arange(neurons)):
        raise CheckpointError(f"adapter: {name}: expected every neuron from 0 to {neurons - 1} once")
    return order


def _wanted(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"adapter: tensor {name} is missing")
    return tensors[name]
