"""``prunepath calibrate``: fit a checkpoint's routers to a text and measure its tau curve."""

import argparse

from prunepath_vllm.arguments import number, seed, whole
from prunepath_vllm.errors import UsageError


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "calibrate",
        parents=parents,
        help="fit the routers to a text and measure the tau curve",
        description="Fit each layer's router to a text, without training, and measure FFN sparsity by tau. Rewrites "
        "the checkpoint's routers, prunepath_config and model card; tau >= 1 stays the function it was.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="PrunePath checkpoint directory")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text (.gz too), like what will be served")
    parser.add_argument(
        "--max-tokens",
        type=whole(1),
        default=8192,
        metavar="N",
        help="of the text that are read (default: %(default)s)",
    )
    parser.add_argument(
        "--context", type=whole(1), metavar="N", help="tokens per sequence (default: 512, or what fits)"
    )
    parser.add_argument(
        "--dense-positions",
        type=whole(0),
        metavar="N",
        help="let the first N tokens of a sequence use every expert (default: as the checkpoint says)",
    )
    parser.add_argument(
        "--usage-at",
        type=number(0, 1),
        metavar="TAU",
        help="fit nothing: record how often the text uses each expert at this tau, for host_experts",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the sampled labels (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser


def run(args: argparse.Namespace) -> int:
    """Calibrate in place and print the curve, or measure uses and print how uneven they are."""
    if args.usage_at is not None:
        return _record_usage(args)
    from prunepath_vllm.conversion.calibrate import calibrate

    curve = calibrate(
        args.checkpoint,
        args.text,
        max_tokens=args.max_tokens,
        context=args.context,
        dense_positions=args.dense_positions,
        seed=args.seed,
        device=args.device,
    )
    print(f"{'tau':>6}  FFN sparsity")
    for tau, sparsity in curve:
        print(f"{tau:>6g}  {sparsity:.3f}")
    return 0


def _record_usage(args: argparse.Namespace) -> int:
    from prunepath_vllm.conversion.cold import record_usage

    for name in ("context", "dense_positions"):
        if (value := getattr(args, name)) is not None:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected none with --usage-at")
    usage = record_usage(args.checkpoint, args.text, tau=args.usage_at, max_tokens=args.max_tokens, device=args.device)
    print(f"{usage.text}, {usage.tokens} tokens at tau {usage.tau:g}: share of all uses of experts")
    print(f"{'hottest':>8}  of uses")
    for part in (0.1, 0.25, 0.5, 0.75):
        print(f"{part:>8.0%}  {usage.hottest(part):.1%}")
    return 0
