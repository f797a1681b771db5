"""Dense checkpoint in, PrunePath checkpoint out: neurons permuted into experts, routers added, the function kept."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prunepath_vllm.arguments import check_hub_name
from prunepath_vllm.checkpoint import (
    TensorInfo,
    check_finite,
    check_tensors,
    ffn_tensor_shapes,
    quantised_tensors,
    read_config,
    read_tensor_index,
    routed_layers,
    router_tensor_shapes,
    stream_tensors,
    validate_checkpoint,
)
from prunepath_vllm.config import FORMAT_VERSION, PrunePathConfig, check_dense_shape
from prunepath_vllm.conversion import openpangu
from prunepath_vllm.conversion.dense_model import dense_tensors
from prunepath_vllm.conversion.float8_source import DenseWeights, parse_format
from prunepath_vllm.conversion.model_card import SOURCE_WEIGHTS, write_model_card
from prunepath_vllm.conversion.splits import METHODS, neuron_orders
from prunepath_vllm.conversion.writing import COPIED_FILES, ShardWriter, copy_files
from prunepath_vllm.devices import check_device
from prunepath_vllm.errors import CheckpointError, ConfigError, UsageError
from prunepath_vllm.families import Family, family_of
from prunepath_vllm.fields import check_fields
from prunepath_vllm.files import check_absent_or_empty, check_writable, new_directory
from prunepath_vllm.kernels.layer import dtype_name

ROUTERS = ("zero", "calibrated")
ROUTER_INPUTS = ("ffn", "attention")
GATES = ("none", "sigmoid")

_ADAPTER_FILE = "adapter_config.json"
"""transformers puts the adapter of a directory with this file on the model."""
_LEFT_OUT = re.compile(
    r".*(\.attn\.(masked_)?bias|\.embeddings\.position_ids|\.rotary_emb\.inv_freq)$"  # buffers older versions saved
    r"|roberta\.pooler\."  # a pretraining part the classifier has no use for
)
_SNAPSHOT = re.compile(r"models--(.+)/snapshots/[^/]+$")
"""Where a Hugging Face cache keeps a model: its name, "/" written "--"."""
_HEADS = ("lm_head.", "classifier.")


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    expert_size: int = 32,
    split: str = "kmeans",
    router: str = "zero",
    gate: str = "none",
    router_input: str = "ffn",
    router_rank: int | None = None,
    dense_positions: int = 0,
    calibration_text: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    expert_dtype: str | None = None,
) -> Path:
    """Convert a dense checkpoint. At tau >= 1 the result computes the dense model's function.

    Weights are streamed: besides one layer's clustering, memory holds the output shard being written
    (:data:`writing.MAX_SHARD_BYTES`). `dst` appears complete or not at all. The co-activation split and calibrated
    routers also load the model. Of a source whose linears are float8 (:mod:`float8_source`), the dense model is the
    dequantised one.

    Args:
        src: directory of a dense model, or its Hugging Face name.
        dst: directory to create; may exist if empty.
        expert_size: d_e, neurons per expert.
        split: "kmeans" (input weights), "coactivation" (on `calibration_text`) or "random".
        router: "zero", or "calibrated" on `calibration_text`. Of a low rank, zero is the second factor alone: training
            moves neither of two zeros.
        gate: "none", or "sigmoid": eq. 10's gate, a zero router's 1/2 made up for by doubling the second linear.
        router_input: "ffn", or "attention": what enters the same block's self-attention module.
        router_rank: rank of the routers, 1 to the hidden size; None for full ones.
        dense_positions: how many tokens at a sequence's beginning use every expert.
        calibration_text: UTF-8 text file.
        seed: of the split and the calibration.
        device: "cpu" or "cuda", for clustering and calibration.
        expert_dtype: "float8_e4m3fn" leaves the feed-forward linears of a float8 source in float8: as they are stored,
            or requantised where a scale per neuron does not say what the source's scales do. None dequantises them.

    Returns:
        `dst`.

    Raises:
        UsageError: arguments that make no sense together, `src` not to be had, `dst` not empty, not to be made or not
            apart from `src`, a text that is not one.
        ConfigError: `src` is not of a supported family, function or size, or is quantised in a way that is not read.
        CheckpointError: `src` cannot be read, or its weights are not what its configuration promises.
    """
    dst = Path(dst)
    text = None if calibration_text is None else Path(calibration_text)
    named = (
        ("split", split, METHODS),
        ("router", router, ROUTERS),
        ("gate", gate, GATES),
        ("router input", router_input, ROUTER_INPUTS),
    )
    for name, value, known in named:
        if value not in known:
            raise UsageError(f"{name}: {value!r}; expected one of {', '.join(known)}")
    if expert_dtype not in (None, "float8_e4m3fn"):
        raise UsageError(
            f"expert dtype: {expert_dtype!r}; expected float8_e4m3fn, or none and `prunepath quantize` after"
        )
    if dense_positions < 0:
        raise UsageError(f"dense positions: {dense_positions}; expected 0 or more")
    _check_arguments(src, dst, expert_size=expert_size, split=split, router=router, text=text, device=device)
    source, base_model = _resolve_source(src)
    if (source / _ADAPTER_FILE).exists():
        raise CheckpointError(
            f"{source}: {_ADAPTER_FILE} is there, of an adapter, which is not read; expected a model with it "
            "merged into the weights, or a directory without that file"
        )
    config = read_config(source)
    pangu = openpangu.is_openpangu(config)
    if pangu:
        config = openpangu.as_llama(source, config)
        if split == "coactivation":
            raise UsageError("split coactivation runs the dense model, whose own code is not run; expected another")
    family = _dense_family(source, config)
    try:
        quantised = parse_format(config, family)
        num_experts = check_dense_shape(family.intermediate_size(config), expert_size)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    hidden = family.hidden_size(config)
    if router_rank is not None and not 1 <= router_rank <= hidden:
        raise UsageError(f"router rank: {router_rank}; expected 1 to {hidden}, the hidden size of {source}")

    if quantised is None and expert_dtype is not None:
        raise UsageError(
            f"{source}: expert dtype {expert_dtype} keeps a source's float8 weights, and these are plain; expected "
            "none, and `prunepath quantize` after the conversion"
        )
    if quantised is not None and split == "coactivation":
        raise UsageError(f"split coactivation runs the dense model, which is {quantised}; expected another split")

    stored = read_tensor_index(source)
    dense = DenseWeights(source, config, stored, family, quantised)
    tensors = dense.tensors
    layers = routed_layers(source, family, config, tensors)
    new_names = _new_names(family, tensors, layers)
    old_names = {new: old for old, names in new_names.items() for new in names}
    expected: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        expected.update(ffn_tensor_shapes(family, config, layer))
    expected |= family.head(config)
    found = {new: _part(tensors[old], len(new_names[old])) for new, old in old_names.items()}
    # What a config.json says of its size is held against files before a model is built of it.
    check_tensors(source, found, expected)
    _check_other_tensors(source, family, config, found, layers)
    if expert_dtype is not None:
        for layer in layers:
            for weight in quantised_tensors(family, layer):
                if old_names[weight] not in dense.scales:
                    raise UsageError(
                        f"{source}: tensor {old_names[weight]} is plain; expected float8 with expert dtype "
                        f"{expert_dtype}, or none and `prunepath quantize` after the conversion"
                    )
    if router == "calibrated":  # what calibration would refuse is told before the clustering
        from prunepath_vllm.conversion.calibrate import CONTEXT, calibration_sequences, sequence_length

        assert text is not None
        context = sequence_length(family, config, default=CONTEXT)
        if context <= dense_positions:
            raise UsageError(f"dense positions: {dense_positions}; expected fewer than {context}, a sequence's tokens")
        if not pangu:  # no tokenizer before its files are mended
            calibration_sequences(source, family, config, text)
    check_writable(dst)

    def read(name: str) -> Tensor:
        old = old_names[name]
        ((_, tensor),) = dense.stream([old])
        return tensor.chunk(len(new_names[old]))[new_names[old].index(name)]

    orders = neuron_orders(split, source, family, config, num_experts, read=read, text=text, seed=seed, device=device)
    prunepath = PrunePathConfig.parse(
        dict(
            format_version=FORMAT_VERSION,
            num_experts=num_experts,
            expert_size=expert_size,
            gate=gate,
            dense_positions=dense_positions,
            split=dict(method=split, seed=seed, source=_split_source(split, text)),
            base_model=base_model,
            router=dict(input=router_input, rank=router_rank),
        )
    )

    new_config = _new_config(config, family, prunepath)
    if quantised is not None:
        new_config[SOURCE_WEIGHTS] = _said_of(dense, expert_dtype)
    with new_directory(dst) as staging:
        # Where experts stay float8, routers are calibrated on the dequantised model first.
        plain = staging if expert_dtype is None else staging / "plain"
        plain.mkdir(exist_ok=True)
        copy_files(source, plain)
        if pangu:
            openpangu.mend_tokenizer_config(plain)
        _write_config(plain, new_config)
        _write_weights(dense, plain, family, config, new_names, orders, prunepath)
        validate_checkpoint(plain)
        write_model_card(plain)
        if router == "calibrated":
            from prunepath_vllm.conversion.calibrate import calibrate

            assert text is not None
            calibrate(plain, text, device=device, seed=seed)
        if expert_dtype is not None:
            doubled = gate == "sigmoid" and router == "zero"
            _with_float8_experts(plain, staging, dense, expert_dtype, new_names, orders, doubled=doubled)
            shutil.rmtree(plain)
    return dst


def _check_arguments(
    src: str | Path, dst: Path, *, expert_size: int, split: str, router: str, text: Path | None, device: str
) -> None:
    if expert_size <= 0:
        raise UsageError(f"expert size: {expert_size}; expected a positive integer")
    needs_text = [what for what in (split, router) if what in ("coactivation", "calibrated")]
    if needs_text and text is None:
        raise UsageError(f"{needs_text[0]} needs a calibration text; expected a UTF-8 text file, got none")
    if text is not None and not needs_text:
        raise UsageError(f"calibration text {text}: split {split!r} with router {router!r} uses none; expected no text")
    if text is not None and not text.is_file():
        raise UsageError(f"calibration text {text}: no such file")
    check_device(device)
    check_absent_or_empty(dst, source=src)


def _resolve_source(src: str | Path) -> tuple[Path, str]:
    """The directory of the dense model, downloaded if need be, and the name to remember it by."""
    path = Path(src)
    if path.is_dir():
        snapshot = _SNAPSHOT.search(path.resolve().as_posix())
        return path, snapshot[1].replace("--", "/", 1) if snapshot else path.resolve().name
    name = str(src)
    check_hub_name(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=["model*.safetensors", *COPIED_FILES])), name
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{name}: no such directory, and not to be had from Hugging Face ({reason})") from None


def _dense_family(source: Path, config: Mapping[str, Any]) -> Family:
    """The family of a dense config.json that can be converted.

    Raises:
        ConfigError: already converted, another family or function.
    """
    if "prunepath_config" in config:
        raise ConfigError(f"{source}: already a PrunePath checkpoint; expected a dense one")
    try:
        family = family_of(config, converted=False)
        check_fields(family, config)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return family


def _new_names(family: Family, tensors: Mapping[str, TensorInfo], layers: range) -> dict[str, list[str]]:
    """Name in the source -> name in the converted checkpoint, in the source's order, without what is left out.

    Two names of a tensor that is split between them. A checkpoint saved from the bare backbone (GPT-2's official one)
    lacks the backbone's prefix.
    """
    bare = not any(name.startswith(family.base_prefix) for name in tensors)
    named = {name: family.base_prefix + name if bare and not name.startswith(_HEADS) else name for name in tensors}
    split: dict[str, list[str]] = {}
    if family.merged is not None:
        for layer in layers:
            for kind in ("weight", "bias"):
                split[f"{family.merged.format(layer)}.{kind}"] = [f"{part}.{kind}" for part in family.inputs(layer)]
    return {old: split.get(new, [new]) for old, new in named.items() if not _LEFT_OUT.match(new)}


def _check_other_tensors(
    source: Path, family: Family, config: Mapping[str, Any], found: Mapping[str, TensorInfo], layers: range
) -> None:
    """Refuse a source with other tensors than its model's: the checkpoint would lack some, or carry what nothing reads.

    Raises:
        CheckpointError: names the first tensor that is missing, mis-shaped or unexpected.
        ConfigError: transformers builds no model of the config.json.
    """
    try:
        whole, ignored = dense_tensors(family, config)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    parts = _new_names(family, whole, layers)
    expected = {new: _part(whole[old], len(names)).shape for old, names in parts.items() for new in names}
    check_tensors(source, found, expected)
    for name in found:
        if name not in expected and not ignored.search(name):
            raise CheckpointError(
                f"{source}: tensor {name} is unexpected; expected those of {family.dense_architecture}"
            )


def _part(info: TensorInfo, count: int) -> TensorInfo:
    """One of the equal parts of a tensor; the whole where its rows do not divide, for its shape to be refused."""
    if not info.shape or info.shape[0] % count:
        return info
    return replace(info, shape=(info.shape[0] // count, *info.shape[1:]))


def _split_source(split: str, text: Path | None) -> str | None:
    if split == "coactivation":
        assert text is not None
        return text.name
    return "weights" if split == "kmeans" else None


def _new_config(config: Mapping[str, Any], family: Family, prunepath: PrunePathConfig) -> dict[str, Any]:
    # _name_or_path is where the dense model once lay, often a path on somebody's machine; base_model replaces it.
    kept = {
        key: value
        for key, value in config.items()
        if key not in ("auto_map", "quantization_config", "_name_or_path", SOURCE_WEIGHTS)
    }
    return kept | {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "prunepath_config": prunepath.to_json(),
    }


def _said_of(dense: DenseWeights, expert_dtype: str | None) -> str:
    """What became of a float8 source's weights, for config.json, from which model cards are written."""
    assert dense.dtype is not None
    dtype = dtype_name(dense.dtype)
    if expert_dtype is None:
        return f"{dense.format}, dequantised to {dtype}"
    anew = [which for which, output in (("first", False), ("second", True)) if not dense.lossless(output=output)]
    how = f"with the {' and '.join(anew)} linears quantised anew" if anew else "as they were"
    return f"{dense.format}; feed-forward layers {how}, the others dequantised to {dtype}"


def _write_config(directory: Path, config: Mapping[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    dense: DenseWeights,
    staging: Path,
    family: Family,
    config: Mapping[str, Any],
    new_names: Mapping[str, list[str]],
    orders: list[Tensor],
    prunepath: PrunePathConfig,
) -> None:
    """Stream every tensor of `dense` to `staging`, permuted where it belongs to neurons; add zero routers.

    Raises:
        CheckpointError: a tensor is not finite.
    """
    permuted: dict[str, tuple[int, int]] = {}  # tensor -> its layer, the dimension its neurons lie along
    outputs: dict[str, int] = {}  # second linear's weight -> its layer
    for layer in range(len(orders)):
        permuted |= {name: (layer, axis) for name, axis in family.neuron_axes(layer).items()}
        outputs[f"{family.output(layer)}.weight"] = layer

    generator = torch.Generator().manual_seed(prunepath.split.seed)
    writer = ShardWriter(staging)
    for old, tensor in tqdm(dense.stream(new_names), total=len(new_names), desc="writing", unit="tensor"):
        check_finite(old, tensor)
        for name, part in zip(new_names[old], tensor.chunk(len(new_names[old])), strict=True):
            if name in permuted:
                layer, dim = permuted[name]
                part = part.index_select(dim, orders[layer])
            if name in outputs:
                if prunepath.gate == "sigmoid":
                    # Gates of a zero router are 1/2; the calibrator takes the doubling back when it saturates them.
                    part = part * 2
                    check_finite(f"{name}, doubled for the sigmoid gate", part)  # float16 ends at 65504
                shapes = router_tensor_shapes(family, config, prunepath, outputs[name], bias=False)
                for router, shape in shapes.items():
                    value = torch.zeros(shape)
                    if router.endswith(".down.weight"):
                        value.normal_(std=shape[1] ** -0.5, generator=generator)
                    writer.add(router, value.to(part.dtype))
            writer.add(name, part)
    writer.finish()


def _with_float8_experts(
    plain: Path,
    staging: Path,
    dense: DenseWeights,
    expert_dtype: str,
    new_names: Mapping[str, list[str]],
    orders: list[Tensor],
    *,
    doubled: bool,
) -> None:
    """Write the checkpoint `plain` to `staging` with its feed-forward weights in the source's float8.

    Args:
        plain: complete, of dequantised weights.
        staging: directory that `plain` is in.
        dense: the source, every feed-forward weight of which is float8.
        expert_dtype: "float8_e4m3fn".
        new_names: by :func:`_new_names`.
        orders: int64 [d_ff] a layer.
        doubled: whether the second linears make up for gates of 1/2.

    Raises:
        CheckpointError: a tensor is not finite.
    """
    summary = validate_checkpoint(plain)
    block = summary.prunepath.to_json() | dict(format_version=FORMAT_VERSION, expert_dtype=expert_dtype)
    copy_files(plain, staging)
    _write_config(staging, summary.config | {"prunepath_config": PrunePathConfig.parse(block).to_json()})
    layers = [quantised_tensors(summary.family, layer) for layer in range(summary.num_layers)]
    ours = {weight for scales in layers for weight in scales}
    olds = {new: (old, part, len(names)) for old, names in new_names.items() for part, new in enumerate(names)}
    writer = ShardWriter(staging)
    for name, tensor in stream_tensors(plain, summary.tensors, [name for name in summary.tensors if name not in ours]):
        writer.add(name, tensor)
    for layer, scales in enumerate(tqdm(layers, desc="float8 experts", unit="layer")):
        for weight, scale_name in scales.items():
            output = weight == f"{summary.family.output(layer)}.weight"
            old, part, parts = olds[weight]
            narrow, scale = dense.neuron_scaled(old, output=output, part=part, parts=parts)
            check_finite(old, narrow)
            # Bytes, as PyTorch selects no float8.
            rows = narrow.view(torch.uint8).index_select(int(output), orders[layer])
            writer.add(weight, rows.view(narrow.dtype))
            writer.add(scale_name, scale[orders[layer]] * (2.0 if doubled and output else 1.0))
    writer.finish()
    validate_checkpoint(staging)
    write_model_card(staging)
