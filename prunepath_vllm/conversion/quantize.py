"""Experts, and the attention's linears, in int8 or float8: a PrunePath checkpoint in, one of half the size or less out.

Shapes: T tokens, H hidden size, F neurons.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from prunepath_vllm.activations import ACTIVATIONS
from prunepath_vllm.checkpoint import (
    CheckpointSummary,
    ffn_tensor_shapes,
    linear_tensors,
    quantised_tensors,
    stream_tensors,
    validate_checkpoint,
)
from prunepath_vllm.config import EXPERT_DTYPES, PrunePathConfig
from prunepath_vllm.conversion.model_card import write_model_card
from prunepath_vllm.conversion.rounding import quantise_weight, quantised_product
from prunepath_vllm.conversion.writing import ShardWriter, copy_files
from prunepath_vllm.errors import UsageError
from prunepath_vllm.files import check_absent_or_empty, check_writable, new_directory
from prunepath_vllm.kernels import cpu
from prunepath_vllm.kernels.layer import LayerSpec, RouterWeights, Weights
from prunepath_vllm.linears import LINEAR_DTYPES, attention_linears, standard_form
from prunepath_vllm.tau import DENSE_TAU

TOKENS = 64
"""Random ones that a layer's function is measured on."""


@dataclass(frozen=True)
class LinearError:
    """What quantisation changed in one linear, as shares like those of :class:`LayerError`.

    Attributes:
        name: of the linear.
        weights: of its weight.
        function: of its outputs, its activations being quantised too.
    """

    name: str
    weights: float
    function: float


@dataclass(frozen=True)
class LayerError:
    """What quantisation changed in one layer, as a share: the norm of the difference over the norm of what was there.

    Attributes:
        layer: its number.
        weights: of all feed-forward weights together.
        function: of the outputs with every expert.
        linears: the attention's, where they are quantised.
    """

    layer: int
    weights: float
    function: float
    linears: list[LinearError] = field(default_factory=list)


def quantize(
    src: str | Path,
    dst: str | Path,
    expert_dtype: str,
    *,
    linears: str | None = None,
    inputs: Tensor | None = None,
    seed: int = 0,
) -> list[LayerError]:
    """Write a checkpoint whose feed-forward weights are int8 or float8, with a float32 scale per neuron.

    Weights are streamed: one layer and the output shard being written are in memory. `dst` appears complete or not at
    all. Biases, routers and all other tensors stay as they are.

    Args:
        src: PrunePath checkpoint directory.
        dst: directory to create; may exist if empty.
        expert_dtype: "int8" or "float8_e4m3fn".
        linears: the same, for the attention's linears, in the form of :func:`linears.standard_form`; None leaves them.
        inputs: [T, H] in any float dtype, what each layer's function is measured on; None draws normal ones.
        seed: of those.

    Returns:
        The error of every layer.

    Raises:
        UsageError: another dtype, `dst` is there, cannot be made or is not apart from `src`, or `src` is quantised
            already or of a family without such linears.
        ConfigError, CheckpointError: `src` is not a valid PrunePath checkpoint, or not finite.
    """
    dst = Path(dst)
    if expert_dtype not in EXPERT_DTYPES:
        raise UsageError(f"expert dtype: {expert_dtype!r}; expected one of {', '.join(EXPERT_DTYPES)}")
    if linears is not None and linears not in LINEAR_DTYPES:
        raise UsageError(f"linears: {linears!r}; expected one of {', '.join(LINEAR_DTYPES)}")
    check_absent_or_empty(dst, source=src)
    summary = validate_checkpoint(src, check_values=True)
    if (already := summary.prunepath.expert_dtype) is not None:
        raise UsageError(f"{src}: expert_dtype {already!r}: already quantised; expected a checkpoint that is not")
    if linears is not None and not attention_linears(summary.family, 0):
        raise UsageError(
            f"{src}: linears: {linears!r} for {summary.family.name}; expected no such option, or a family whose "
            "attention has q_proj, k_proj, v_proj and o_proj"
        )
    if inputs is None:
        inputs = torch.randn(TOKENS, summary.hidden_size, generator=torch.Generator().manual_seed(seed))
    elif inputs.dim() != 2 or inputs.shape[1] != summary.hidden_size:
        raise UsageError(f"inputs: shape {list(inputs.shape)}; expected [tokens, {summary.hidden_size}]")
    check_writable(dst)

    block = summary.prunepath.to_json() | dict(format_version=2, expert_dtype=expert_dtype)
    config = summary.config | {"prunepath_config": PrunePathConfig.parse(block).to_json()}
    if linears is not None:
        config["quantization_config"] = standard_form(summary.family, summary.num_layers, linears)
    with new_directory(dst) as staging:
        copy_files(summary.path, staging)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        errors = _write_weights(summary, staging, expert_dtype, linears, inputs.float())
        validate_checkpoint(staging)
        write_model_card(staging)
    return errors


def quantised_weights(weights: Weights, expert_dtype: str) -> Weights:
    """A layer with both linears in `expert_dtype`, one of EXPERT_DTYPES, and their scales; biases as they were."""
    (w_in, scale_in), (w_out_t, scale_out) = (
        quantise_weight(rows, 0, expert_dtype) for rows in (weights.w_in, weights.w_out_t)
    )
    return Weights(w_in, weights.b_in, w_out_t, weights.b_out, scale_in, scale_out)


def _write_weights(
    summary: CheckpointSummary, staging: Path, expert_dtype: str, linears: str | None, inputs: Tensor
) -> list[LayerError]:
    path, family, tensors = summary.path, summary.family, summary.tensors
    layers = [
        list(ffn_tensor_shapes(family, summary.config, layer, summary.prunepath)) for layer in range(summary.num_layers)
    ]
    attention = [linear_tensors(family, layer) if linears is not None else {} for layer in range(summary.num_layers)]
    ours = {name for names in (*layers, *attention) for name in names}
    writer, errors = ShardWriter(staging), []
    with tqdm(total=len(tensors), desc="quantising", unit="tensor") as progress:
        for name, tensor in stream_tensors(path, tensors, [name for name in tensors if name not in ours]):
            writer.add(name, tensor)
            progress.update()
        for layer, names in enumerate(layers):
            before = dict(stream_tensors(path, tensors, names))
            after, scales = dict(before), quantised_tensors(family, layer)
            for weight, scale in scales.items():
                axis = family.neuron_axes(layer)[weight]
                after[weight], after[scale] = quantise_weight(before[weight], axis, expert_dtype)
            errors.append(_error(summary, layer, before, after, inputs))
            for name, tensor in after.items():
                writer.add(name, tensor)
            progress.update(len(names))
            for name, tensor in stream_tensors(path, tensors, attention[layer]):
                assert linears is not None
                narrow, steps = quantise_weight(tensor, 0, linears)
                errors[-1].linears.append(_linear_error(name.removesuffix(".weight"), tensor, narrow, steps, inputs))
                writer.add(name, narrow)
                writer.add(attention[layer][name], steps.unsqueeze(1))
                progress.update()
        writer.finish()
    return errors


def _linear_error(name: str, before: Tensor, weight: Tensor, scale: Tensor, inputs: Tensor) -> LinearError:
    was = before.float()
    # The last linear of an attention may have other inputs than the model's width.
    x = inputs.repeat(1, -(-was.shape[1] // inputs.shape[1]))[:, : was.shape[1]]
    function = _share(quantised_product(x, weight, scale), x @ was.T)
    return LinearError(name, _share(weight.float() * scale.unsqueeze(1), was), function)


def _share(got: Tensor, right: Tensor) -> float:
    return float((got - right).norm() / right.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _error(
    summary: CheckpointSummary, layer: int, before: dict[str, Tensor], after: dict[str, Tensor], inputs: Tensor
) -> LayerError:
    square = difference = 0.0
    family = summary.family
    for weight, scale in quantised_tensors(family, layer).items():
        axis = family.neuron_axes(layer)[weight]
        was = before[weight].float()
        square += float(was.square().sum())
        difference += float((after[weight].float() * after[scale].unsqueeze(1 - axis) - was).square().sum())
    right, got = (_function(summary, layer, tensors, inputs) for tensors in (before, after))
    return LayerError(layer, (difference / square) ** 0.5 if square else 0.0, _share(got, right))


def _function(summary: CheckpointSummary, layer: int, tensors: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """A layer with every expert, ungated, in float32: [T, H] of inputs [T, H]."""
    family, prunepath = summary.family, summary.prunepath
    first, output = family.inputs(layer), family.output(layer)
    scales = quantised_tensors(family, layer)

    def rows(name: str) -> Tensor:
        weight = family.out_in(tensors[f"{name}.weight"])
        return (weight.t() if name == output else weight).contiguous()

    def joined(kind: str) -> Tensor | None:
        found = [tensors[f"{name}.{kind}"] for name in first if f"{name}.{kind}" in tensors]
        return torch.cat(found).float() if found else None

    quantised = scales[f"{output}.weight"] in tensors
    dtype = tensors[f"{output}.weight"].dtype if quantised else torch.float32
    bias = tensors.get(f"{output}.bias")
    weights = Weights(
        torch.cat([rows(name) for name in first]).to(dtype),
        joined("bias"),
        rows(output).to(dtype),
        None if bias is None else bias.float(),
        joined("weight_scale"),
        tensors.get(scales[f"{output}.weight"]),
    )
    spec = LayerSpec(
        summary.hidden_size,
        prunepath.kept(layer),
        prunepath.expert_size,
        torch.float32,
        ACTIVATIONS[family.activation(summary.config)],
        glu=len(first) > 1,
    )
    router = RouterWeights(torch.zeros(prunepath.kept(layer), summary.hidden_size))
    return cpu.routed_ffn(inputs, torch.full((len(inputs),), DENSE_TAU), router, weights, spec)
