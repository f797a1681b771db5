"""Directories and files that appear complete or not at all."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty directory to fill, put at `target` where the block ends well and removed where it does not.

    It is named after the target and this process and lies beside it, so the last step is a rename. Weights become as
    readable as the directory: safetensors writes them private to this user, but a server may run as another.

    Args:
        target: absent or an empty directory, unless `replace`; its parents are made.
        replace: put it in the place of whatever directory is there.

    Raises:
        OSError: `target` is in the way.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        for weights in staging.rglob("*.safetensors"):
            weights.chmod(staging.stat().st_mode & 0o666)
        if replace and target.exists():
            replace_directory(target, staging)
        else:
            os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def replace_file(path: Path, write: Callable[[Path], object], *, like: Path) -> None:
    """Put a new file at `path`, never through what is there: that may be a link to another checkpoint's file.

    Args:
        path: of the file; there or not.
        write: called with the path to write first.
        like: file whose permissions the new one gets; safetensors writes its own private to this user.
    """
    new = path.with_name(f".{path.name}.new")
    write(new)
    new.chmod(like.stat().st_mode)
    os.replace(new, path)


def replace_directory(target: Path, new: Path) -> None:
    """Rename `new`, a directory beside `target`, to `target`; a crash between leaves the old one as ``.NAME.old``."""
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside)
