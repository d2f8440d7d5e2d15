"""Runs one fuzz target in a process of its own and reports what came of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.registry import find

CORPUS = Path(__file__).parent / "corpus"
_ROOT = Path(__file__).parents[2]
_EDGES = re.compile(r"\bcov: (\d+)")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """An input that was neither accepted nor refused as it should be, and what happened."""

    what: str
    input: bytes


@dataclass(frozen=True, kw_only=True)
class FuzzResult:
    """`largest_allocation_bytes` and `slowest_input_s` are those of one input; `edges` are the
    branches of the instrumented packages that were reached."""

    target: str
    executions: int
    seconds: float
    findings: tuple[Finding, ...]
    slowest_input_s: float
    largest_allocation_bytes: int
    edges: int


def run(target: str, *, executions: int, seed: int) -> FuzzResult:
    """Replays the target's corpus, then tries mutations, `executions` inputs in all.

    Equal seeds try equal inputs. It ends early where the process dies, which is a finding too.
    """
    with tempfile.TemporaryDirectory(prefix="penstock-fuzz-") as folder:
        started_s = time.monotonic()
        log = _run_child(target, executions=executions, seed=seed, folder=Path(folder))
        seconds = time.monotonic() - started_s
        edges = [int(number) for number in _EDGES.findall(log)]
        report = _read_report(Path(folder))
        return FuzzResult(
            target=target,
            executions=report.get("executions", 0),
            seconds=seconds,
            findings=_findings(Path(folder), report, log),
            slowest_input_s=report.get("slowest_input_s", 0.0),
            largest_allocation_bytes=report.get("largest_allocation_bytes", 0),
            edges=max(edges, default=0),
        )


def _run_child(target: str, *, executions: int, seed: int, folder: Path) -> str:
    """Returns what libFuzzer wrote."""
    find(target)
    command = [sys.executable, "-m", "tests.fuzz.child", target, str(executions), str(seed), folder]
    search_path = os.pathsep.join([str(_ROOT), str(_ROOT / "protos" / "generated")])
    environment = os.environ | {
        "PYTHONPATH": search_path,
        "TMPDIR": str(folder),
        # Pools of threads would take address space, and that is limited.
        "OPENBLAS_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        command, cwd=_ROOT, env=environment, capture_output=True, text=True, errors="replace"
    )
    return ended.stdout + ended.stderr


def _read_report(folder: Path) -> dict:
    """What the child wrote last; nothing where it died before it could."""
    path = folder / "report.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _findings(folder: Path, report: dict, log: str) -> tuple[Finding, ...]:
    findings = [
        Finding(what=what, input=(folder / name).read_bytes())
        for name, what in report.get("findings", {}).items()
    ]
    # libFuzzer's own: crash-HASH, timeout-HASH, oom-HASH.
    findings += [
        Finding(what=f"the process ended ({path.name}):\n{_end_of(log)}", input=path.read_bytes())
        for pattern in ("crash-*", "timeout-*", "oom-*")
        for path in sorted(folder.glob(pattern))
    ]
    if not findings and not report.get("is_complete"):
        findings.append(Finding(what=f"the process ended early:\n{_end_of(log)}", input=b""))
    return tuple(findings)


def _end_of(log: str) -> str:
    return log[-3000:]
