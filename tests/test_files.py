"""Directories that appear complete or not at all."""

from pathlib import Path

import pytest

from prunepath_vllm.files import new_directory


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
    with pytest.raises(OSError), new_directory(target) as folder:
        (folder / "new").touch()
    assert names(target) == ["old"]
    with pytest.raises(ValueError), new_directory(target, replace=True):
        raise ValueError
    assert names(target) == ["old"]
    with new_directory(target, replace=True) as folder:
        (folder / "new").touch()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["model"]


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
