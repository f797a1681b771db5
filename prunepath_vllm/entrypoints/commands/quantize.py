"""``prunepath quantize``: a checkpoint whose experts, and attention where asked for, are int8 or float8."""

import argparse

from prunepath_vllm.arguments import seed


def add_parser(subparsers, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "quantize",
        parents=parents,
        help="store a checkpoint's experts in int8 or float8",
        description="Write a checkpoint whose feed-forward weights are int8 or float8 with a scale per neuron; routers "
        "and all other tensors stay as they are, but for the attention's linears with --linears.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="PrunePath checkpoint directory, not quantised")
    parser.add_argument("dst", metavar="DST", help="directory to create")
    parser.add_argument(
        "--expert-dtype", required=True, choices=("float8_e4m3fn", "int8"), help="what to store the experts' weights in"
    )
    parser.add_argument(
        "--linears", choices=("float8_e4m3fn", "int8"),
        help="what to store the attention's linears in, for vLLM's own products, which quantise activations too "
        "(default: they stay as they are)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=seed, default=0, help="of the inputs that each layer's error is measured on (default: 0)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Quantise, and print what it changed in every layer."""
    from prunepath_vllm.conversion.quantize import quantize

    errors = quantize(args.checkpoint, args.dst, args.expert_dtype, linears=args.linears, seed=args.seed)
    print("relative error: of the layer's weights, and of its outputs with every expert, on random inputs")
    print(f"{'layer':>6}  {'weights':>8}  {'outputs':>8}")
    for error in errors:
        print(f"{error.layer:>6}  {error.weights:>8.2%}  {error.function:>8.2%}")
    if args.linears is not None:
        print("relative error: of each linear's weights, and of its outputs with quantised activations")
        print(f"{'weights':>8}  {'outputs':>8}  linear")
        for linear in (linear for error in errors for linear in error.linears):
            print(f"{linear.weights:>8.2%}  {linear.function:>8.2%}  {linear.name}")
    print(f"Wrote {args.dst}. Next: prunepath inspect {args.dst}")
    return 0
