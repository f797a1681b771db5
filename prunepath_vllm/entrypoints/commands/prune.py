"""``prunepath prune``: the pruned dense models that PrunePath is compared with."""

import argparse

from prunepath_vllm.arguments import whole


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "prune",
        parents=parents,
        help="make a pruned dense model, a baseline",
        description="Prune the feed-forward layers once, for all tokens and requests alike; writes a dense checkpoint.",
    )
    parser.add_argument("src", metavar="SRC", help="wanda: dense model directory; static: PrunePath checkpoint")
    parser.add_argument("dst", metavar="DST", help="directory to create")
    parser.add_argument(
        "--method",
        required=True,
        choices=("wanda", "static"),
        help="wanda: the weights of lowest |W| * ||x|| in each row; static: the experts that contribute least",
    )
    parser.add_argument("--sparsity", required=True, type=float, metavar="S", help="share to prune, in (0, 1)")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to calibrate on")
    parser.add_argument(
        "--sequences", type=whole(1), default=128, metavar="N", help="of 512 tokens, from its beginning (default: 128)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prune and say what came out."""
    from prunepath_vllm.training.baselines.static import prune_experts
    from prunepath_vllm.training.baselines.wanda import prune_with_wanda

    prune = prune_with_wanda if args.method == "wanda" else prune_experts
    path = prune(
        args.src, args.dst, sparsity=args.sparsity, text=args.text, sequences=args.sequences, device=args.device
    )
    print(f"Wrote {path}, a dense checkpoint.")
    return 0
