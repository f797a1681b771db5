"""Published shapes: checkpoints of them with random weights, and the tau at which random routing keeps a share."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunepath_vllm.benchmarks.published import SHAPES
from prunepath_vllm.config import expected_sparsity
from prunepath_vllm.conversion.rounding import quantise_weight
from prunepath_vllm.families import FAMILIES, Family, family_of
from prunepath_vllm.kernels.layer import dtype_name
from prunepath_vllm.linears import standard_form


def dense_config(shape: str) -> dict[str, Any]:
    """config.json of the dense model of a published shape, bfloat16."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**SHAPES[shape])
    (family,) = (one for one in FAMILIES if one.dense_model_type == config.model_type)
    return {**config.to_dict(), "architectures": [family.dense_architecture], "dtype": "bfloat16"}


def shape_family(shape: str) -> Family:
    """The family of a published shape."""
    return family_of(dense_config(shape), converted=False)


def write_config(
    shape: str,
    folder: Path,
    *,
    sparse: bool,
    expert_size: int = 32,
    router_input: str = "ffn",
    expert_dtype: str | None = None,
    linears: str | None = None,
) -> Path:
    """A checkpoint directory with a configuration and no weights: the engine's dummy format loads it.

    linears: of a sparse one, what ``prunepath quantize --linears`` stores attention's weights in.
    """
    config = dense_config(shape)
    if sparse:
        family = family_of(config, converted=False)
        config.update(
            architectures=[family.architecture],
            model_type=family.model_type,
            prunepath_config=dict(
                format_version=2, num_experts=family.intermediate_size(config) // expert_size, expert_size=expert_size,
                router=dict(input=router_input, rank=None), expert_dtype=expert_dtype,
                selection="cumulative_mass", threshold=None, gate="none", dense_positions=0, default_tau=1.0,
                tau_curve=None, split=dict(method="random", seed=0, source=None), base_model=shape,
            ),
        )  # fmt: skip
        if linears:
            config["quantization_config"] = standard_form(family, family.num_layers(config), linears)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_weights(folder: Path) -> None:
    """Give a directory made by :func:`write_config` its random weights.

    For engines that repack weights while loading them (CPU): what is filled in afterwards would not reach the copies.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from prunepath_vllm.modeling import register_auto_classes

    register_auto_classes()
    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    randomise(model)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))


def randomise(model: nn.Module) -> None:
    """Fill every parameter in place: matrices with a Gaussian, routers so that their logits have unit variance.

    Weights beside a float32 scale per neuron are quantised ones, buffers too; others of a byte, vLLM's own, stay.
    """
    generator: torch.Generator | None = None
    scales = {name: one for name, one in (*model.named_parameters(), *model.named_buffers()) if name.endswith("_scale")}
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *model.named_buffers()):
            scale = scales.get(f"{name}_scale")
            if name.endswith(("_scale", "_scale_inv")) or not (
                isinstance(parameter, nn.Parameter) or scale is not None
            ):
                continue
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            if parameter.dtype.itemsize == 1 and (scale is None or list(scale.shape) not in _axes(parameter)):
                continue
            generator = generator or torch.Generator(device=parameter.device).manual_seed(0)
            std = 1 / math.sqrt(parameter.shape[-1]) if "router" in name else 0.02
            # Chunks: the generator draws in float32.
            neurons = 0 if scale is None else _axes(parameter).index(list(scale.shape))
            size = max(1, 2**26 // (parameter.numel() // parameter.shape[neurons]))
            for start in range(0, parameter.shape[neurons], size):
                rows = parameter.data.narrow(neurons, start, min(size, parameter.shape[neurons] - start))
                drawn = torch.randn(rows.shape, generator=generator, device=parameter.device) * std
                if scale is not None:
                    drawn, found = quantise_weight(drawn, neurons, dtype_name(parameter.dtype))
                    scale.data[start : start + size] = found
                rows.copy_(drawn)


def _axes(weight: Tensor) -> list[list[int]]:
    """Shapes of a scale per row, and per column."""
    return [[size] for size in weight.shape]


@functools.lru_cache(4)
def _ranked(num_experts: int, bias: float) -> tuple[Tensor, Tensor]:
    """Router logits drawn from a standard Gaussian, plus `bias` for the first half of the experts, of 4096 tokens.

    Returns:
        [4096, E] down each token's ranking: cumulative probability, and whether the expert is of the first half.
    """
    logits = torch.randn(4096, num_experts, generator=torch.Generator().manual_seed(0))
    logits[:, : num_experts // 2] += bias
    ranked = logits.softmax(-1).sort(-1, descending=True)
    return ranked.values.cumsum(-1), ranked.indices < num_experts // 2


def share_of_tau(tau: float, num_experts: int, bias: float = 0.0) -> float:
    """Mean share of active experts at `tau` when router logits are Gaussian with standard deviation 1.

    With a bias the first half of the experts has so much more.
    """
    if tau >= 1:
        return 1.0
    return (_ranked(num_experts, bias)[0] < tau).float().sum(-1).clamp(min=1).mean().item() / num_experts


def tau_of_share(share: float, num_experts: int, bias: float = 0.0) -> float:
    """The inverse of :func:`share_of_tau`: the tau in (0, 1] at which `share` of the experts is active on average."""
    if share >= 1:
        return 1.0
    return _bisect(lambda tau: share_of_tau(tau, num_experts, bias) >= share, 1.0)


def bias_of_uses(uses: float, share: float, num_experts: int) -> float:
    """The router bias with which the first half of the experts takes `uses` of all uses, where `share` is active."""

    def enough(bias: float) -> bool:
        mass, first_half = _ranked(num_experts, bias)
        active = mass < tau_of_share(share, num_experts, bias)
        return (active & first_half).sum().item() >= uses * active.sum().item()

    return _bisect(enough, 8.0, steps=12)


def _bisect(reached: Callable[[float], bool], high: float, steps: int = 40) -> float:
    """Where in (0, high] a condition begins to hold."""
    low = 0.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return low or high


def share_on_curve(curve: Sequence[tuple[float, float]] | None, tau: float) -> float | None:
    """Active share at `tau` by linear interpolation in a measured curve; None without one, or beyond its ends."""
    if tau >= 1:
        return 1.0
    if not curve:
        return None
    points = np.array(curve).T
    return 1 - float(expected_sparsity(np.array(tau), points)) if points[0, 0] <= tau <= points[0, -1] else None
