"""Fixtures shared by all tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import save_dense, save_prunepath


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``dense_checkpoint(family)``: the directory of a tiny random dense model in float32, made once per session."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_dense(family, tmp_path_factory.mktemp("dense") / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def prunepath_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``prunepath_checkpoint(family, **options)``: what ``save_prunepath`` writes, made once per session; read only."""
    made: dict[str, Path] = {}

    def get(family: str, **options) -> Path:
        key = repr((family, sorted(options.items())))
        if key not in made:
            made[key] = save_prunepath(family, tmp_path_factory.mktemp("prunepath") / family, **options)
        return made[key]

    return get
