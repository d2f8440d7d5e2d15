"""Tries promises: runs their tests and fuzzers, and counts what came of it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.fuzz.rpc.guarded import CALLERS, GuardedServers, guarded
from tests.fuzz.rpc.methods import METHODS
from tests.fuzz.rpc.servers import Servers, serving
from tests.fuzz.rpc.trial import fuzz_rpc
from tests.fuzz.running import FuzzResult, run
from tests.security.promises import Promise

ROOT = Path(__file__).parents[2]
# What they send is no other than what is sent without certificates and keys.
CALLER_SHARE = 10


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

    @property
    def caller_executions(self) -> int:
        """For each RPC of each of those who call a mesh with certificates and keys."""
        return max(1, self.rpc_executions // CALLER_SHARE)


# Hears of how many more have been tried.
Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What makes one row; `size` is how much it tries, where that is known before."""

    promise: str
    name: str
    attempt: Callable[[Advance], Tried]
    size: int | None = None

    def run(self, advance: Advance) -> Tried:
        """What cannot even be tried has slipped through, and the other steps go on."""
        try:
            return self.attempt(advance)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"[:600]
            return Tried(promise=self.promise, test=self.name, num_tried=1, slipped=(what,))


@contextmanager
def steps(promises: Sequence[Promise], effort: Effort) -> Iterator[list[Step]]:
    """What there is to do, one step a row; servers run meanwhile where any are needed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-security-")))
        servers = guards = None
        if any(promise.rpcs for promise in promises):
            servers = stack.enter_context(serving(_made(folder / "open")))
        if any(promise.callers for promise in promises):
            guards = stack.enter_context(guarded(_made(folder / "guarded")))
        yield [step for promise in promises for step in _steps(promise, effort, servers, guards)]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _steps(
    promise: Promise, effort: Effort, servers: Servers | None, guards: GuardedServers | None
) -> Iterator[Step]:
    def step(name: str, attempt: Callable[[Advance], Tried], *, size: int | None = None) -> Step:
        return Step(promise=promise.says, name=name, attempt=attempt, size=size)

    for test in promise.tests:
        yield step(test, lambda _, test=test: _try_test(promise, test))
    for parser in promise.parsers:
        yield step(f"fuzz {parser}", lambda _, it=parser: _try_parser(promise, it, effort))
    for name, method in METHODS.items():
        if method.server in promise.rpcs:
            attempt = partial(_try_rpc, promise, name, effort, servers)
            yield step(f"fuzz {name}", attempt, size=effort.rpc_executions)
    for who in promise.callers:
        attempt = partial(_try_caller, promise, who, effort, guards)
        size = len(CALLERS[who].methods) * effort.caller_executions
        yield step(f"fuzz as {who}", attempt, size=size)


def _try_parser(promise: Promise, target: str, effort: Effort) -> Tried:
    return _tried(promise, run(target, executions=effort.parser_executions, seed=effort.seed))


def _try_rpc(
    promise: Promise, name: str, effort: Effort, servers: Servers | None, advance: Advance
) -> Tried:
    assert servers is not None
    how = {"executions": effort.rpc_executions, "seed": effort.seed}
    return _tried(promise, fuzz_rpc(servers, name, **how, on_progress=advance))


def _try_caller(
    promise: Promise, who: str, effort: Effort, guards: GuardedServers | None, advance: Advance
) -> Tried:
    """One row for all RPCs that they call."""
    assert guards is not None
    guards.caller = CALLERS[who]
    how = {"executions": effort.caller_executions, "seed": effort.seed}
    results = [fuzz_rpc(guards, name, **how, on_progress=advance) for name in guards.caller.methods]
    return Tried(
        promise=promise.says,
        test=f"fuzz as {who}",
        num_tried=sum(result.executions for result in results),
        slipped=tuple(
            f"{result.target}: {finding.what}" for result in results for finding in result.findings
        ),
    )


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
