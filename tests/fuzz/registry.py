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
    "frames": RegisteredTarget(module="tests.fuzz.frames", instrumented=("core",)),
    "tokenizer-json": RegisteredTarget(module="tests.fuzz.tokenizer_json", instrumented=("core",)),
    "chat-template": RegisteredTarget(
        module="tests.fuzz.chat_templates", instrumented=("core", "jinja2")
    ),
}
