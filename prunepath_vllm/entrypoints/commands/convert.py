"""``prunepath convert``: a dense model becomes a PrunePath checkpoint."""

import argparse

from prunepath_vllm.arguments import seed, whole


def add_parser(subparsers, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "convert",
        parents=parents,
        help="turn a dense model into a PrunePath checkpoint",
        description="Group a dense model's feed-forward neurons into experts and add routers. "
        "At tau >= 1 the result computes the dense model's function.",
    )
    parser.add_argument("src", metavar="SRC", help="directory of a dense model, or its Hugging Face name")
    parser.add_argument("dst", metavar="DST", help="directory to create")
    parser.add_argument(
        "--expert-size", type=whole(1), default=32, metavar="N", help="neurons per expert (default: 32)"
    )
    parser.add_argument(
        "--split",
        choices=("kmeans", "coactivation", "random"),
        default="kmeans",
        help="group neurons by input weights (default), by firing together on the calibration text, or at random",
    )
    parser.add_argument(
        "--router",
        choices=("zero", "calibrated"),
        help="calibrated on the calibration text (default where one is given), or zero: to be trained",
    )
    parser.add_argument(
        "--gate",
        choices=("sigmoid", "none"),
        default="none",
        help="multiply an expert's output by the sigmoid of its router logit, or not (default)",
    )
    parser.add_argument(
        "--router-input",
        choices=("ffn", "attention"),
        default="ffn",
        help="what routers read: the feed-forward layer's input (default), or that of the self-attention before it",
    )
    parser.add_argument(
        "--router-rank",
        type=whole(1),
        metavar="R",
        help="make each router the product of two thin matrices of this rank (default: one full matrix)",
    )
    parser.add_argument(
        "--expert-dtype",
        choices=("float8_e4m3fn",),
        help="leave the feed-forward layers of a float8 source in float8 (default: dequantise them); others: see "
        "`prunepath quantize`",
    )
    parser.add_argument(
        "--dense-positions",
        type=whole(0),
        default=0,
        metavar="N",
        help="let the first N tokens of a sequence use every expert (default: 0; 1 is advised for decoders)",
    )
    parser.add_argument("--calibration-text", metavar="FILE", help="UTF-8 text file")
    parser.add_argument("--seed", type=seed, default=0, help="of the split and the calibration (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Convert and say what came out."""
    from prunepath_vllm.checkpoint import read_config
    from prunepath_vllm.conversion.convert import convert
    from prunepath_vllm.conversion.model_card import SOURCE_WEIGHTS

    path = convert(
        args.src,
        args.dst,
        expert_size=args.expert_size,
        split=args.split,
        router=args.router or ("zero" if args.calibration_text is None else "calibrated"),
        gate=args.gate,
        router_input=args.router_input,
        router_rank=args.router_rank,
        dense_positions=args.dense_positions,
        calibration_text=args.calibration_text,
        seed=args.seed,
        device=args.device,
        expert_dtype=args.expert_dtype,
    )
    if (said := read_config(path).get(SOURCE_WEIGHTS)) is not None:
        print(f"Source: {said}.")
    print(f"Wrote {path}. Next: prunepath inspect {path}")
    return 0
