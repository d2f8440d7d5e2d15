"""What a process says in its log."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from services.common.logs import configure_logging


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """A stream that takes all logs for the time of a test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("stage 0:2", stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("numba").setLevel(logging.NOTSET)


def test_what_numba_does_on_a_gpu_is_no_news(log: io.StringIO) -> None:
    logging.getLogger("numba.cuda.cudadrv.driver").info("add pending dealloc: module_unload")
    logging.getLogger("services.stage").info("stage ready")
    [line] = log.getvalue().splitlines()
    assert "stage ready" in line


def test_warnings_of_numba_are_told(log: io.StringIO) -> None:
    logging.getLogger("numba.cuda.cudadrv.driver").warning("out of memory")
    assert "out of memory" in log.getvalue()
