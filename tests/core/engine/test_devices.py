"""Where a stage computes, and what is said where that cannot be."""

from __future__ import annotations

import pytest

from core.engine.cpu_backend import CpuBackend
from core.engine.devices import DEVICES, choose_backend, has_driver, why_no_gpu
from core.errors import InvalidInput
from tests.architecture.test_imports import loaded_modules


def test_the_cpu_can_always_be_chosen() -> None:
    assert choose_backend("cpu", number_format="bf16") is CpuBackend


def test_a_gpu_is_refused_with_the_reason_where_it_cannot_be_used() -> None:
    assert "int8" in str(why_no_gpu("int8"))
    with pytest.raises(InvalidInput, match="not in int8"):
        choose_backend("cuda", number_format="int8")


def test_auto_is_the_cpu_for_what_a_gpu_does_not_compute() -> None:
    assert choose_backend("auto", number_format="int8") is CpuBackend


@pytest.mark.parametrize("device", DEVICES)
def test_no_choice_imports_torch_without_a_driver(device: str) -> None:
    program = (
        "from core.engine.devices import choose_backend\n"
        "from core.errors import InvalidInput\n"
        "try:\n"
        f"    print(choose_backend({device!r}, number_format='bf16'))\n"
        "except InvalidInput as error:\n"
        "    print(error)"
    )
    assert ("torch" in loaded_modules(program)) <= has_driver()
