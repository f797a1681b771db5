"""``python -m prunepath_vllm.benchmarks.unions``: how many experts a batch touches together, on real text.

What a sparse decode step reads is the union of its tokens' experts, which independent choices put at
1 - (1 - a)^b for b tokens at active share a; real tokens agree more. Two kinds of batch: one token each of b different
places of a text, as a server's decode step has, and b consecutive tokens, as a prompt has.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from prunepath_vllm.benchmarks.options import numbers, taus
from prunepath_vllm.benchmarks.report import table, versions

FIRST = 16
"""Positions before this one are left out: a decode step has a prompt behind it."""
SPREAD = 8
"""One piece in so many is a place: neighbours would be of one subject."""


def union_shares(active: Tensor, batch: int) -> tuple[float, float]:
    """Mean share of the experts that a batch touches.

    Args:
        active: bool [N, S, E], of one layer: N places of a text, S consecutive tokens each.
        batch: b, at most N and at most S.

    Returns:
        over b tokens of different places, and over b consecutive ones.
    """
    places, length, experts = active.shape
    different = active[: places // batch * batch].reshape(-1, batch, length, experts).any(dim=1)
    consecutive = active[:, : length // batch * batch].reshape(places, -1, batch, experts).any(dim=2)
    return different.float().mean().item(), consecutive.float().mean().item()


@torch.inference_mode()
def measure(
    model: Any, tokens: Tensor, at_taus: Sequence[float], batches: Sequence[int], *, group: int = 16
) -> list[dict[str, Any]]:
    """The unions of a PrunePath model.

    Args:
        model: causal, of transformers.
        tokens: int64 [N, S], places of a text.
        at_taus: each in (0, 1.05].
        batches: numbers of tokens, each at most N and S - FIRST.
        group: places a forward takes.

    Returns:
        a row for each tau: {"tau", "active" (mean share of one token), "different", "consecutive"}, the last two by
        batch size; means over layers.
    """
    rows = []
    for tau in tqdm(at_taus, desc="tau", file=sys.stderr):
        parts = [
            model(part.to(model.device), tau=tau, output_router_logits=True, logits_to_keep=1).active_experts
            for part in tokens.split(group)
        ]
        layers = [torch.cat(layer)[:, FIRST:] for layer in zip(*parts, strict=True)]
        row: dict[str, Any] = {
            "tau": tau,
            "active": sum(layer.float().mean().item() for layer in layers) / len(layers),
            "different": {},
            "consecutive": {},
        }
        for batch in batches:
            shares = [union_shares(layer, batch) for layer in layers]
            row["different"][batch], row["consecutive"][batch] = (
                sum(kind) / len(layers) for kind in zip(*shares, strict=True)
            )
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a checkpoint, print a table, write --output."""
    from transformers import AutoModelForCausalLM

    from prunepath_vllm.conversion.text import read_sequences
    from prunepath_vllm.modeling import load_tokenizer, register_auto_classes

    parser = argparse.ArgumentParser(prog="python -m prunepath_vllm.benchmarks.unions", description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="PrunePath checkpoint directory, causal")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--tau", type=taus, default=[0.95, 0.9, 0.8, 0.7, 0.5], metavar="LIST")
    parser.add_argument("--batch-size", type=numbers(int), default=[4, 16, 64], metavar="LIST")
    parser.add_argument("--places", type=int, default=128, metavar="N", help="of the text (default: 128)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args(argv)
    register_auto_classes()
    length = FIRST + max(args.batch_size)
    tokenizer = load_tokenizer(args.checkpoint)
    pieces = read_sequences(
        tokenizer,
        args.text,
        length=length,
        max_tokens=args.places * length * SPREAD,
        minimum=max(args.batch_size) * SPREAD,
    )
    tokens = pieces[::SPREAD]
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype="auto").eval().to(args.device)
    rows = measure(model, tokens, args.tau, args.batch_size)
    header = ["tau", "active", *(f"{kind} {b}" for kind in ("places", "run of") for b in args.batch_size)]
    cells = [[row["tau"], row["active"], *row["different"].values(), *row["consecutive"].values()] for row in rows]
    print(table(header, [[f"{cell:.3g}" for cell in row] for row in cells]))
    if args.output:
        result = {
            "model": Path(args.checkpoint).name,
            "text": Path(args.text).name,
            "places": len(tokens),
            "rows": rows,
        }
        Path(args.output).write_text(json.dumps(result | {"versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
