"""How much of each feed-forward layer's output the router's first k experts make up (the paper's Figure 2)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunepath_vllm.checkpoint import read_json, refuse_changed
from prunepath_vllm.conversion.calibrate import load_model
from prunepath_vllm.conversion.costs import output_rows
from prunepath_vllm.conversion.text import read_sequences
from prunepath_vllm.devices import check_device
from prunepath_vllm.errors import CheckpointError, UsageError
from prunepath_vllm.evaluation.backends import open_checkpoint
from prunepath_vllm.evaluation.rows import finite, read_as
from prunepath_vllm.kernels import reference
from prunepath_vllm.modeling import load_tokenizer
from prunepath_vllm.modeling.routing import Router
from prunepath_vllm.tau import DENSE_TAU

CONTEXT = 512


class _Distance(nn.Module):
    """A router's observer: sums squared distances between its layer's output with every expert and with the first k."""

    def __init__(
        self, down: Tensor, bias: Tensor | None, gate: str, counts: Sequence[int], dense_positions: int
    ) -> None:
        super().__init__()
        self.routed = slice(dense_positions, None)
        self.down = down.float()  # [F, H]
        self.bias = bias
        self.gate, self.counts = gate, counts
        self.squares = torch.zeros(len(counts), dtype=torch.float64)
        self.power = 0.0
        self.values = 0

    def forward(self, logits: Tensor, active: Tensor, neurons: Tensor, own: Any) -> None:
        """logits: [B, S, E]; neurons: [B, S, F]; the rest is for training."""
        logits, active, neurons = (each[:, self.routed] for each in (logits, active, neurons))
        ranks = logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        neurons = neurons.float()
        for i, count in enumerate(self.counts):
            # The output's bias is in both.
            missing = reference.gate_weights(logits, ranks >= count, gate=self.gate)
            difference = reference.scale_neurons(neurons, missing) @ self.down
            self.squares[i] += difference.double().square().sum().item()
        everything = reference.gate_weights(logits, torch.ones_like(active), gate=self.gate)
        output = reference.scale_neurons(neurons, everything) @ self.down
        output = output if self.bias is None else output + self.bias.float()
        self.power += output.double().square().sum().item()
        self.values += output.numel()


@torch.inference_mode()
def reconstruction(
    checkpoint: str | Path,
    text: str | Path,
    counts: Sequence[int],
    *,
    max_tokens: int = 4096,
    context: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Mean squared error of the layers' outputs from the router's first k experts, against every expert's.

    Gates count where the checkpoint has them, on both sides. Every layer reads what it reads when all experts run.
    Tokens at the checkpoint's dense positions are not routed and do not count: an attention sink's output would hide
    all others.

    Args:
        checkpoint: PrunePath checkpoint directory.
        text: what the model reads.
        counts: the values of k, each from 1 to the number of experts.
        max_tokens: how much of the text.
        context: tokens per sequence; None takes 512, or what the model can take.
        device: "cpu" or "cuda".

    Returns:
        A JSON-able mapping; its ``points`` have k, mse (mean over tokens, hidden dimensions and layers), relative_mse
        (over the outputs' mean square) and layer_mse.

    Raises:
        UsageError: a count out of range, not a PrunePath checkpoint, or a text that is missing or too short.
        CheckpointError, ConfigError: not a valid checkpoint, or one whose layers' outputs are all zero or not finite.
    """
    check_device(device)
    opened = open_checkpoint(checkpoint)
    if opened.summary is None or opened.prunepath is None:
        raise UsageError(f"{checkpoint}: expected a PrunePath checkpoint, got a dense one")
    prunepath, family = opened.prunepath, opened.family
    refuse_changed(checkpoint, prunepath, "measuring", quantised=True)
    for count in counts:
        if not 1 <= count <= prunepath.num_experts:
            raise UsageError(f"--top-k {count}: expected 1 to {prunepath.num_experts}, the experts of {checkpoint}")
    length = opened.context(context, default=CONTEXT)
    if length <= prunepath.dense_positions:
        raise UsageError(f"context: {length}; expected more than the {prunepath.dense_positions} dense positions")
    sequences = read_sequences(load_tokenizer(checkpoint), text, length=length, max_tokens=max_tokens)
    model: Any = load_model(opened.summary, device)
    seen = []
    for layer in range(opened.summary.num_layers):
        down: Any = model.get_submodule(family.output(layer))
        router = model.get_submodule(family.router(layer))
        assert isinstance(router, Router)
        router.observer = _Distance(
            output_rows(model, family, layer), down.bias, prunepath.gate, counts, prunepath.dense_positions
        )
        seen.append(router.observer)
    for sequence in tqdm(sequences, desc=f"reading {Path(text).name}", unit="sequence"):
        model.base_model(sequence[None].to(device), tau=DENSE_TAU)
    errors = torch.stack([layer.squares / layer.values for layer in seen])  # [L, counts]
    power = sum(layer.power / layer.values for layer in seen) / len(seen)
    if not (math.isfinite(power) and power > 0 and errors.isfinite().all()):
        raise CheckpointError(
            f"{checkpoint}: the layers' outputs on the text have the mean square {power}; expected a finite one above 0"
        )
    points = [
        {"k": count, "mse": mse, "relative_mse": mse / power, "layer_mse": layers}
        for count, mse, layers in zip(counts, errors.mean(0).tolist(), errors.T.tolist(), strict=True)
    ]
    return dict(
        checkpoint=Path(checkpoint).resolve().name,
        text=Path(text).name,
        tokens=sequences.numel(),
        num_experts=prunepath.num_experts,
        expert_size=prunepath.expert_size,
        points=points,
    )


def read_reconstruction(path: str | Path) -> dict[str, Any]:
    """What :func:`reconstruction` returned, from the one series of an earlier figure's data.

    Raises:
        UsageError: the file holds something else, or a number that is none or out of range.
    """
    content: Any = read_json(Path(path))
    with read_as("the output of prunepath figures fig2 for one checkpoint", path):
        (series,) = content["series"]
        found = dict(series)
        if not found["points"]:
            raise ValueError
        for point in found["points"]:
            for key, least in (("k", 1), ("mse", 0), ("relative_mse", 0)):
                finite(point[key], key, Path(path), least)
    return found
