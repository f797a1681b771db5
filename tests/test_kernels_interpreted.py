"""Runs interpreted_kernels.py in a process of its own: Triton decides at import whether kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(2400)
def test_kernels_under_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_kernels.py"))


def run_interpreted(file: Path) -> None:
    """Run a file of tests with TRITON_INTERPRET; none may fail or be skipped."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-x", "--tb=short", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=file.parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
