"""Which neurons form an expert: by input weights, by co-activation on a text, or at random."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prunepath_vllm.conversion.clustering import balanced_kmeans
from prunepath_vllm.families import Family

METHODS = ("kmeans", "coactivation", "random")

COACTIVATION_TOKENS = 4096
COACTIVATION_CONTEXT = 256


def neuron_orders(
    method: str,
    source: Path,
    family: Family,
    config: Mapping[str, Any],
    num_experts: int,
    *,
    read: Callable[[str], Tensor],
    text: Path | None,
    seed: int,
    device: str,
) -> list[Tensor]:
    """For each layer, the order of its neurons in which expert e is [e * expert_size, (e + 1) * expert_size).

    Args:
        method: one of :data:`METHODS`.
        source: dense checkpoint directory.
        family: its family.
        config: its config.json.
        num_experts: E.
        read: gives a dense tensor by its name in `family`'s terms.
        text: calibration text, with "coactivation".
        seed: equal seeds give equal orders on one machine.
        device: where to compute similarities ("cpu" or "cuda").

    Returns:
        One int64 CPU permutation [d_ff] per layer.

    Raises:
        UsageError: the text is missing or too short.
    """
    generator = torch.Generator().manual_seed(seed)
    if method == "coactivation":
        assert text is not None
        return _coactivation(source, family, config, num_experts, text, generator, device)
    layers = tqdm(range(family.num_layers(config)), desc=f"grouping neurons ({method})", unit="layer")
    if method == "random":
        intermediate = family.intermediate_size(config)
        return [
            _order(torch.randperm(intermediate, generator=generator) // (intermediate // num_experts)) for _ in layers
        ]
    orders = []
    for layer in layers:
        weight = read(f"{family.inputs(layer)[0]}.weight")  # the gate of a GLU, else the first linear
        rows = family.out_in(weight).to(device)
        orders.append(_order(balanced_kmeans(rows, num_experts, generator=generator)))
    return orders


def _order(clusters: Tensor) -> Tensor:
    return clusters.argsort(stable=True)


def _coactivation(
    source: Path,
    family: Family,
    config: Mapping[str, Any],
    num_experts: int,
    text: Path,
    generator: torch.Generator,
    device: str,
) -> list[Tensor]:
    """MoEfication's co-activation split (arXiv 2110.01786).

    The graph's edge between two neurons is the cosine of their activation magnitudes over the text's tokens. Cutting it
    into equal parts of the greatest inner weight is balanced k-means on those magnitudes, so no graph is built. Runs
    the dense model once and keeps one layer's activations at a time.
    """
    import transformers

    from prunepath_vllm.conversion.text import read_sequences

    tokens = read_sequences(
        transformers.AutoTokenizer.from_pretrained(source),
        text,
        length=min(COACTIVATION_CONTEXT, family.positions(config) or COACTIVATION_CONTEXT),
        max_tokens=COACTIVATION_TOKENS,
    )
    auto_class = getattr(transformers, family.auto_class)
    model = auto_class.from_pretrained(source, dtype="auto", **family.dense_options).to(device).eval()
    orders: list[Tensor] = []
    progress = tqdm(total=family.num_layers(config), desc="grouping neurons (coactivation)", unit="layer")

    def group(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        # What enters the second linear is the neurons: act(gate) * up, or act(first linear).
        profiles = args[0].flatten(0, -2).float().abs().T
        orders.append(_order(balanced_kmeans(profiles, num_experts, generator=generator)))
        progress.update()

    for layer in range(family.num_layers(config)):
        model.get_submodule(family.output(layer)).register_forward_pre_hook(group)
    with progress, torch.inference_mode():
        model.base_model(tokens.to(device))
    return orders
