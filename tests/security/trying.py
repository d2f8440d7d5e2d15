"""Tries promises: runs their tests and fuzzers, and counts what came of it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.rpc.methods import METHODS
from tests.fuzz.rpc.servers import Servers, serving
from tests.fuzz.rpc.trial import fuzz_rpc
from tests.fuzz.running import FuzzResult, run
from tests.security.promises import Promise

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One row of the table. What was tried and did not slip through was refused."""

    promise: str
    test: str
    num_tried: int
    slipped: tuple[str, ...]

    @property
    def num_refused(self) -> int:
        return max(0, self.num_tried - len(self.slipped))


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard is tried."""

    rpc_executions: int
    parser_executions: int
    seed: int


Step = tuple[str, Callable[[], Tried]]


@contextmanager
def steps(promises: Sequence[Promise], effort: Effort) -> Iterator[list[Step]]:
    """What there is to do, by name, one step a row; servers run meanwhile where any are needed."""
    with tempfile.TemporaryDirectory(prefix="penstock-security-") as folder:
        if not any(promise.rpcs for promise in promises):
            yield [step for promise in promises for step in _steps(promise, effort, None)]
            return
        with serving(Path(folder)) as servers:
            yield [step for promise in promises for step in _steps(promise, effort, servers)]


def _steps(promise: Promise, effort: Effort, servers: Servers | None) -> Iterator[Step]:
    for test in promise.tests:
        yield test, lambda test=test: _try_test(promise, test)
    for parser in promise.parsers:
        yield f"fuzz {parser}", lambda parser=parser: _try_parser(promise, parser, effort)
    for method in METHODS.values():
        if method.server in promise.rpcs:
            name = method.name
            yield f"fuzz {name}", lambda name=name: _try_rpc(promise, name, effort, servers)


def _try_parser(promise: Promise, target: str, effort: Effort) -> Tried:
    return _tried(promise, run(target, executions=effort.parser_executions, seed=effort.seed))


def _try_rpc(promise: Promise, name: str, effort: Effort, servers: Servers | None) -> Tried:
    assert servers is not None
    result = fuzz_rpc(servers, name, executions=effort.rpc_executions, seed=effort.seed)
    return _tried(promise, result)


def _tried(promise: Promise, result: FuzzResult) -> Tried:
    return Tried(
        promise=promise.says,
        test=f"fuzz {result.target}",
        num_tried=result.executions,
        slipped=tuple(finding.what for finding in result.findings),
    )


def _try_test(promise: Promise, test: str) -> Tried:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, f"--junitxml={report}", test],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    failed = [case.get("name", "") for case in cases if not _has_passed(case)]
    if done.returncode and not failed:
        failed = [f"pytest ended with {done.returncode}: {done.stdout[-300:]}"]
    return Tried(promise=promise.says, test=test, num_tried=len(cases), slipped=tuple(failed))


def _has_passed(case: ET.Element) -> bool:
    """One that was skipped has tried nothing."""
    return not any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
