"""Chat templates: programs out of model files, in the sandbox that renders them.

The process around the sandbox is `core/tokens/chat_template.py`'s, which ends what is late; here
a template that loops is stopped by a timer instead, so that 100,000 of them can be tried. Whatever
a template raises is an answer; that it reaches files, processes or the network is a finding.
"""

from __future__ import annotations

import signal
import sys
from random import Random
from typing import Any

from core.tokens.chat_template_child import compile_template
from tests.fuzz.target import FuzzTarget
from tests.support.tiny_tokenizer import CHAT_TEMPLATE

_LIMIT_S = 0.05  # of its own time
_MAX_CHARS = 1 << 20
_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello {{ 7 * 7 }} <|end|>"},
]
# What code outside of the sandbox would do first.
_FORBIDDEN = ("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pty.", "open", "exec.")
_PIECES = (
    "messages",
    "message",
    "messages[0]",
    "loop.index0",
    "bos_token",
    "add_generation_prompt",
    "''",
    "'a' * 9999",
    "range(9999)",
    "namespace(x=1)",
    "cycler(1, 2)",
    "joiner()",
    "lipsum",
    "dict(a=1)",
    "strftime_now('%Y')",
    "raise_exception('no')",
    "'%s %d' % ('a', 1)",
    "'{0.__class__.__mro__}'.format(messages)",
    "self",
    "self.__init__.__globals__",
    "messages.__class__.__base__.__subclasses__()",
    "messages.append(1)",
    "messages[0].update(a=1)",
    "cycler.__init__.__globals__.os.popen('id').read()",
    "''['format_map']",
    "messages|map(attribute='__class__')|list",
    "messages|attr('__class__')",
    "messages|tojson(indent=2)",
    "'\\ud800'",
    "messages|length",
    "messages|sort(attribute='role')",
    "message.content|trim",
)
_BLOCKS = (
    "{{{{ {0} }}}}",
    "{{% for x in {0} %}}{{{{ x }}}}{{% endfor %}}",
    "{{% if {0} %}}a{{% elif {1} %}}b{{% endif %}}",
    "{{% set x = {0} %}}{{{{ x }}}}",
    "{{% macro m(a={0}) %}}{{{{ a }}}}{{{{ m({1}) }}}}{{% endmacro %}}{{{{ m() }}}}",
    "{{% for a in {0} %}}{{% for b in {1} %}}{{{{ a }}}}{{% endfor %}}{{% endfor %}}",
    "{{% generation %}}{{{{ {0} }}}}{{% endgeneration %}}",
    "{{% include {0} %}}",
    "{{% import {0} as m %}}",
    "{{% call {0} %}}{{% endcall %}}",
    "{{% filter upper %}}{{{{ {0} }}}}{{% endfilter %}}",
    "{{% block b %}}{{{{ {0} }}}}{{{{ self.b() }}}}{{% endblock %}}",
)


class _TooLate(Exception):
    """The template was stopped."""


class _Escaped(BaseException):
    """The template did what no template may; no handler inside it can hide that."""


_rendering = False


def make_target() -> FuzzTarget:
    sys.addaudithook(_watch)
    signal.signal(signal.SIGVTALRM, _stop)
    seeds = [CHAT_TEMPLATE, *(block.format(*_PIECES[:2]) for block in _BLOCKS)]
    return FuzzTarget(
        try_input=_render,
        refusals=(Exception,),  # the child answers all of them with "failed"
        seeds=[seed.encode() for seed in seeds],
        mutate=_mutate,
        # What holds in the child is its limit of 1 GiB for everything.
        max_allocation_bytes=lambda size: 1 << 30,
        max_input_bytes=4096,
    )


def _render(data: bytes) -> None:
    template = data.decode(errors="replace")
    if "**" in template:  # a power of powers is one instruction: only the parent can end it
        return
    global _rendering
    _rendering = True
    signal.setitimer(signal.ITIMER_VIRTUAL, _LIMIT_S)
    try:
        render = compile_template(template, {"bos_token": "<s>"})
        render(_MESSAGES, "2026-01-02T03:04:05", _MAX_CHARS)
    finally:
        _rendering = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _stop(number: int, frame: Any) -> None:
    if _rendering:
        raise _TooLate


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _rendering and event.startswith(_FORBIDDEN) and not _is_import(event, arguments):
        raise _Escaped(f"{event} {arguments!r}"[:300])


def _is_import(event: str, arguments: tuple[Any, ...]) -> bool:
    """jinja imports some modules, and Python some codecs, when they are first needed."""
    return event == "os.listdir" or (
        event == "open" and str(arguments[0]).endswith((".py", ".pyc"))
    )


def _mutate(data: bytes, random: Random) -> bytes:
    """Puts another block or expression somewhere, or takes one from the template itself."""
    text = data.decode(errors="replace")
    if random.random() < 0.3:
        text = text.replace(random.choice(_PIECES), random.choice(_PIECES), 1)
    block = random.choice(_BLOCKS).format(random.choice(_PIECES), random.choice(_PIECES))
    place = random.randrange(len(text) + 1)
    kept = place if random.random() < 0.7 else random.randrange(len(text) + 1)
    return (text[:place] + block + text[kept:]).encode()
