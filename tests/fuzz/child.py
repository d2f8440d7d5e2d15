"""The process in which a fuzz target runs: `running.py` starts it.

libFuzzer (by atheris) chooses inputs by the edges they reach. Here each is tried, timed, and what
it allocates is counted; a limit on the address space makes an allocation bomb a MemoryError.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import traceback
import tracemalloc
from pathlib import Path
from random import Random

import atheris

from tests.fuzz.registry import find
from tests.fuzz.running import CORPUS
from tests.fuzz.target import FuzzTarget

# Beyond what the process has when all is imported.
_SPARE_ADDRESS_SPACE_BYTES = 1 << 30
_REPORT_EVERY = 1000
# Counting what an input allocates makes it two to five times slower: the first ones are counted,
# the whole corpus among them, and then one in eight. Bombs come in swarms.
_ALWAYS_COUNTED = 1000
_COUNTED_EVERY = 8


class _Trial:
    """Tries inputs one after the other and keeps the account of them."""

    def __init__(self, target: FuzzTarget, *, executions: int, folder: Path) -> None:
        self._target = target
        self._num_wanted = executions
        self._folder = folder
        self._num_tried = 0
        self._slowest_s = 0.0
        self._largest_bytes = 0
        self._findings: dict[str, str] = {}
        self._places: set[str] = set()

    def try_input(self, data: bytes) -> None:
        counts = self._num_tried < _ALWAYS_COUNTED or self._num_tried % _COUNTED_EVERY == 0
        if counts:
            tracemalloc.start()
        started_s = time.perf_counter()
        try:
            self._target.try_input(data)
        except self._target.refusals:
            pass
        except Exception as error:
            self._note_error(error, data)
        self._slowest_s = max(self._slowest_s, time.perf_counter() - started_s)
        if counts:
            self._note_allocation(tracemalloc.get_traced_memory()[1], data)
            tracemalloc.stop()
        self._num_tried += 1
        if self._num_tried == self._num_wanted:
            self._report(is_complete=True)
            os._exit(0)  # libFuzzer cannot be asked to return
        if self._num_tried % _REPORT_EVERY == 0:
            self._report(is_complete=False)

    def _note_error(self, error: Exception, data: bytes) -> None:
        """Keeps one input for each place that raises."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {frame.filename}:{frame.lineno}"
        self._note(place, f"{place}: {error}"[:1000], data)

    def _note_allocation(self, num_bytes: int, data: bytes) -> None:
        self._largest_bytes = max(self._largest_bytes, num_bytes)
        if num_bytes > self._target.max_allocation_bytes(len(data)):
            self._note("allocation", f"{num_bytes} bytes for an input of {len(data)}", data)

    def _note(self, place: str, what: str, data: bytes) -> None:
        if place in self._places:
            return
        self._places.add(place)
        name = f"finding-{len(self._findings)}"
        (self._folder / name).write_bytes(data)
        self._findings[name] = what

    def _report(self, *, is_complete: bool) -> None:
        report = {
            "is_complete": is_complete,
            "executions": self._num_tried,
            "slowest_input_s": self._slowest_s,
            "largest_allocation_bytes": self._largest_bytes,
            "findings": self._findings,
        }
        (self._folder / "report.json").write_text(json.dumps(report))


def _make_target(name: str) -> FuzzTarget:
    """Imports what is under test with its edges counted."""
    registered = find(name)
    with atheris.instrument_imports(include=list(registered.instrumented)):
        module = importlib.import_module(registered.module)
    return module.make_target()


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _SPARE_ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _mutator(target: FuzzTarget):
    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.5:
            return atheris.Mutate(data, max_size)
        return target.mutate(data, random)[:max_size]

    return mutate


def _write_seeds(target: FuzzTarget, folder: Path) -> None:
    folder.mkdir()
    for number, seed in enumerate(target.seeds):
        (folder / f"seed-{number}").write_bytes(seed)


def main() -> None:
    name, executions, seed, folder = sys.argv[1:]
    target = _make_target(name)
    seeds = Path(folder) / "seeds"
    _write_seeds(target, seeds)
    corpora = [str(path) for path in (seeds, CORPUS / name) if path.is_dir()]
    options = [
        f"-seed={seed}",
        f"-timeout={target.timeout_s}",
        f"-max_len={target.max_input_bytes}",
        f"-artifact_prefix={folder}/",
        "-rss_limit_mb=0",  # the address space is limited instead
    ]
    trial = _Trial(target, executions=int(executions), folder=Path(folder))
    _limit_memory()
    atheris.Setup(
        [sys.argv[0], *options, *corpora], trial.try_input, custom_mutator=_mutator(target)
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
