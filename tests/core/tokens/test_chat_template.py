"""Chat templates: what they may do, and how hostile ones end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from core.errors import CorruptWeights, InvalidInput
from core.tokens.chat_template import ChatMessage, ChatTemplate, ChatTemplateLimits
from core.tokens.vocabulary import MAX_CHAT_TEMPLATE_CHARS, Vocabulary

HELLO = [ChatMessage("user", "hello")]
NOON = datetime(2026, 11, 22, 12, 0)
Make = Callable[..., ChatTemplate]


@pytest.fixture
def make() -> Iterator[Make]:
    made = []

    def make_one(template: str, **limits: Any) -> ChatTemplate:
        named = {"bos_token": "<s>"}
        made.append(ChatTemplate(template, named, limits=ChatTemplateLimits(**limits)))
        return made[-1]

    yield make_one
    for template in made:
        template.close()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>hello"),
        ("{% for m in messages %}\n  {{ m['role'] }}\n{% endfor %}", "  user\n"),
        ("{{ strftime_now('%Y-%m-%d') }}", "2026-11-22"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hello"}]'),
        ("{% if tools %}a{% elif add_generation_prompt %}b{% endif %}", "b"),
        ("{% generation %}{{ 1 + 1 }}{% endgeneration %}", "2"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
    ],
)
def test_templates_find_what_hugging_face_offers(make: Make, template: str, text: str) -> None:
    assert make(template).render(HELLO, now=NOON) == text


def test_a_template_can_refuse_messages(make: Make) -> None:
    template = make("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidInput, match="roles must alternate") as caught:
        template.render(HELLO, now=NOON)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "0.5 s"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
        ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
        ("{% for i in range(99999) %}{{ 'twenty characters...' }}{% endfor %}", "longer than"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages[0].__class__.__init__.__globals__ }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError|RuntimeError|TemplateNotFound|no loader"),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ unclosed", "TemplateSyntaxError"),
    ],
)
def test_a_hostile_or_broken_template_is_cut_off(make: Make, template: str, why: str) -> None:
    hostile = make(template, timeout_s=30.0 if why != "0.5 s" else 0.5)
    with pytest.raises(InvalidInput, match=why):
        hostile.render(HELLO, now=NOON)


def test_after_a_cut_off_the_next_rendering_works(make: Make) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = make(
        "{% if messages[0].content == 'hang' %}" + loop + "{% endif %}ok", timeout_s=3.0
    )
    with pytest.raises(InvalidInput, match="no result within 3 s"):
        template.render([ChatMessage("user", "hang")], now=NOON)
    assert template.render(HELLO, now=NOON) == "ok"


def test_long_messages_pass(make: Make) -> None:
    content = "wörter\n" * 300_000
    template = make("{{ messages[0].content }}", timeout_s=30.0)
    assert template.render([ChatMessage("user", content)], now=NOON) == content


def test_a_huge_template_is_refused() -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(CorruptWeights, match="chat template"):
        Vocabulary(
            backend=Tokenizer(models.BPE()), chat_template="x" * (MAX_CHAT_TEMPLATE_CHARS + 1)
        )
