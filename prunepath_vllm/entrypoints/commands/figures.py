"""``prunepath figures``: the paper's figures and tables, rebuilt from results."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunepath_vllm.arguments import check_output_file, check_plot, whole
from prunepath_vllm.errors import UsageError

NAMES = {
    "fig2": "router reconstruction by top-k: LABEL=CKPT, with --text, or an earlier output of one",
    "fig3": "NLU, accuracy against sparsity: LABEL=results of `eval`",
    "fig4": "NLG, ROUGE-L or perplexity against sparsity: LABEL=results of `eval`",
    "fig5": "MMLU by tau: LABEL=results of `eval --task mmlu`",
    "fig7": "experts from pretrained or fine-tuned weights: LABEL=results of `eval`",
    "fig8": "tau swept at inference: LABEL=results of `eval` or `sweep`",
    "fig9": "decode latency by prompt, and Table 3: LABEL=results of `bench latency --repeats 20`",
    "table2": "effect of L_gate: LABEL=results of `eval`",
}


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "figures",
        parents=parents,
        help="the paper's figures and tables, rebuilt from results",
        description="One of the paper's figures or tables, from results: " + "; ".join(NAMES) + ".",
    )
    figures = parser.add_subparsers(dest="figure", metavar="NAME", required=True)
    for name, line in NAMES.items():
        one = figures.add_parser(name, parents=parents, help=line, description=line)
        what = "CKPT|FILE" if name == "fig2" else "FILE" if name == "fig9" else "FILE[@SPARSITY][,FILE...]"
        one.add_argument("series", nargs="+", metavar=f"LABEL={what}", help="a method, named as in the legend")
        one.add_argument(
            "--output", required=True, metavar="FILE.json", help="write the data; the image beside it, .png"
        )
        if name == "fig2":
            one.add_argument("--text", metavar="FILE", help="what the model reads; needed with CKPT")
            one.add_argument("--top-k", default="1,2,4,8", metavar="LIST", help="(default: %(default)s)")
            one.add_argument("--max-tokens", type=whole(1), default=4096, metavar="N", help="(default: %(default)s)")
            one.add_argument("--context", type=whole(1), metavar="N", help="tokens per sequence (default: 512)")
            one.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the data as JSON and the image beside it, and print the data as a Markdown table."""
    output = Path(args.output)
    if output.suffix != ".json":
        raise UsageError(f"--output {output}: expected a .json file in an existing folder")
    check_output_file(output, "--output")
    image = output.with_suffix(".png")
    check_plot(image, "--output")

    from prunepath_vllm.evaluation import figures

    header: Sequence[str]
    rows: list[Sequence[str]]
    if args.figure == "fig2":
        data = figures.reconstruction_figure(_reconstructions(args), image)
        rows = [
            (one["label"], str(p["k"]), f"{p['mse']:.4g}", f"{p['relative_mse']:.1%}")
            for one in data["series"]
            for p in one["points"]
        ]
        header = ("method", "k", "MSE", "of the output's mean square")
    elif args.figure == "fig9":
        data = figures.latency_figure([row for text in args.series for row in figures.read_latency(text)], image)
        rows = [
            (
                one["label"],
                str(len(one["step_ms"])),
                f"{one['median_ms']:.2f}",
                f"{one['tokens_per_second']:.1f}",
                "" if one["peak_gib"] is None else f"{one['peak_gib']:.2f}",
            )
            for one in data["series"]
        ]
        header = ("method", "prompts", "step ms", "tokens/s", "peak GiB")
    else:
        data = figures.quality_figure(args.figure, [figures.read_series(text) for text in args.series], image)
        rows = [_quality_row(one, point) for one in data["series"] for point in one["points"]]
        header = ("method", "task", "tau", "FFN sparsity", "metric", "value")
    output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{data['title']}\n\n{_table(header, rows)}")
    return 0


def _reconstructions(args: argparse.Namespace) -> list[dict[str, Any]]:
    from prunepath_vllm.evaluation.figures import split_label
    from prunepath_vllm.evaluation.reconstruction import read_reconstruction, reconstruction

    try:
        counts = [int(count) for count in args.top_k.split(",")]
    except ValueError:
        raise UsageError(f"--top-k {args.top_k}: expected whole numbers separated by commas") from None
    series: list[dict[str, Any]] = []
    read: list[tuple[int, str]] = []  # places of series that a checkpoint is read for, after all files
    for text in args.series:
        label, path = split_label(text, "LABEL=CKPT, the method's name and its checkpoint")
        series.append(dict(label=label))
        if Path(path).is_file():
            series[-1] = read_reconstruction(path) | series[-1]
        elif not Path(path).is_dir():
            raise UsageError(f"{path}: no such file or directory; expected a checkpoint, or an earlier output of fig2")
        elif args.text is None:
            raise UsageError(f"{text}: expected --text, what the checkpoint is to read")
        else:
            read.append((len(series) - 1, path))
    for place, path in read:
        options = dict(max_tokens=args.max_tokens, context=args.context, device=args.device)
        series[place] |= reconstruction(path, args.text, counts, **options)
    return series


def _quality_row(series: Mapping[str, Any], point: Mapping[str, Any]) -> Sequence[str]:
    tau = "" if point["tau"] is None else f"{point['tau']:g}"
    value = f"{point['value']:.{2 if point['metric'] == 'perplexity' else 4}f}"
    return series["label"], point["task"], tau, f"{point['ffn_sparsity']:.3f}", point["metric"], value


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """As Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
