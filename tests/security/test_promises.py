"""SECURITY.md promises what is tried, and nothing else; what is tried exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.registry import TARGETS
from tests.fuzz.rpc.guarded import CALLERS
from tests.fuzz.rpc.methods import METHODS
from tests.security.promises import NOT_PROMISED, PROMISES, Promise
from tests.security.trying import Effort, Step, Tried, steps

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text()
ALL = (*PROMISES, NOT_PROMISED)
by_words = pytest.mark.parametrize("promise", ALL, ids=lambda promise: promise.says[:40])


@by_words
def test_whoever_tries_a_promise_exists(promise: Promise) -> None:
    assert promise.tests or promise.parsers or promise.rpcs or promise.callers
    for test in promise.tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file()
        assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text()
    assert set(promise.parsers) <= TARGETS.keys()
    assert set(promise.callers) <= CALLERS.keys()
    assert set(promise.rpcs) <= {method.server for method in METHODS.values()}


@by_words
def test_the_page_names_each_promise_and_who_tries_it(promise: Promise) -> None:
    assert promise.says in PAGE
    for test in promise.tests:
        assert f"`{test}`" in PAGE
    for target in promise.parsers:
        assert f"`fuzz {target}`" in PAGE
    for server in promise.rpcs:
        assert f"`{server}`" in PAGE
    for who in promise.callers:
        assert f"`fuzz as {who}`" in PAGE


def test_every_fuzz_target_is_behind_some_promise() -> None:
    assert {target for promise in ALL for target in promise.parsers} == TARGETS.keys()
    assert {who for promise in ALL for who in promise.callers} == CALLERS.keys()
    assert {server for promise in ALL for server in promise.rpcs} == {
        method.server for method in METHODS.values()
    }


def test_a_test_that_fails_has_slipped_through(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert False\n"
        "def test_c(): pytest.skip('today')\n"
    )
    promise = Promise(says="x", tests=(str(test),))
    effort = Effort(rpc_executions=1, parser_executions=1, seed=1)
    with steps([promise], effort) as all_steps:
        (row,) = [step.run(lambda count: None) for step in all_steps]
    assert (row.num_tried, row.num_refused, row.slipped) == (3, 1, ("test_b", "test_c"))


def test_what_cannot_be_tried_has_slipped_through() -> None:
    def fail(_: object) -> Tried:
        raise TimeoutError("the stage is gone")

    row = Step(promise="x", name="fuzz it", attempt=fail).run(lambda count: None)
    assert (row.num_refused, row.slipped) == (0, ("TimeoutError: the stage is gone",))
