"""Perplexity of a PrunePath language model against the FFN sparsity it ran at, with transformers."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunepath_vllm.checkpoint import read_config, validate_checkpoint
from prunepath_vllm.conversion.calibrate import load_model, sequence_length
from prunepath_vllm.conversion.text import read_sequences
from prunepath_vllm.errors import UsageError
from prunepath_vllm.tau import parse_tau

MAX_TOKENS = 8192
CONTEXT = 1024


@dataclass(frozen=True)
class Perplexity:
    """One run over the text."""

    tau: float | None
    """None for the dense model."""
    perplexity: float
    ffn_sparsity: float
    """Eq. 15: mean over all tokens and layers."""


def measure_perplexity(
    checkpoint: str | Path,
    text: str | Path,
    taus: Sequence[float],
    *,
    dense: str | Path | None = None,
    max_tokens: int = MAX_TOKENS,
    context: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Perplexity on the beginning of a text at each tau, and of the dense model beside it.

    The text is cut into independent sequences of `context` tokens; every token but a sequence's first is predicted.

    Args:
        checkpoint: PrunePath checkpoint directory of a causal model.
        text: UTF-8 text file (gzipped where it ends in .gz).
        taus: each in (0, 1.05].
        dense: directory or name of the dense model, to measure too; None leaves it out.
        max_tokens: how much of the text to read.
        context: tokens per sequence; None takes 1024, or what the model can take.
        device: "cpu" or "cuda".

    Returns:
        A JSON-able mapping: what was measured on (checkpoint, text, sequences, context, device, dtype, torch), and
        ``points``, one :class:`Perplexity` each, the dense model's first.

    Raises:
        UsageError: not a causal model, text missing or too short.
        TauError: a tau out of range.
        CheckpointError, ConfigError: not a valid checkpoint.
    """
    taus = [parse_tau(tau) for tau in taus]
    summary = validate_checkpoint(checkpoint)
    if summary.family.auto_class != "AutoModelForCausalLM":
        raise UsageError(f"{checkpoint}: {summary.family.architecture} has no perplexity; expected a causal model")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: {device!r}, but no CUDA GPU is visible; expected 'cpu'")
    length = sequence_length(summary, context, default=CONTEXT)
    sequences = read_sequences(AutoTokenizer.from_pretrained(checkpoint), text, length=length, max_tokens=max_tokens)

    points: list[Perplexity] = []
    with tqdm(total=(len(taus) + (dense is not None)) * len(sequences), desc="perplexity", unit="sequence") as progress:
        if dense is not None:
            if Path(dense).is_dir() and "prunepath_config" in read_config(dense):
                raise UsageError(f"dense model {dense}: a PrunePath checkpoint; expected a dense one")
            model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto").eval().to(device)
            points.append(_run(model, sequences, None, progress))
            del model
        model = load_model(summary, device)
        points += [_run(model, sequences, tau, progress) for tau in taus]
    return {
        "checkpoint": Path(checkpoint).resolve().name,
        "text": Path(text).name,
        "sequences": len(sequences),
        "context": length,
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "expert_size": summary.prunepath.expert_size,
        "dense_positions": summary.prunepath.dense_positions,
        "points": [asdict(point) for point in points],
    }


@torch.inference_mode()
def _run(model: Any, sequences: torch.Tensor, tau: float | None, progress: tqdm) -> Perplexity:
    options = {} if tau is None else dict(tau=tau, output_router_logits=True)
    loss = sparsity = 0.0
    for sequence in sequences.to(model.device):
        output = model(sequence[None], use_cache=False, **options)
        loss += F.cross_entropy(output.logits[0, :-1].float(), sequence[1:]).item()
        sparsity += 0.0 if tau is None else output.ffn_sparsity.mean().item()
        progress.update()
    return Perplexity(tau, math.exp(loss / len(sequences)), sparsity / len(sequences))
