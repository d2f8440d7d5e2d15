"""All fuzz targets, by the name that the command line takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RegisteredTarget:
    """`module` has `make_target() -> FuzzTarget`. It is imported in the fuzzer's process only, where
    the packages in `instrumented` report which of their edges an input reaches.
    """

    module: str
    instrumented: tuple[str, ...]


TARGETS = {
    "gguf": RegisteredTarget(module="tests.fuzz.gguf", instrumented=("core",)),
}
