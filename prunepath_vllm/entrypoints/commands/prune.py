"""``prunepath prune``: checkpoints without cold experts, and pruned dense models to compare PrunePath with."""

import argparse

from prunepath_vllm.arguments import number, whole
from prunepath_vllm.errors import UsageError


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "prune",
        parents=parents,
        help="drop experts that are not used, or make a pruned dense model, a baseline",
        description="cold: drop the weights of experts that a text never uses up to a tau; writes a PrunePath "
        "checkpoint, which refuses requests above it. wanda, static: prune the feed-forward layers once, for all "
        "tokens and requests alike; writes a dense checkpoint.",
    )
    parser.add_argument("src", metavar="SRC", help="wanda: dense model directory; cold, static: PrunePath checkpoint")
    parser.add_argument("dst", metavar="DST", help="directory to create")
    parser.add_argument(
        "--method",
        required=True,
        choices=("wanda", "static", "cold"),
        help="wanda: the weights of lowest |W| * ||x|| in each row; static: the experts that contribute least; cold: "
        "those that no token uses at --max-tau",
    )
    parser.add_argument("--sparsity", type=float, metavar="S", help="wanda, static: share to prune, in (0, 1)")
    parser.add_argument("--max-tau", type=number(0, 1), metavar="T", help="cold: the highest tau to serve, in (0, 1)")
    parser.add_argument(
        "--share",
        type=number(0, 1),
        metavar="P",
        help="cold: drop experts that at most this share of tokens uses (default: 0)",
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to calibrate on")
    parser.add_argument(
        "--sequences", type=whole(1), default=128, metavar="N", help="of 512 tokens, from its beginning (default: 128)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prune and say what came out."""
    needed, others = ("max_tau", ("sparsity",)) if args.method == "cold" else ("sparsity", ("max_tau", "share"))
    if getattr(args, needed) is None:
        raise UsageError(f"--{needed.replace('_', '-')} is missing; expected it with --method {args.method}")
    for name in others:
        if (value := getattr(args, name)) is not None:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected none with --method {args.method}")
    common = dict(text=args.text, sequences=args.sequences, device=args.device)
    if args.method == "cold":
        return _prune_cold(args, common)
    from prunepath_vllm.training.baselines.static import prune_experts
    from prunepath_vllm.training.baselines.wanda import prune_with_wanda

    prune = prune_with_wanda if args.method == "wanda" else prune_experts
    path = prune(args.src, args.dst, sparsity=args.sparsity, **common)
    print(f"Wrote {path}, a dense checkpoint.")
    return 0


def _prune_cold(args: argparse.Namespace, common: dict) -> int:
    from prunepath_vllm.conversion.cold import prune_cold_experts

    found = prune_cold_experts(args.src, args.dst, max_tau=args.max_tau, share=args.share or 0.0, **common)
    prunepath, usage = found.prunepath, found.prunepath.expert_usage
    assert prunepath.kept_experts is not None
    assert usage is not None
    kept = [len(layer) for layer in prunepath.kept_experts]
    rows = [
        ("counted on", f"{usage.text}, {usage.tokens} tokens at tau {usage.tau:g}"),
        (
            "experts kept",
            f"{prunepath.kept_share:.1%}; {min(kept)} to {max(kept)} of {prunepath.num_experts} in a layer",
        ),
        ("uses lost", f"{found.lost_uses:.3%} of those on this text"),
        ("weights", f"{found.bytes_before / 1e6:,.1f} MB before, {found.bytes_after / 1e6:,.1f} MB after"),
    ]
    for name, value in rows:
        print(f"{name:<14} {value}")
    print(f"Wrote {args.dst}, which refuses requests above tau {prunepath.max_tau:g}.")
    return 0
