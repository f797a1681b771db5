"""The ``prunepath`` command: parses arguments, runs one subcommand, turns errors into one line and an exit code."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from prunepath_vllm.arguments import OneLineErrors
from prunepath_vllm.errors import PrunePathError, TauError, UsageError
from prunepath_vllm.version import __version__

COMMANDS = (
    "convert", "calibrate", "quantize", "inspect", "generate", "serve", "train", "prune", "eval", "sweep", "figures",
    "bench", "fetch", "check",
)  # fmt: skip

EXIT_FAILURE = 1
EXIT_USAGE = 2


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Command modules import heavy packages only when they run."""
    parser = OneLineErrors(
        prog="prunepath",
        description="Convert dense transformers into PrunePath checkpoints and serve them with a tau per request.",
    )
    parser.add_argument("--version", action="version", version=f"prunepath-vllm {__version__}")
    common = OneLineErrors(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"prunepath_vllm.entrypoints.commands.{name}")
        module.add_parser(subparsers, parents=[common]).set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (it failed) or 2 (it was used wrongly)."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as end:  # --help, or arguments that were refused
        return int(end.code or 0)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("prunepath: interrupted", file=sys.stderr)
        return 130
    except (PrunePathError, OSError) as error:
        if args.debug:
            raise
        print(f"prunepath {args.command}: {_one_line(error)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError | TauError) else EXIT_FAILURE
    except ModuleNotFoundError as error:
        if args.debug:
            raise
        print(
            f"prunepath {args.command}: {error.name} is not installed; prunepath check lists what is", file=sys.stderr
        )
        return EXIT_FAILURE
    except Exception as error:
        if args.debug:
            raise
        if (reason := _refusal(error)) is not None:
            print(f"prunepath {args.command}: {_one_line(reason)}", file=sys.stderr)
            return EXIT_USAGE
        print(
            f"prunepath {args.command}: {type(error).__name__}: {_one_line(error)} (--debug shows where)",
            file=sys.stderr,
        )
        return EXIT_FAILURE


def _refusal(error: Exception) -> Exception | None:
    """This package's error inside a pydantic ValidationError, which vLLM's configuration classes make of it."""
    errors = getattr(error, "errors", None)
    details = errors() if callable(errors) else []
    reasons = (detail.get("ctx", {}).get("error") for detail in details)
    return next((reason for reason in reasons if isinstance(reason, PrunePathError)), None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
