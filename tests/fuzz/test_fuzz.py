"""Every target for a while: what was found before, and as much that is new as CI has time for.

`python -m tests.fuzz --executions 100000` is the same for longer.
"""

from __future__ import annotations

import pytest

from tests.fuzz.registry import TARGETS
from tests.fuzz.running import CORPUS, run

# About two seconds each on a core of its own, besides the second that a process takes to start.
EXECUTIONS = {
    "archives": 1500,
    "chat-template": 500,
    "frames": 10_000,
    "gguf": 2000,
    "llama2c": 1000,
    "safetensors": 1000,
    "sealed": 3000,
    "tokenizer-json": 1500,
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", sorted(EXECUTIONS))
def test_nothing_is_found(target: str) -> None:
    result = run(target, executions=EXECUTIONS[target], seed=1)
    assert not result.findings
    assert result.executions == EXECUTIONS[target]
    assert result.edges > 0


def test_every_target_of_bytes_is_run() -> None:
    assert set(EXECUTIONS) <= set(TARGETS)
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)
