"""The shipped choices compile for Hopper; see test_kernels_compiled.py."""

import pytest
from test_kernels_compiled import check_compiled


@pytest.mark.timeout(1800)
def test_kernels_compile_without_spills_for_hopper(tmp_path):
    check_compiled(90, tmp_path)
