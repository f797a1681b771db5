"""``prunepath sweep``: quality, sparsity and speed by tau, and the tau that a loss of quality allows."""

import argparse
import json
from pathlib import Path
from typing import Any

from prunepath_vllm.arguments import check_output_file, check_plot, whole
from prunepath_vllm.engine_environment import require_engine
from prunepath_vllm.entrypoints.commands.eval import journal_path
from prunepath_vllm.errors import UsageError
from prunepath_vllm.tau import parse_tau_list


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "sweep",
        parents=parents,
        help="quality, sparsity and speed by tau, and the tau for a loss you name",
        description="Quality, FFN sparsity and decode speed of a checkpoint at each tau, and the sparsest tau that "
        "loses at most --max-loss. An interrupted run with --output goes on where it stopped.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="PrunePath checkpoint directory")
    parser.add_argument("--max-loss", required=True, metavar="SHARE", help="loss of quality to accept: 2%% or 0.02")
    quality = parser.add_mutually_exclusive_group(required=True)
    quality.add_argument("--text", metavar="FILE", help="quality is the perplexity of this text")
    quality.add_argument("--task", metavar="NAME", help="quality is a task's first metric; see `prunepath eval`")
    parser.add_argument("--data", metavar="DIR", help="with --task: its folder or file")
    parser.add_argument("--tau", metavar="LIST", help="(default: the 15 that calibration measures)")
    parser.add_argument("--dense", metavar="DIR", help="the dense model, to measure the loss against (default: tau 1)")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="with --task: only the first N items")
    parser.add_argument(
        "--max-tokens", type=whole(1), default=8192, metavar="N", help="of the text (default: %(default)s)"
    )
    parser.add_argument(
        "--context", type=whole(1), metavar="N", help="tokens per sequence (default: 1024, or what fits)"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the quality (default: cpu)")
    parser.add_argument("--no-speed", action="store_true", help="do not start the engine to time it")
    parser.add_argument("--write", action="store_true", help="write tau_curve and the model card into CKPT")
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON; item by item beside it, as .jsonl")
    parser.add_argument("--plot", metavar="FILE", help="draw the Pareto front (.png, .pdf, .svg)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print a table and the recommended tau; write --output, --plot, and with --write the curve and card."""
    from prunepath_vllm.conversion.calibrate import CURVE_TAUS
    from prunepath_vllm.evaluation.backends import open_checkpoint
    from prunepath_vllm.evaluation.plots import plot_sweep
    from prunepath_vllm.evaluation.runner import Run
    from prunepath_vllm.evaluation.sweep import parse_loss, sweep, write_to_checkpoint
    from prunepath_vllm.evaluation.tasks import Options

    max_loss = parse_loss(args.max_loss)
    output = Path(args.output) if args.output else None
    journal = journal_path(output)
    check_plot(args.plot)
    checkpoint = open_checkpoint(args.checkpoint)
    if checkpoint.prunepath is None or checkpoint.prunepath.selection != "cumulative_mass":
        raise UsageError(f"{args.checkpoint}: expected a PrunePath checkpoint with cumulative_mass selection, to sweep")
    if args.write:
        check_output_file(checkpoint.path / "config.json", "--write")
    if args.data and not args.task:
        raise UsageError(f"--data {args.data}: expected with --task; --text names its file itself")
    chosen = sorted({1.0, *(parse_tau_list(args.tau) if args.tau else CURVE_TAUS)}, reverse=True)
    data = args.data if args.task else args.text
    evaluation = Run(
        checkpoint,
        args.task or "wikitext",
        chosen,
        data=Path(data) if data else None,
        dense=open_checkpoint(args.dense) if args.dense else None,
        limit=args.limit,
        options=Options(max_tokens=args.max_tokens, context=args.context),
        device=args.device,
        journal=journal,
    )
    if checkpoint.causal and not args.no_speed:
        require_engine()
    metric = evaluation.task.metrics[0]
    result = sweep(evaluation, max_loss, speed=not args.no_speed)
    print_table(result, metric)
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        plot_sweep(result, metric, args.plot)
    if args.write:
        write_to_checkpoint(evaluation, result)
        print(f"written: tau_curve and model card of {args.checkpoint}")
    return 0


def print_table(result: dict[str, Any], metric: str) -> None:
    """One line per point, a star before those on the Pareto front, and the recommendation."""
    digits = 2 if metric == "perplexity" else 3
    print(f"  {'tau':>6}  {'FFN sparsity':>12}  {metric:>13}  {'loss':>8}  {'step ms':>8}  {'tokens/s':>8}")
    for point in result["points"]:
        tau = "dense" if point["tau"] is None else f"{point['tau']:g}"
        line = f"{'*' if point['pareto'] else ' '} {tau:>6}  {point['ffn_sparsity']:>12.3f}"
        line += f"  {point[metric]:>13.{digits}f}  {point['loss']:>+8.1%}"
        if "tokens_per_second" in point:
            line += f"  {point['decode_step_ms']:>8.2f}  {point['tokens_per_second']:>8.1f}"
        print(line)
    if result["peak_gib"] is not None:
        print(f"Memory of a worker at most: {result['peak_gib']:.2f} GiB")
    chosen = result["recommended"]
    print(
        f"* on the Pareto front. Recommended for a loss of at most {result['max_loss']:.1%}: tau {chosen['tau']:g}, "
        f"FFN sparsity {chosen['ffn_sparsity']:.1%}, loss {chosen['loss']:+.1%}"
    )
