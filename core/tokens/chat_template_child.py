"""Renders one chat template for the process that started it; run as a script.

A template is a program out of a model file. It runs here, in a process of its
own that has no files, no environment and bounded memory, so that a hostile one
can neither hang nor exhaust the gateway: the parent ends this process when an
answer is late. Inside, jinja's immutable sandbox keeps it from Python's insides.

Protocol, one JSON object a line. First from the parent: {"template", "named_tokens"}.
Then for each rendering {"messages", "now", "max_chars"}, answered by {"text"}, by
{"refused": why} (the template called raise_exception) or by {"failed": why}.

The names offered to templates are those of Hugging Face's chat templates. This
file imports nothing of ours: it is started by its path.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 1 << 30
# The parent's limit is on time; this one holds if the parent is gone.
MAX_CPU_S = 30
_MAX_OPEN_FILES = 16


class Refused(Exception):
    """The template called raise_exception."""


class GenerationBlock(Extension):
    """{% generation %} marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares an instance variable)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(template: str, named_tokens: dict[str, str]) -> Callable[..., str]:
    """Returns render(messages, now, max_chars); raises jinja2.TemplateError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    compiled = environment.from_string(template)

    def render(messages: list[dict[str, str]], now: str, max_chars: int) -> str:
        pieces, size = [], 0
        for piece in compiled.generate(
            **named_tokens,
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            strftime_now=datetime.fromisoformat(now).strftime,
        ):
            size += len(piece)
            if size > max_chars:
                raise OverflowError(f"its output is longer than {max_chars} characters")
            pieces.append(piece)
        text = "".join(pieces)
        text.encode()  # raises where a literal was half of a surrogate pair
        return text

    return render


def _refuse(message: object) -> NoReturn:
    raise Refused(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _answer(render: Callable[..., str], line: str) -> dict[str, str]:
    try:
        return {"text": render(**json.loads(line))}
    except Refused as error:
        return {"refused": str(error)[:500]}
    except Exception as error:  # whatever a program of unknown origin can raise
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def _limit_cpu() -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent_s = int(usage.ru_utime + usage.ru_stime)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (spent_s + MAX_CPU_S, hard))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_OPEN_FILES, _MAX_OPEN_FILES))
    _limit_cpu()
    render: Callable[..., str] | None = None
    reason = ""
    try:
        render = compile_template(**json.loads(sys.stdin.readline()))
    except Exception as error:  # likewise: compiling evaluates constants
        reason = f"{type(error).__name__}: {error}"[:500]
    for line in sys.stdin:
        _limit_cpu()
        answer = {"failed": reason} if render is None else _answer(render, line)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
