"""``prunepath eval``: quality of a checkpoint against its FFN sparsity, by tau."""

import argparse
import json
from pathlib import Path
from typing import Any

from prunepath_vllm.errors import UsageError

TASKS = ("wikitext",)
WIKITEXT_FILES = ("wiki.valid.raw", "valid.raw.gz", "valid.txt")
"""Names under which WikiText-2's raw validation split is distributed."""


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser("eval", parents=parents, help="quality of a checkpoint against its FFN sparsity")
    parser.add_argument("checkpoint", metavar="CKPT", help="PrunePath checkpoint directory")
    parser.add_argument("--task", required=True, choices=TASKS, help="wikitext: perplexity on a text file")
    parser.add_argument("--data", required=True, metavar="FILE_OR_DIR", help="text file (.gz too), or its directory")
    parser.add_argument("--tau", default="1.0,0.9,0.8,0.7,0.6,0.5", metavar="LIST", help="(default: %(default)s)")
    parser.add_argument("--dense", metavar="DIR", help="the dense model, to measure beside it")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens per sequence (default: 1024, or what fits)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON too")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print a table, and write --output."""
    try:
        taus = [float(tau) for tau in args.tau.split(",")]
    except ValueError:
        raise UsageError(f"--tau {args.tau}: expected numbers separated by commas") from None
    from prunepath_vllm.evaluation.perplexity import measure_perplexity

    result = measure_perplexity(
        args.checkpoint,
        _wikitext_file(Path(args.data)),
        taus,
        dense=args.dense,
        max_tokens=args.max_tokens,
        context=args.context,
        device=args.device,
    )
    _print_table(result)
    if args.output:
        Path(args.output).write_text(json.dumps({"task": args.task, **result}, indent=2) + "\n", encoding="utf-8")
    return 0


def _wikitext_file(data: Path) -> Path:
    if not data.is_dir():
        return data
    for name in WIKITEXT_FILES:
        if (data / name).is_file():
            return data / name
    raise UsageError(f"--data {data}: expected one of {', '.join(WIKITEXT_FILES)} in that directory")


def _print_table(result: dict[str, Any]) -> None:
    print(f"{result['text']}: {result['sequences']} sequences of {result['context']} tokens, {result['dtype']}")
    print(f"{'tau':>6}  {'FFN sparsity':>12}  {'perplexity':>10}")
    for point in result["points"]:
        tau = "dense" if point["tau"] is None else f"{point['tau']:g}"
        print(f"{tau:>6}  {point['ffn_sparsity']:>12.3f}  {point['perplexity']:>10.2f}")
