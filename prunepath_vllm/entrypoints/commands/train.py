"""``prunepath train``: a recipe in, a checkpoint out."""

import argparse


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "train",
        parents=parents,
        help="train a checkpoint as a recipe says",
        description="Train as a recipe says: convert a dense model where the recipe asks for it, train, and write a "
        "checkpoint with its measured tau and quality curves to OUTPUT/model. On several processes: "
        "torchrun (or accelerate launch) -m prunepath_vllm.entrypoints.cli train ...",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML; docs/reference/recipe.md has the keys")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the recipe, as in optimizer.lr=1e-4 or stages.0.tau_end=0.3; may be given again",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the output's last checkpoint, if it has one"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Train and print what came out."""
    from prunepath_vllm.training.recipe import load_recipe
    from prunepath_vllm.training.run import train

    result = train(load_recipe(args.config, args.overrides), resume=args.resume)
    print(result)
    return 0
