"""``prunepath eval``: quality of a checkpoint against its FFN sparsity, by tau."""

import argparse
import json
from pathlib import Path
from typing import Any

from prunepath_vllm.arguments import check_output_file, check_plot, whole
from prunepath_vllm.errors import UsageError
from prunepath_vllm.tau import parse_tau_list


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "eval",
        parents=parents,
        help="quality of a checkpoint against its FFN sparsity",
        description="Quality of a checkpoint on a task at each tau, with 95% bootstrap intervals, beside the FFN "
        "sparsity it ran at. An interrupted run with --output goes on where it stopped.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="PrunePath checkpoint directory, or a dense one")
    parser.add_argument(
        "--task",
        required=True,
        metavar="NAME",
        help="wikitext, needle, mmlu, hellaswag, arc_easy, arc_challenge, sst2, mrpc, rte, qnli, mnli, xsum or e2e; "
        "several, separated by commas, share one engine, and each writes its own OUTPUT-NAME and PLOT-NAME",
    )
    parser.add_argument("--data", metavar="DIR", help="the task's folder or file (default: where `fetch` puts it)")
    parser.add_argument("--tau", default="1.0,0.9,0.8,0.7,0.6,0.5", metavar="LIST", help="(default: %(default)s)")
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="vllm or transformers (default: vllm; transformers for wikitext)",
    )
    parser.add_argument("--engine", default="{}", metavar="JSON", help="more arguments of vLLM's LLM, an object")
    parser.add_argument("--dense", metavar="DIR", help="the dense model, to measure beside it with transformers")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="only the first N items")
    parser.add_argument(
        "--shots", type=whole(0), default=5, metavar="N", help="examples, for mmlu (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=whole(1), default=8192, metavar="N", help="of wikitext and needle (default: %(default)s)"
    )
    parser.add_argument(
        "--context", type=whole(1), metavar="N", help="of wikitext and needle (default: 1024, or what fits)"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of transformers")
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON; item by item beside it, as .jsonl")
    parser.add_argument("--plot", metavar="FILE", help="draw quality against sparsity (.png, .pdf, .svg)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print a table, write --output and --plot."""
    from prunepath_vllm.evaluation.backends import open_checkpoint
    from prunepath_vllm.evaluation.runner import Run
    from prunepath_vllm.evaluation.tasks import Options

    names = list(dict.fromkeys(args.task.split(",")))
    if args.data and len(names) > 1:
        raise UsageError(f"--data {args.data}: expected one task with it, got {', '.join(names)}")
    checkpoint, dense = open_checkpoint(args.checkpoint), open_checkpoint(args.dense) if args.dense else None
    engine, taus = parse_engine(args.engine), parse_tau_list(args.tau)
    outputs = {name: _named(args.output, name if names[1:] else "") for name in names}
    plots = {name: _named(args.plot, name if names[1:] else "") for name in names}
    for name in names:
        check_plot(plots[name])
        journal_path(outputs[name])
    evaluations: list[Run] = []
    for name in names:  # all of them first: what is wrong is named before an engine starts
        backend = args.backend or ("transformers" if name == "wikitext" else "vllm")
        evaluation = Run(
            checkpoint,
            name,
            taus,
            data=Path(args.data) if args.data else None,
            backend=backend,
            dense=dense,
            limit=args.limit,
            options=Options(shots=args.shots, max_tokens=args.max_tokens, context=args.context),
            device=args.device,
            journal=journal_path(outputs[name]),
            engine=engine,
            like=next((one for one in evaluations if one.backend == backend), None),
        )
        evaluations.append(evaluation)
    for evaluation in evaluations:
        result = evaluation.results()
        print_table(result, evaluation.task.metrics)
        if output := outputs[evaluation.name]:
            output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if plot := plots[evaluation.name]:
            from prunepath_vllm.evaluation.plots import plot_points

            plot_points(result, evaluation.task.metrics[0], plot)
    return 0


def _named(path: str | None, task: str) -> Path | None:
    """`path` with the task's name before its suffix, where there is one."""
    if path is None:
        return None
    whole = Path(path)
    return whole.with_stem(f"{whole.stem}-{task}") if task else whole


def parse_engine(text: str) -> dict[str, Any]:
    """--engine's object.

    Raises:
        UsageError: it is none, or says what the checkpoint decides.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"--engine {text}: expected a JSON object, arguments of vLLM's LLM by name")
    if taken := {"model", "max_model_len"} & value.keys():
        raise UsageError(f"--engine: {min(taken)} is the checkpoint's; expected other arguments of vLLM's LLM")
    return value


def journal_path(output: Path | None) -> Path | None:
    """Where results go item by item: beside the output.

    Raises:
        UsageError: the output would be that file, or one of the two could not be written.
    """
    if output is None:
        return None
    if output.suffix == ".jsonl":
        raise UsageError(f"--output {output}: expected another suffix; .jsonl holds the single items")
    journal = output.with_suffix(".jsonl")
    for file in (output, journal):
        check_output_file(file, "--output")
    return journal


def print_table(result: dict[str, Any], metrics: tuple[str, ...]) -> None:
    """One line per point: tau, sparsity, and each metric with its interval."""
    read = f"{result['sequences']} sequences of {result['context']} tokens" if "sequences" in result else ""
    read = read or f"{result['items']} items"
    print(f"{result['task']}: {read}, {result['dtype']}, {result['backend']}")
    print(f"{'tau':>6}  {'FFN sparsity':>12}" + "".join(f"  {metric:>13} {'95%':<15}" for metric in metrics))
    for point, interval in zip(result["points"], result["intervals"], strict=True):
        tau = "dense" if point["tau"] is None else f"{point['tau']:g}"
        line = f"{tau:>6}  {point['ffn_sparsity']:>12.3f}"
        for metric in metrics:
            digits = 2 if metric == "perplexity" else 3
            low, high = (f"{edge:.{digits}f}" for edge in interval[metric])
            line += f"  {point[metric]:>13.{digits}f} {f'[{low}, {high}]':<15}"
        print(line.rstrip())
