"""Dense checkpoints whose linears are float8: what their configuration may say, and their weights in a plain dtype.

Read are compressed-tensors' "float-quantized" and vLLM's "fp8"; everything else is refused by name. How activations are
to be quantised is checked and left out: what is made of such a source multiplies them as they are.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunepath_vllm.checkpoint import BLOCK_SCALE, FLOAT_DTYPES, SCALE, TensorInfo, check_finite, stream_tensors
from prunepath_vllm.config import check_quantization_config
from prunepath_vllm.conversion.rounding import quantise_weight
from prunepath_vllm.errors import CheckpointError, ConfigError
from prunepath_vllm.families import Family
from prunepath_vllm.tau import shown

STORED = "F8_E4M3"
_PLAIN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_QUANTISERS = ("scale", "zero_point", "g_idx", "packed", "weight_shape")
"""In the last part of a tensor's name: it is there for some quantisation."""

_WITHOUT_EFFECT = ("quant_method", "version", "quantization_status", "global_compression_ratio", "run_compressed")
_COMPRESSED_TENSORS = (*_WITHOUT_EFFECT, "config_groups", "format", "ignore", "sparsity_config")
_IGNORED = ("ignored_layers", "modules_to_not_convert")
_FP8 = (*_WITHOUT_EFFECT, *_IGNORED, "activation_scheme", "weight_block_size", "fmt", "scale_fmt")
_ARGUMENTS: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
_DEFAULTS: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
"""Those of compressed-tensors."""


@dataclass(frozen=True)
class Float8Format:
    """How a checkpoint's float8 weights are scaled.

    Attributes:
        method: ``quant_method``.
        granularity: "channel", an output's weights have a scale, "tensor" or "block".
        block: rows and columns of a block, with "block".
        ignored: modules that are said to be plain.
    """

    method: str
    granularity: str
    block: tuple[int, int] | None
    ignored: frozenset[str]

    @property
    def scale(self) -> str:
        """What a tensor of scales is called below its linear."""
        return BLOCK_SCALE if self.block is not None and self.method == "fp8" else SCALE

    def scale_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes that the scales of a weight of `shape`, [out, in], may have; the first is the usual one."""
        if self.block is not None:
            return [tuple(-(-size // part) for size, part in zip(shape, self.block, strict=True))]
        return [(shape[0], 1)] if self.granularity == "channel" else [(), (1,)]

    def __str__(self) -> str:
        unit = f"block of {self.block[0]} x {self.block[1]}" if self.block is not None else self.granularity
        return f"float8_e4m3fn with a scale per {unit} ({self.method})"


def parse_format(config: Mapping[str, Any], family: Family) -> Float8Format | None:
    """What a dense config.json says of its weights' quantisation; None where it is not quantised.

    Raises:
        ConfigError: ``quantization_config`` is no object, or describes anything but what this module reads; names it.
    """
    check_quantization_config(config)
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method")
    if method not in ("compressed-tensors", "fp8"):
        raise ConfigError(
            f"quantization_config: the weights are quantised ({shown(method)}); expected plain ones, or float8 as "
            "'compressed-tensors' or 'fp8' store it"
        )
    if family.conv1d:
        raise ConfigError(f"quantization_config: {shown(method)}; expected plain weights in this family")
    if method == "fp8":
        return _parse_fp8(settings)
    return _parse_compressed_tensors(settings)


def _parse_fp8(settings: Mapping[str, Any]) -> Float8Format:
    _check_known(settings, _FP8)
    _expect(settings, "fmt", (None, "e4m3"))
    _expect(settings, "scale_fmt", (None, "float"))
    _expect(settings, "activation_scheme", (None, "dynamic", "static"))
    ignored = frozenset(name for field in _IGNORED for name in _names(settings, field))
    block = settings.get("weight_block_size")
    if block is None:
        return Float8Format("fp8", "tensor", None, ignored)
    return Float8Format("fp8", "block", _block("weight_block_size", block), ignored)


def _parse_compressed_tensors(settings: Mapping[str, Any]) -> Float8Format:
    _check_known(settings, _COMPRESSED_TENSORS)
    _expect(settings, "format", ("float-quantized",))
    if sparsity := settings.get("sparsity_config"):
        dense = isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"
        _expect({"sparsity_config": None if dense else sparsity}, "sparsity_config", (None, {}))
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise ConfigError(f"quantization_config.config_groups: {shown(groups)}; expected an object of one group")
    ((name, group),) = groups.items()
    where = f"config_groups.{name}"
    if not isinstance(group, Mapping):
        raise ConfigError(f"quantization_config.{where}: {shown(group)}; expected an object")
    _check_known(group, ("targets", "weights", "input_activations", "format"), where)
    _expect(group, "format", (None, "float-quantized"), where)
    activations = group.get("input_activations")
    if activations is not None:
        _check_arguments(activations, f"{where}.input_activations")
    where = f"{where}.weights"
    weights = _check_arguments(group.get("weights"), where)
    _expect(weights, "dynamic", (None, False), where)
    _expect(weights, "actorder", (None, False), where)
    _expect(weights, "strategy", ("channel", "tensor", "block"), where)
    block = None
    if weights["strategy"] == "block":
        block = _block(f"{where}.block_structure", weights.get("block_structure"))
    return Float8Format("compressed-tensors", weights["strategy"], block, frozenset(_names(settings, "ignore")))


def _check_arguments(arguments: Any, where: str) -> Mapping[str, Any]:
    """What compressed-tensors says of a tensor's quantisation, if that is to float8, symmetric."""
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"quantization_config.{where}: {shown(arguments)}; expected an object")
    for field, value in _ARGUMENTS.items():
        _expect(_DEFAULTS | dict(arguments), field, (value,), where)
    return arguments


def _check_known(settings: Mapping[str, Any], known: tuple[str, ...], where: str = "") -> None:
    """Refuse fields of unknown effect; null, false and what is empty have none."""
    for field, value in settings.items():
        if field not in known and value:
            name = f"{where}.{field}" if where else field
            raise ConfigError(f"quantization_config.{name}: {shown(value)}; expected none, it is not followed")


def _expect(settings: Mapping[str, Any], field: str, values: tuple[Any, ...], where: str = "") -> None:
    value = settings.get(field)
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values):
        name = f"{where}.{field}" if where else field
        expected = " or ".join(shown(one) for one in values if one is not None)
        raise ConfigError(f"quantization_config.{name}: {shown(value)}; expected {expected}")


def _names(settings: Mapping[str, Any], field: str) -> list[str]:
    value = settings.get(field)
    if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise ConfigError(f"quantization_config.{field}: {shown(value)}; expected a list of names of modules")
    return value or []


def _block(field: str, value: Any) -> tuple[int, int]:
    sizes = value if isinstance(value, list) else []
    sizes = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool) and size > 0]
    if len(sizes) != 2 or len(value) != 2:
        raise ConfigError(f"quantization_config.{field}: {shown(value)}; expected two positive integers")
    return sizes[0], sizes[1]


class DenseWeights:
    """A dense checkpoint's tensors as a plain one would have them: float8 weights are widened while they are read.

    The scales of all of them are read and checked at once; they are a thousandth of the weights.

    Args:
        path: the checkpoint's directory.
        config: its config.json.
        stored: its tensors, by :func:`checkpoint.read_tensor_index`.
        family: of the model.
        format: how they are quantised, by :func:`parse_format`.

    Attributes:
        tensors: name -> what a plain checkpoint's header would say; nothing of what quantisation needs besides.
        dtype: that float8 weights are widened to, config.json's; None where none are.

    Raises:
        ConfigError: config.json's dtype is none to widen to.
        CheckpointError: a tensor is quantised otherwise, or lacks a scale, or has one that is mis-shaped, not finite or
            not positive; names it.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        stored: Mapping[str, TensorInfo],
        family: Family,
        format: Float8Format | None,
    ) -> None:
        self.path, self.stored, self.format = path, stored, format
        self.tensors, self.scales = dict(stored), dict[str, Tensor]()
        self.dtype: torch.dtype | None = None
        if format is None:
            for name, info in stored.items():
                if info.dtype.startswith("F8_"):
                    raise CheckpointError(
                        f"{path}: tensor {name} has dtype {info.dtype}, and config.json no quantization_config; "
                        f"expected one of {', '.join(FLOAT_DTYPES)}"
                    )
            return
        dtype = _plain_dtype(path, config, stored, family)
        self.dtype = getattr(torch, dtype)
        scales = self._match(format)
        for name in [*scales.values(), *(n for n in stored if n.rpartition(".")[2] == "input_scale")]:
            del self.tensors[name]
        for name in scales:
            self.tensors[name] = replace(stored[name], dtype=_PLAIN[dtype])
        weights = {scale: name for name, scale in scales.items()}
        for scale, tensor in stream_tensors(path, stored, weights):
            check_finite(scale, tensor)
            self.scales[weights[scale]] = tensor.float()

    def _match(self, format: Float8Format) -> dict[str, str]:
        """Float8 weight -> its scales, by the headers."""
        scales: dict[str, str] = {}
        for name, info in self.stored.items():
            module, _, kind = name.rpartition(".")
            if kind != "weight" or info.dtype in FLOAT_DTYPES:
                continue
            if info.dtype != STORED or len(info.shape) != 2:
                raise self._refused(name, f"one of {', '.join(FLOAT_DTYPES)}, or {STORED} with two dimensions")
            if module in format.ignored:
                raise self._refused(name, "a plain one, as quantization_config says that it is not quantised")
            scales[name] = f"{module}.{format.scale}"
            expected, found = format.scale_shapes(info.shape), self.stored.get(scales[name])
            if found is None:
                raise CheckpointError(
                    f"{self.path}: tensor {scales[name]} is missing; expected shape {list(expected[0])}, as {name} is "
                    f"{format}"
                )
            if found.shape not in expected or found.dtype not in FLOAT_DTYPES:
                raise self._refused(scales[name], f"shape {list(expected[0])} and one of {', '.join(FLOAT_DTYPES)}")
        known = set(scales.values())
        for name, info in self.stored.items():
            kind = name.rpartition(".")[2]
            quantiser = any(part in kind for part in _QUANTISERS) and kind != "input_scale"
            if name not in known and (quantiser or (info.dtype.startswith("F8_") and name not in scales)):
                raise self._refused(name, "none such: it belongs to no float8 weight, or is not followed")
        return scales

    def _refused(self, name: str, expected: str) -> CheckpointError:
        info = self.stored[name]
        found = f"tensor {name} has shape {list(info.shape)} and dtype {info.dtype}"
        return CheckpointError(f"{self.path}: {found}; expected {expected}")

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor on the CPU) of some of :attr:`tensors` file by file, one at a time.

        Raises:
            CheckpointError: a file has become unreadable.
        """
        for name, tensor in stream_tensors(self.path, self.stored, names):
            yield name, tensor if self.dtype is None else self._widened(name, tensor, self.dtype)

    def _widened(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        scale = self.scales.get(name)
        if scale is None or self.format is None:
            return tensor
        wide = tensor.to(torch.float32)
        if self.format.block is None:
            return wide.mul_(scale).to(dtype)
        rows, columns = self.format.block[0], min(self.format.block[1], wide.shape[1])
        for start, row in zip(range(0, len(wide), rows), scale, strict=True):
            wide[start : start + rows] *= row.repeat_interleave(columns)[: wide.shape[1]]
        return wide.to(dtype)

    def lossless(self, *, output: bool) -> bool:
        """Whether a scale per neuron says all that the stored scales do, of the second linear or the first ones."""
        granularity = "" if self.format is None else self.format.granularity
        return granularity == "tensor" or (granularity == "channel" and not output)

    def neuron_scaled(self, name: str, *, output: bool, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """A feed-forward weight in float8 with a scale per neuron: as it is stored where that is lossless.

        Args:
            name: of a float8 weight, [out, in].
            output: whether its inputs are the neurons, not its outputs.
            part: which of the `parts` that its rows are split into.
            parts: their number.

        Returns:
            float8_e4m3fn, shaped as that part, and float32 [d_ff].
        """
        ((_, stored),) = stream_tensors(self.path, self.stored, [name])
        axis = int(output)
        if not self.lossless(output=output):
            wide = self._widened(name, stored, torch.float32).chunk(parts)[part]
            return quantise_weight(wide, axis, "float8_e4m3fn")
        scale = self.scales[name].flatten().expand(stored.shape[axis])
        return stored.chunk(parts)[part], scale.chunk(parts)[part]


def _plain_dtype(path: Path, config: Mapping[str, Any], stored: Mapping[str, TensorInfo], family: Family) -> str:
    """What config.json says the weights are, or the dtype of the embedding where it does not."""
    said = config.get("dtype") or config.get("torch_dtype")
    if said is None:
        bare = family.embedding.removeprefix(family.base_prefix)
        info = stored.get(family.embedding) or stored.get(bare)
        said = next((name for name, dtype in _PLAIN.items() if info is not None and info.dtype == dtype), None)
    if not isinstance(said, str) or said.removeprefix("torch.") not in _PLAIN:
        raise ConfigError(f"{path}: dtype: {shown(said)}; expected what to dequantise to, one of {', '.join(_PLAIN)}")
    return said.removeprefix("torch.")
