"""Fixtures shared by all tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import save_dense


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``dense_checkpoint(family)``: the directory of a tiny random dense model in float32, made once per session."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_dense(family, tmp_path_factory.mktemp("dense") / family)
        return made[family]

    return get
