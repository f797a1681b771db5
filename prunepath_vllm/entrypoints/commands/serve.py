"""``prunepath serve``: the engine's OpenAI-compatible server, after the checkpoint has been looked over."""

import argparse
import errno
import os
import sys
import tempfile
from typing import Any

from prunepath_vllm.arguments import OneLineErrors, check_hub_name
from prunepath_vllm.engine_environment import require_engine, set_server_defaults
from prunepath_vllm.errors import PrunePathError

DRAIN_SECONDS = 10
"""How long a server that is told to stop goes on with the answers it has begun."""
CUT_SECONDS = 5
"""After which their connections are closed."""


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
    require_engine()
    # With another load format the files may be others; the engine's own check knows which.
    other_format = any(flag.replace("_", "-").startswith("--load-format") for flag in args.engine_args)
    if not other_format:
        if os.path.isdir(args.checkpoint):
            from prunepath_vllm.checkpoint import validate_checkpoint

            validate_checkpoint(args.checkpoint)
        elif "://" not in args.checkpoint:  # else an address, which the engine reads from
            check_hub_name(args.checkpoint)
    with tempfile.TemporaryDirectory(prefix="prunepath-metrics-") as metrics:
        # The workers' counters reach the server's /metrics through files; read when prometheus_client is imported.
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", metrics)
        set_server_defaults()
        _wrap_run_server()
        from vllm.entrypoints.cli.main import main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        # A wrong flag would print the usage, of 250 lines.
        FlexibleArgumentParser.error = OneLineErrors.error  # type: ignore[method-assign,assignment]

        # Before the user's own: the last one counts.
        drain = ["--shutdown-timeout", str(DRAIN_SECONDS)]
        sys.argv = ["vllm", "serve", args.checkpoint, *drain, *args.engine_args]
        main()
    return 0


def _wrap_run_server() -> None:
    """When the server stops, cut the streams that the engine has not finished; name the port where it is taken.

    vLLM ends the engine and then waits, for ever, for their connections to close.
    """
    from vllm.entrypoints.cli import serve

    from prunepath_vllm.model_executor.compat import expect_module

    expect_module("vllm.entrypoints.cli.serve", serve)
    run_server = serve.run_server

    async def run_and_end(args: argparse.Namespace, **options: Any) -> None:
        try:
            await run_server(args, timeout_graceful_shutdown=CUT_SECONDS, **options)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            where = args.uds or f"{args.host or 'every address'} port {args.port}"
            raise PrunePathError(f"{where}: already in use; expected a free one (--port)") from error

    serve.run_server = run_and_end
