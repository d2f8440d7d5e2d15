"""A chat template is a program out of a model file (CVE-2026-5760: SGLang ran it unconfined)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from core.errors import InvalidInput
from core.tokens.chat_template import ChatMessage, ChatTemplate

NOON = datetime(2026, 11, 25, 12, 0)
ROOT_CLASS = "''.__class__.__mro__[1]"
ESCAPES = [
    "{{ lipsum.__globals__['os'].popen(COMMAND).read() }}",
    "{{ cycler.__init__.__globals__.os.popen(COMMAND).read() }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').popen(COMMAND).read() }}",
    "{{ raise_exception.__globals__['sys'].modules['os'].system(COMMAND) }}",
    "{{ strftime_now.__self__.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__()[0:] | map(attribute='__init__') | list }}",
    f"{{% for c in {ROOT_CLASS}.__subclasses__() %}}{{% if c.__name__ == 'Popen' %}}"
    "{{ c(COMMAND, shell=True) }}{% endif %}{% endfor %}",
    f"{{{{ {ROOT_CLASS} | attr('__subclasses__') }}}}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f')|attr('mro')() }}",
    "{{ '%s'.format.__globals__ }}{{ ('{0.__class__.__init__.__globals__}').format(messages) }}",
    "{% set x = messages.append({'role': 'system'}) %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system(COMMAND) }}",
]


@pytest.fixture
def render() -> Iterator[Callable[[str], str]]:
    made: list[ChatTemplate] = []

    def render_one(template: str) -> str:
        made.append(ChatTemplate(template, {}))
        return made[-1].render([ChatMessage("user", "hello")], now=NOON)

    yield render_one
    for template in made:
        template.close()


@pytest.mark.parametrize("escape", ESCAPES, ids=range(len(ESCAPES)))
def test_cve_2026_5760_no_template_gets_out_of_its_sandbox(
    render: Callable[[str], str], tmp_path: Path, escape: str
) -> None:
    marker = tmp_path / "owned"
    try:
        text = render(escape.replace("COMMAND", f"'touch {marker}'"))
    except InvalidInput:
        text = ""
    assert not marker.exists()
    assert not any(word in text for word in ("root:", "<class", "__globals__", "module"))


def test_cve_2026_5760_what_a_client_writes_is_no_template(render: Callable[[str], str]) -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    try:
        text = template.render([ChatMessage("user", "{{ 7 * 7 }}{% raw %}")], now=NOON)
    finally:
        template.close()
    assert text == "{{ 7 * 7 }}{% raw %}"
