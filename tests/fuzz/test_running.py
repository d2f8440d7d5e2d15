"""A fuzzer that finds nothing is believed only if it finds what is there."""

from __future__ import annotations

import pytest

from tests.fuzz.running import run

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("weakness", "what"),
    [
        ("raises", "KeyError"),
        ("allocates", "bytes for an input of"),
        ("exhausts", "MemoryError"),
        ("hangs", "timeout-"),
        ("dies", "the process ended"),
    ],
)
def test_every_kind_of_finding_is_found(weakness: str, what: str) -> None:
    result = run(f"weak-{weakness}", executions=200, seed=1)
    assert len(result.findings) == 1
    assert what in result.findings[0].what
    assert result.findings[0].input.startswith(b"!")


def test_a_refusal_is_no_finding_and_equal_seeds_do_the_same() -> None:
    first, second = (run("weak-refuses", executions=500, seed=3) for _ in range(2))
    assert not first.findings
    assert first.executions == second.executions == 500
    assert first.edges == second.edges > 0


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        run("nonsense", executions=1, seed=1)
