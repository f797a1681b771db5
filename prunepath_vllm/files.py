"""Directories and files that appear complete or not at all."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prunepath_vllm.arguments import may_be_hub_name
from prunepath_vllm.errors import UsageError

MOUNTS = Path("/proc/self/mountinfo")


@contextmanager
def new_directory(target: Path, *, replace: bool = False, keep: bool = False) -> Iterator[Path]:
    """An empty directory to fill, put at `target` where the block ends well and removed where it does not.

    It is on the target's own file system (:func:`staging_directory`), so the last step renames and copies nothing.
    Weights become as readable as the directory: safetensors writes them private to this user, but a server may run as
    another.

    Args:
        target: absent or an empty directory, unless `replace`; its parents are made. A link stands for what it
            points to, and the link stays.
        replace: put it in the place of whatever directory is there.
        keep: any process puts the same there: where one has done so meanwhile, its directory stays.

    Raises:
        UsageError: no directory can be made there, or one has appeared there meanwhile.
        OSError: something else is in the way.
    """
    target = Path(os.path.realpath(target))
    staging = staging_directory(target)
    try:
        yield staging
        for weights in staging.rglob("*.safetensors"):
            weights.chmod(staging.stat().st_mode & 0o666)
        if replace and target.exists():
            replace_directory(target, staging)
        elif not _put(staging, target):
            if not keep:
                raise UsageError(f"{target}: has appeared meanwhile and is not an empty directory; expected a new one")
            shutil.rmtree(staging)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _put(staging: Path, target: Path) -> bool:
    """Rename `staging` to `target`; whether that was absent or empty until then."""
    try:
        if staging.parent == target:
            _move_contents(staging, target)
        else:
            os.replace(staging, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def staging_directory(target: Path) -> Path:
    """Make an empty directory that can become `target` by renaming alone; `target` has no links in it.

    Beside the target, so that one rename puts it there. A mount point (a container's volume) cannot be renamed and is a
    file system of its own, often the one with the space: inside it.

    Raises:
        UsageError: no directory can be made there.
    """
    mounted = is_mount_point(target)
    name = f".partial-{os.getpid()}" if mounted else f".{target.name}.partial-{os.getpid()}"
    staging = (target if mounted else target.parent) / name
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: already there and not a directory; expected a new one")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror}: {error.filename})") from None
    return staging


def check_writable(target: Path) -> None:
    """Refuse a place where no directory can be put, before the work that would fill it.

    Raises:
        UsageError: no directory can be made there.
    """
    staging_directory(Path(os.path.realpath(target))).rmdir()


def check_absent_or_empty(target: Path, *, source: str | Path) -> None:
    """Refuse a place where something is already, or which is not apart from what its content is made from.

    Raises:
        UsageError: `target` is there and not an empty directory, or see :func:`check_apart`.
    """
    check_apart(target, source)
    if not is_absent_or_empty(target):
        raise UsageError(f"{target}: already there and not an empty directory; expected a new one")


def is_absent_or_empty(target: Path) -> bool:
    """Whether nothing is there, or an empty directory."""
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def check_apart(target: Path, source: str | Path) -> None:
    """Refuse to write into what is read, or around it, by whatever names the two are called.

    Args:
        target: directory or file to make.
        source: directory or file that it is made from, or a Hugging Face name, which stands for its folder in the
            cache, downloaded already or not. Anything else that is not there is apart.

    Raises:
        UsageError: one is the other, or lies in it; names both.
    """
    place, said = Path(source), str(source)
    if not os.path.exists(source):
        if not may_be_hub_name(said):
            return
        place = hub_folder(said)
        said = f"{place}, the cache of {source}"
    new, old = Path(os.path.realpath(target)), Path(os.path.realpath(place))
    if _same(new, old):
        relation = "is"
    elif any(_same(parent, old) for parent in new.parents):
        relation = "lies in"
    elif any(_same(new, parent) for parent in old.parents):
        relation = "holds"
    else:
        return
    raise UsageError(f"{target}: {relation} {said}, which it would be made from; expected a place apart from it")


def hub_folder(name: str) -> Path:
    """Where the Hugging Face cache keeps, or would keep, the snapshots of a model."""
    from huggingface_hub import constants  # read now: which cache counts is set in the environment

    return Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}")


def _same(first: Path, second: Path) -> bool:
    # A directory that is mounted in two places has two real paths.
    return first == second or (first.exists() and second.exists() and first.samefile(second))


def is_mount_point(path: Path) -> bool:
    """Whether a file system is mounted at `path`, a bind mount of a folder of the same file system included."""
    if os.path.ismount(path):
        return True
    try:
        mounts = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return False
    # The kernel writes blanks and backslashes as \040 and the like.
    points = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in mounts)
    return str(path) in points


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
    """Put `new`, made by :func:`staging_directory`, in the place of `target`.

    A crash between leaves the old one as ``.NAME.old``, for a mount point its files in ``.old`` in it.
    """
    if new.parent == target:
        _replace_contents(target, new)
        return
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside)


def _replace_contents(target: Path, new: Path) -> None:
    aside = target / ".old"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        _move(target, aside, leave=(new, aside))
        try:
            _move(new, target)
        except BaseException:
            _move(target, new, leave=(new, aside))
            raise
    except BaseException:
        _move(aside, target)
        aside.rmdir()
        raise
    shutil.rmtree(aside)
    new.rmdir()


def _move_contents(new: Path, target: Path) -> None:
    """Move what is in `new` to `target`, in which nothing but `new` may be, and what other processes are filling."""
    others = tuple(target.glob(".partial-*"))
    if found := [file.name for file in target.iterdir() if file not in others]:
        raise FileExistsError(errno.EEXIST, f"{min(found)} is there", str(target))
    try:
        _move(new, target)
    except BaseException:
        _move(target, new, leave=others)
        raise
    new.rmdir()


def _move(source: Path, destination: Path, leave: tuple[Path, ...] = ()) -> None:
    """Rename everything in `source`, but for `leave`; config.json, without which nothing loads, goes last."""
    entries = [entry for entry in source.iterdir() if entry not in leave]
    for entry in sorted(entries, key=lambda entry: (entry.name == "config.json", entry.name)):
        os.rename(entry, destination / entry.name)
