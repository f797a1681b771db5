"""``prunepath serve``: the engine's OpenAI-compatible server, after the checkpoint has been looked over."""

import argparse
import os
import sys
import tempfile

from prunepath_vllm.checkpoint import validate_checkpoint
from prunepath_vllm.entrypoints.engine_defaults import set_server_defaults


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "serve",
        parents=parents,
        help="serve a checkpoint over HTTP; takes any `vllm serve` flag",
        description="Serve a checkpoint over OpenAI-compatible HTTP. Every further flag goes to `vllm serve`.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="PrunePath checkpoint: a directory or a Hugging Face name")
    parser.add_argument("engine_args", nargs=argparse.REMAINDER, metavar="...", help="any `vllm serve` flag")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the server in this process until it is told to stop."""
    if os.path.isdir(args.checkpoint):
        validate_checkpoint(args.checkpoint)
    with tempfile.TemporaryDirectory(prefix="prunepath-metrics-") as metrics:
        # The workers' counters reach the server's /metrics through files; read when prometheus_client is imported.
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", metrics)
        set_server_defaults()
        from vllm.entrypoints.cli.main import main

        sys.argv = ["vllm", "serve", args.checkpoint, *args.engine_args]
        main()
    return 0
