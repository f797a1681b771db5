"""Directories that appear complete or not at all."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunepath_vllm import files
from prunepath_vllm.errors import UsageError
from prunepath_vllm.files import check_apart, check_writable, is_mount_point, new_directory


@pytest.fixture(params=["a file system", "a bind mount", "pretended"])
def mount_point(request, tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty folder, with a blank in its name, that cannot be renamed nor renamed into from outside.

    Where this user may mount nothing, all three are pretended.
    """
    target, other = tmp_path / "a volume", tmp_path / "other"
    target.mkdir()
    other.mkdir()
    options = {"a file system": ["-t", "tmpfs", "none"], "a bind mount": ["--bind", other]}.get(request.param)
    if options and not subprocess.run(["mount", *options, target], capture_output=True).returncode:
        yield target
        subprocess.run(["umount", target], check=True)
        return

    def refusing(rename):
        def renamed(source, destination):
            both = [Path(path) for path in (source, destination)]
            if target in both:
                raise OSError(errno.EBUSY, "Device or resource busy")
            if len({target in path.parents for path in both}) == 2:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            rename(source, destination)

        return renamed

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"36 35 98:0 /mnt1 {str(target).replace(' ', chr(92) + '040')} rw - ext3 /dev/root rw\n")
    monkeypatch.setattr(files, "MOUNTS", mounts)
    yield target


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_block_leaves_nothing(tmp_path, interruption):
    def build() -> None:
        with new_directory(tmp_path / "corpus") as folder:
            (folder / "train.txt").write_text("half")
            raise interruption

    with pytest.raises(interruption):
        build()
    assert names(tmp_path) == []
    with new_directory(tmp_path / "corpus") as folder:
        assert names(folder) == []
        (folder / "whole").touch()
        assert not (tmp_path / "corpus").exists()
    assert names(tmp_path) == ["corpus"]
    assert names(tmp_path / "corpus") == ["whole"]


def test_what_is_there_stays_unless_it_is_to_be_replaced(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(UsageError, match=f"^{target}: has appeared meanwhile"), new_directory(target) as folder:
        (folder / "new").touch()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["model"]
    with pytest.raises(ValueError), new_directory(target, replace=True):
        raise ValueError
    assert names(target) == ["old"]
    with new_directory(target, replace=True) as folder:
        (folder / "new").touch()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["model"]


def test_what_another_process_has_put_there_meanwhile_can_be_kept(tmp_path):
    for process in ("first", "second"):
        with new_directory(tmp_path / "model", keep=True) as folder:
            (folder / process).touch()
    assert names(tmp_path / "model") == ["first"]
    assert names(tmp_path) == ["model"]


def test_other_failures_are_not_taken_for_it(tmp_path, monkeypatch):
    def refuse(source, destination):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space"), new_directory(tmp_path / "model", keep=True):
        pass
    assert names(tmp_path) == []


def test_weights_are_as_readable_as_the_directory(tmp_path):
    with new_directory(tmp_path / "model") as folder:
        (folder / "part").mkdir()
        for path in (folder / "a.safetensors", folder / "part" / "b.safetensors"):
            path.touch(0o600)
        (folder / "secret").touch(0o600)
    mode = (tmp_path / "model").stat().st_mode & 0o666
    assert mode & 0o044, "this test needs a umask that lets others read"
    for name, expected in (("a.safetensors", mode), ("part/b.safetensors", mode), ("secret", 0o600)):
        assert (tmp_path / "model" / name).stat().st_mode & 0o777 == expected


def test_a_mount_point_is_filled_from_within(mount_point):
    assert is_mount_point(mount_point)
    assert not is_mount_point(mount_point.parent / "other")

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyError

    with pytest.raises(KeyError), new_directory(mount_point) as folder:
        fail(folder)
    assert names(mount_point) == []
    with new_directory(mount_point) as folder:
        (folder / "config.json").touch()
        (folder / "part").mkdir()
        (folder / "part" / "whole").touch()
        assert mount_point in folder.parents, "elsewhere may be no space"
    assert names(mount_point) == ["config.json", "part"]
    assert names(mount_point / "part") == ["whole"]
    with pytest.raises(UsageError, match="has appeared meanwhile"), new_directory(mount_point) as folder:
        (folder / "new").touch()
    with new_directory(mount_point, keep=True) as folder:
        (folder / "new").touch()
    assert names(mount_point) == ["config.json", "part"]


def test_a_mount_points_files_are_replaced_all_or_none(mount_point, monkeypatch):
    for name in ("config.json", "old"):
        (mount_point / name).write_text("old")

    def refuse(source, destination):
        if Path(destination) == mount_point / "config.json" and Path(source).read_text() == "new":
            raise OSError(errno.ENOSPC, "no space")
        rename(source, destination)

    rename = os.rename
    for interrupted in (True, False):
        monkeypatch.setattr(os, "rename", refuse if interrupted else rename)
        try:
            with new_directory(mount_point, replace=True) as folder:
                for name in ("config.json", "new"):
                    (folder / name).write_text("new")
        except OSError:
            assert interrupted
        content = {file.name: file.read_text() for file in mount_point.iterdir()}
        word = "old" if interrupted else "new"
        assert content == {"config.json": word, word: word}


def test_a_link_stays_and_what_it_points_to_is_filled(tmp_path):
    (tmp_path / "disk").mkdir()
    for name, real in (("empty", "disk"), ("dangling", "absent")):
        link = tmp_path / name
        link.symlink_to(tmp_path / real)
        with new_directory(link) as folder:
            (folder / "whole").touch()
        assert link.is_symlink()
        assert names(link) == ["whole"]
        with new_directory(link, replace=True) as folder:
            (folder / "other").touch()
        assert link.is_symlink()
        assert names(tmp_path / real) == ["other"]


def test_places_where_nothing_can_be_put(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing/here")):
        with pytest.raises(UsageError, match=f"{place}: "):
            check_writable(place)
    check_writable(tmp_path / "new" / "one")
    assert names(tmp_path / "new") == []


def test_what_is_read_and_what_is_made_are_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "disk" / "model"
    (source / "part").mkdir(parents=True)
    (source / "weights").touch()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "sibling").mkdir()
    for one in (source, "disk/model", "./disk/../disk/model/", "link", "link/../model"):
        for other, relation in (
            ("disk/model", "is"),
            ("link/", "is"),
            ("sibling/../link", "is"),
            ("disk/model/new", "lies in"),
            ("link/part/new/one", "lies in"),
            ("disk/model/none/../new", "lies in"),
            ("disk", "holds"),
            (".", "holds"),
            ("link/weights", "lies in"),
        ):
            with pytest.raises(UsageError) as refused:
                check_apart(Path(other), one)
            assert str(refused.value) == (
                f"{Path(other)}: {relation} {one}, which it would be made from; expected a place apart from it"
            )
        for other in ("new", "sibling", "sibling/new", "disk/model2", "disk/mod", "disk/model/../new"):
            check_apart(Path(other), one)
    check_apart(tmp_path / "disk" / "model" / "new", "openai-community/gpt2")
    with pytest.raises(UsageError, match="weights: is link/weights"):
        check_apart(source / "weights", "link/weights")


@pytest.mark.parametrize("downloaded", [True, False])
def test_a_model_by_its_hub_name_lies_in_the_cache(tmp_path, monkeypatch, downloaded):
    cache, link = tmp_path / "disk" / "hub", tmp_path / "link"
    folder = cache / "models--owner--Model-1.5B"
    snapshot = folder / "snapshots" / "0a1b2c"
    (snapshot if downloaded else cache).mkdir(parents=True)
    link.symlink_to(cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(link))
    for target, relation in (
        (snapshot, "lies in"),
        (snapshot / "pruned", "lies in"),
        (folder, "is"),
        (cache, "holds"),
        (tmp_path / "disk", "holds"),
    ):
        with pytest.raises(UsageError) as refused:
            check_apart(target, "owner/Model-1.5B")
        assert str(refused.value) == (
            f"{target}: {relation} {link / folder.name}, the cache of owner/Model-1.5B, which it would be made from; "
            "expected a place apart from it"
        )
    for target in (tmp_path / "new", cache / "models--owner--Model-1.5B-pruned", cache / "models--owner--other"):
        check_apart(target, "owner/Model-1.5B")
    (tmp_path / "owner" / "Model-1.5B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    check_apart(folder, "owner/Model-1.5B")  # a directory of that name comes first


def test_a_directory_mounted_in_two_places_is_one(tmp_path, monkeypatch):
    first, second = (tmp_path / name for name in ("model", "volume"))
    (first / "part").mkdir(parents=True)
    second.mkdir()
    real = Path.samefile

    def mounted(path, other):
        return {path, Path(other)} == {first, second} or real(path, other)

    monkeypatch.setattr(Path, "samefile", mounted)
    for target, source in ((second / "new", first), (first / "new", second), (second, first), (second, first / "part")):
        with pytest.raises(UsageError, match="apart"):
            check_apart(target, source)
    check_apart(tmp_path / "new", first)
