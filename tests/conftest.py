"""What holds for every test: the order of the rooms, and that nothing is skipped unnoticed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from tests.support.allowed_skips import read_allowed, unexpected

# uvloop forks what tests start with what gRPC has registered for that, which crashes in the child
# now and then. Meshes are started by processes on asyncio's own loop, which does not.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

ROOT = Path(__file__).parent
# Cheap tests fail first: what starts processes or loads real models comes last.
LAST_ROOMS = ("services", "numerics", "benchmarks", "end_to_end", "chaos")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _room_order(item.path))


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The event loop that services run on."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names the skips that would fail a run under CI."""
    if reasons := _unexpected_skips(terminalreporter):
        terminalreporter.section("skips that tests/allowed_skips.txt does not allow")
        for reason in reasons:
            terminalreporter.write_line(reason)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if _unexpected_skips(reporter) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _unexpected_skips(reporter: pytest.TerminalReporter | None) -> list[str]:
    if reporter is None or os.environ.get("CI") != "true":
        return []
    allowed = read_allowed(ROOT / "allowed_skips.txt")
    return unexpected(reporter.stats.get("skipped", []), allowed)


def _room_order(path: Path) -> int:
    room = path.relative_to(ROOT).parts[0] if path.is_relative_to(ROOT) else ""
    return LAST_ROOMS.index(room) + 1 if room in LAST_ROOMS else 0
