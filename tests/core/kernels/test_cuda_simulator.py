"""Every CUDA kernel test, run under numba's simulator where there is no device."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.simulator import TIMEOUT_S, check_under_simulator


@pytest.mark.timeout(TIMEOUT_S)
def test_cuda_kernels_equal_their_references_under_the_simulator() -> None:
    check_under_simulator(Path(__file__).parent)
