"""All fuzz targets, by the name that the command line takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RegisteredTarget:
    """`module` has `make_target() -> FuzzTarget`. It is imported in the fuzzer's process only,
    where the packages in `instrumented` report which of their edges an input reaches.
    """

    module: str
    instrumented: tuple[str, ...]


TARGETS = {
    "gguf": RegisteredTarget(module="tests.fuzz.gguf", instrumented=("core",)),
    "safetensors": RegisteredTarget(module="tests.fuzz.safetensors", instrumented=("core",)),
    "llama2c": RegisteredTarget(module="tests.fuzz.llama2c", instrumented=("core",)),
    "archives": RegisteredTarget(
        module="tests.fuzz.archives", instrumented=("services.local.packages", "zipfile", "tarfile")
    ),
    "frames": RegisteredTarget(module="tests.fuzz.frames", instrumented=("core",)),
    "sealed": RegisteredTarget(module="tests.fuzz.sealed", instrumented=("core",)),
    "tokenizer-json": RegisteredTarget(module="tests.fuzz.tokenizer_json", instrumented=("core",)),
    "chat-template": RegisteredTarget(
        module="tests.fuzz.chat_templates",
        instrumented=("core", "jinja2.sandbox", "jinja2.ext", "jinja2.runtime"),
    ),
}
# They prove that the fuzzer finds what is there.
_WEAK = RegisteredTarget(module="tests.fuzz.weak", instrumented=("tests.fuzz.weak",))


def find(name: str) -> RegisteredTarget:
    """Raises KeyError, listing those that there are."""
    if name.startswith("weak-"):
        return _WEAK
    if name not in TARGETS:
        raise KeyError(f"no fuzz target {name!r}; there are {', '.join(sorted(TARGETS))}")
    return TARGETS[name]
