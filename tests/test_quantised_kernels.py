"""Kernels on quantised weights: interpreted_quantised.py in a process of its own, as test_kernels_interpreted.py does.

test_kernels_compiled.py compiles them, test_gpu.py runs them.
"""

from pathlib import Path

import pytest
from test_kernels_interpreted import run_interpreted


@pytest.mark.timeout(2400)
def test_kernels_on_quantised_weights_under_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_quantised.py"))
