"""Reading and validating checkpoint directories from their JSON and safetensors headers.

Shared by conversion, transformers' from_pretrained and the engine; imports neither transformers nor vLLM.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunepath_vllm.config import PrunePathConfig
from prunepath_vllm.errors import CheckpointError, ConfigError, UsageError
from prunepath_vllm.families import Family, family_of
from prunepath_vllm.fields import check_fields
from prunepath_vllm.linears import attention_linears, linear_dtype
from prunepath_vllm.tau import shown

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = ("F32", "F16", "BF16")
"""Dtypes of feed-forward and router tensors, as safetensors headers spell them."""
QUANTISED_DTYPES = {"int8": "I8", "float8_e4m3fn": "F8_E4M3"}
"""Those of quantised experts, by ``expert_dtype``."""
SCALE = "weight_scale"
"""What a tensor of scales is called below its linear."""
BLOCK_SCALE = "weight_scale_inv"
"""What "fp8" sources call the scales of blocks, by which weights are multiplied all the same."""


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says about one tensor."""

    file: str
    """File name inside the checkpoint directory."""
    dtype: str
    """As safetensors spells it: "F32", "BF16", ..."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointSummary:
    """A PrunePath checkpoint that passed :func:`validate_checkpoint`."""

    path: Path
    family: Family
    prunepath: PrunePathConfig
    config: dict[str, Any]
    """The whole config.json."""
    tensors: dict[str, TensorInfo]
    router_bias: bool
    """Whether every router has a bias; otherwise none has."""
    linear_dtype: str | None = None
    """What the attention's linears are stored in, where config.json has a ``quantization_config``."""

    @property
    def num_layers(self) -> int:
        """Number of routed feed-forward layers."""
        return self.family.num_layers(self.config)

    @property
    def hidden_size(self) -> int:
        """Model width."""
        return self.family.hidden_size(self.config)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: no such file, or it is not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file; expected a JSON object") from None
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, nested too deep
        raise CheckpointError(f"{path}: expected a JSON object ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def read_config(path: str | Path) -> dict[str, Any]:
    """Read config.json of a checkpoint directory, dense or converted.

    Raises:
        UsageError: no such directory.
        CheckpointError: no such file in it, or it is not a JSON object.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path}: no such directory; expected a checkpoint directory")
    return read_json(path / "config.json")


def load_prunepath_config(path: str | Path) -> tuple[Family, PrunePathConfig, dict[str, Any]]:
    """Parse config.json of a PrunePath checkpoint: its family, its ``prunepath_config`` and the whole mapping.

    Raises:
        UsageError: no such directory.
        CheckpointError: config.json cannot be read.
        ConfigError: it does not describe a PrunePath model.
    """
    config = read_config(path)
    try:
        family = family_of(config, converted=True)
        prunepath = PrunePathConfig.parse(config.get("prunepath_config"))
        prunepath.check_intermediate_size(family.intermediate_size(config))
        prunepath.check_router(family.hidden_size(config))
        prunepath.check_layers(family.num_layers(config))
        linear_dtype(config, family, prunepath)
        check_fields(family, config)
    except ConfigError as error:
        raise ConfigError(f"{Path(path) / 'config.json'}: {error}") from None
    return family, prunepath, config


def read_tensor_index(path: str | Path) -> dict[str, TensorInfo]:
    """List every tensor of a checkpoint directory from the safetensors headers; no weights are read.

    Returns:
        Tensor name -> :class:`TensorInfo`, in the order of the files.

    Raises:
        CheckpointError: missing, truncated or corrupt files, an index that disagrees with them or points outside the
            directory, or no safetensors at all.
    """
    path = Path(path)
    has_index, has_single = (path / INDEX_FILE).is_file(), (path / WEIGHTS_FILE).is_file()
    if has_index and has_single:
        raise CheckpointError(f"{path}: both {WEIGHTS_FILE} and {INDEX_FILE} are there; expected one of them")
    if has_index:
        return _read_sharded(path)
    if has_single:
        return read_tensor_header(path, WEIGHTS_FILE)
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    found = f", found only {pickles[0]}, a pickle, which is never loaded" if pickles else ""
    raise CheckpointError(f"{path}: no weights; expected {WEIGHTS_FILE} or {INDEX_FILE}{found}")


def stream_tensors(
    path: str | Path, tensors: Mapping[str, TensorInfo], names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, CPU tensor) file by file, one tensor at a time.

    Args:
        path: checkpoint directory.
        tensors: its :func:`read_tensor_index`.
        names: the tensors wanted; all where None.

    Raises:
        CheckpointError: a file has become unreadable.
    """
    by_file: dict[str, list[str]] = {}
    for name in tensors if names is None else names:
        by_file.setdefault(tensors[name].file, []).append(name)
    for file, wanted in by_file.items():
        try:
            with safe_open(Path(path) / file, framework="pt") as handle:
                for name in wanted:
                    yield name, handle.get_tensor(name)
        except (SafetensorError, FileNotFoundError) as error:
            raise CheckpointError(f"{Path(path) / file}: cannot be read ({error})") from None


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with NaN or infinite values, and scales that are not positive.

    Raises:
        CheckpointError: names the tensor and counts the values.
    """
    if not tensor.is_floating_point():
        return
    # float8_e4m3fn has no infinities, and PyTorch no isfinite for it.
    bad = tensor.isnan() if tensor.dtype == torch.float8_e4m3fn else ~tensor.isfinite()
    if bad.any():
        found = f"{int(bad.sum())} of {tensor.numel()} values are NaN or infinite"
        raise CheckpointError(f"tensor {name}: {found}; expected finite")
    if name.endswith((f".{SCALE}", f".{BLOCK_SCALE}")) and (bad := tensor <= 0).any():
        found = f"{int(bad.sum())} of {tensor.numel()} scales are zero or negative"
        raise CheckpointError(f"tensor {name}: {found}; expected positive")


def routed_layers(where: object, family: Family, config: Mapping[str, Any], tensors: Mapping[str, object]) -> range:
    """The layers that a configuration promises, before anything is made for each of them.

    Raises:
        CheckpointError: more layers than there are tensors.
    """
    count = family.num_layers(config)
    if count > len(tensors):
        raise CheckpointError(
            f"{where}: config.json says {family.num_layers_field} {shown(count)}, but there are {len(tensors)} "
            "tensors; expected several in every layer"
        )
    return range(count)


def ffn_tensor_shapes(
    family: Family, config: Mapping[str, Any], layer: int, prunepath: PrunePathConfig | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's feed-forward tensors, routers and scales excluded.

    The same dense and converted, but where `prunepath`, a checkpoint's block, does not keep all experts.
    """
    hidden = family.hidden_size(config)
    intermediate = family.intermediate_size(config) if prunepath is None else prunepath.neurons(layer)
    bias = family.gate is None or bool(config.get("mlp_bias"))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, axis in family.neuron_axes(layer).items():
        if not name.endswith(".bias"):
            shapes[name] = (intermediate, hidden) if axis == 0 else (hidden, intermediate)
        elif bias:
            shapes[name] = (intermediate,)
    if bias:
        shapes[f"{family.output(layer)}.bias"] = (hidden,)
    return shapes


def linear_tensors(family: Family, layer: int) -> dict[str, str]:
    """The weights of a layer that ``quantization_config`` is about -> their scales, float32 [outputs, 1]."""
    return {f"{linear}.weight": f"{linear}.{SCALE}" for linear in attention_linears(family, layer)}


def quantised_tensors(family: Family, layer: int) -> dict[str, str]:
    """The weights of a layer that ``expert_dtype`` is about -> their scales, float32 [d_ff]."""
    linears = [*family.inputs(layer), family.output(layer)]
    return {f"{linear}.weight": f"{linear}.{SCALE}" for linear in linears}


def router_tensor_shapes(
    family: Family, config: Mapping[str, Any], prunepath: PrunePathConfig, layer: int, *, bias: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's router tensors."""
    router, hidden, rank = family.router(layer), family.hidden_size(config), prunepath.router.rank
    shapes: dict[str, tuple[int, ...]] = {f"{router}.weight": (prunepath.num_experts, rank or hidden)}
    if rank is not None:
        shapes[f"{router}.down.weight"] = (rank, hidden)
    if bias:
        shapes[f"{router}.bias"] = (prunepath.num_experts,)
    return shapes


def check_tensors(
    where: object,
    tensors: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Check that each expected tensor is there, has its shape and a floating dtype, or the one that `dtypes` says.

    Raises:
        CheckpointError: names the first that does not.
    """
    for name, shape in expected.items():
        info = tensors.get(name)
        if info is None:
            raise CheckpointError(f"{where}: tensor {name} is missing; expected shape {list(shape)}")
        if info.shape != shape:
            raise CheckpointError(f"{where}: tensor {name} has shape {list(info.shape)}; expected {list(shape)}")
        dtype = (dtypes or {}).get(name)
        if info.dtype not in (FLOAT_DTYPES if dtype is None else (dtype,)):
            wanted = f"one of {', '.join(FLOAT_DTYPES)}" if dtype is None else dtype
            raise CheckpointError(f"{where}: tensor {name} has dtype {info.dtype}; expected {wanted}")


def refuse_changed(where: object, prunepath: PrunePathConfig | None, before: str, *, quantised: bool = False) -> None:
    """Refuse a checkpoint of quantised or of missing experts where something would need all of them, as they were.

    Args:
        where: the checkpoint.
        prunepath: its block; None for a dense one.
        before: what has to come before, "calibrating", say.
        quantised: whether quantised experts will do.

    Raises:
        UsageError: names its dtype, or the share that is there.
    """
    if prunepath is not None and prunepath.kept_experts is not None:
        raise UsageError(
            f"{where}: kept_experts: {prunepath.kept_share:.1%} of its experts are there; expected all of them: prune "
            f"cold experts after {before}"
        )
    if prunepath is not None and prunepath.expert_dtype is not None and not quantised:
        raise UsageError(
            f"{where}: expert_dtype {prunepath.expert_dtype!r}: its experts are quantised; expected ones that are not: "
            f"quantise after {before}"
        )


def validate_checkpoint(path: str | Path, *, check_values: bool = False) -> CheckpointSummary:
    """Check that a directory is a PrunePath checkpoint that keeps what its configuration promises.

    Feed-forward and router tensors are checked for presence, shape and dtype, none may be unknown, and the embedding's,
    the head's and the quantised linears' are checked too; other tensors are left to the loaders. Reads headers only,
    unless `check_values`.

    Args:
        path: checkpoint directory.
        check_values: also read every tensor and look for NaN, infinity and scales that are not positive, one tensor in
            memory at a time.

    Raises:
        UsageError: no such directory.
        ConfigError: config.json does not describe a PrunePath model.
        CheckpointError: files or tensors are missing, unexpected, mis-shaped, corrupt or not finite.
    """
    path = Path(path)
    family, prunepath, config = load_prunepath_config(path)
    tensors = read_tensor_index(path)
    stray = {file.name for file in path.glob("*.safetensors")} - {info.file for info in tensors.values()}
    if stray:
        raise CheckpointError(f"{path / min(stray)}: not part of this checkpoint's index; expected no other weights")

    layers = routed_layers(path, family, config, tensors)
    with_bias = [layer for layer in layers if f"{family.router(layer)}.bias" in tensors]
    if with_bias and len(with_bias) < len(layers):
        lacking = next(layer for layer in layers if layer not in with_bias)
        raise CheckpointError(
            f"{path}: tensor {family.router(lacking)}.bias is missing, but layer {with_bias[0]} has one; "
            "expected a router bias in every layer or in none"
        )
    expected: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    stored = linear_dtype(config, family, prunepath)
    for layer in layers if stored is not None else ():
        for weight, scale in linear_tensors(family, layer).items():
            info = tensors.get(weight)
            if info is None or len(info.shape) != 2:
                found = "is missing" if info is None else f"has shape {list(info.shape)}"
                raise CheckpointError(f"{path}: tensor {weight} {found}; expected [outputs, inputs] in {stored}")
            # How many outputs there are is left to the loaders, which know the heads.
            expected |= {weight: info.shape, scale: (info.shape[0], 1)}
            dtypes |= {weight: QUANTISED_DTYPES[str(stored)], scale: "F32"}
    for layer in layers:
        expected.update(ffn_tensor_shapes(family, config, layer, prunepath))
        if prunepath.expert_dtype is not None:
            scales = quantised_tensors(family, layer)
            expected.update(dict.fromkeys(scales.values(), (prunepath.neurons(layer),)))
            dtypes |= dict.fromkeys(scales, QUANTISED_DTYPES[prunepath.expert_dtype])
            dtypes |= dict.fromkeys(scales.values(), "F32")
        expected.update(router_tensor_shapes(family, config, prunepath, layer, bias=bool(with_bias)))
    ffn = _ffn_pattern(family)
    for name in tensors:
        if ffn.match(name) and name not in expected:
            raise CheckpointError(
                f"{path}: tensor {name} is unexpected; expected only this family's feed-forward linears"
                f"{', their scales' if prunepath.expert_dtype else ''} and routers in layers 0 to {len(layers) - 1}"
            )
    for name in tensors:
        if name.endswith(f".{SCALE}") and name not in expected:
            raise CheckpointError(
                f"{path}: tensor {name} is unexpected; expected scales only of what expert_dtype and "
                "quantization_config are about"
            )
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int):
        raise ConfigError(f"{path / 'config.json'}: vocab_size: expected a positive integer, got {vocabulary!r}")
    expected[family.embedding] = (vocabulary, family.hidden_size(config))
    expected |= family.head(config)
    check_tensors(path, tensors, expected, dtypes)

    if check_values:
        for name, tensor in stream_tensors(path, tensors):
            try:
                check_finite(name, tensor)
            except CheckpointError as error:
                raise CheckpointError(f"{path / tensors[name].file}: {error}") from None
    return CheckpointSummary(path, family, prunepath, config, tensors, router_bias=bool(with_bias), linear_dtype=stored)


def _ffn_pattern(family: Family) -> re.Pattern[str]:
    """Matches the names of all tensors below a feed-forward module, whatever the layer."""
    modules = {template for template in (family.ffn, family.gate, family.up, family.down) if template}
    escaped = (re.escape(module).replace(re.escape("{}"), r"\d+") for module in sorted(modules))
    return re.compile(rf"(?:{'|'.join(escaped)})\.")


def _read_sharded(path: Path) -> dict[str, TensorInfo]:
    index = path / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: expected an object of tensor names to file names")
    for name, file in weight_map.items():
        # A plain name: "../x", "/x" and "a/x" would read files that are not part of the checkpoint.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            raise CheckpointError(
                f"{index}: tensor {name} is in {file!r}; expected the name of a .safetensors file in the same directory"
            )
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        for name, info in read_tensor_header(path, file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{path / file}: tensor {name} is there, but {INDEX_FILE} has it in {weight_map.get(name)!r}; "
                    "expected them to agree"
                )
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{path / file}: tensor {name} is missing; {INDEX_FILE} expects it there")
    return tensors


def read_tensor_header(path: str | Path, file: str) -> dict[str, TensorInfo]:
    """List the tensors of one safetensors file in a directory; no weights are read.

    Raises:
        CheckpointError: the file is missing, truncated or corrupt.
    """
    path = Path(path)
    try:
        with safe_open(path / file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            return {name: TensorInfo(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path / file}: no such file; {INDEX_FILE} expects it") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / file}: truncated or not a safetensors file ({error})") from None
