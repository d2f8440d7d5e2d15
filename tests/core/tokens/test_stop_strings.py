"""Stop strings: found across pieces, nothing of them shown, nothing else lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.tokens.stop_strings import StopStrings

SMALL_TEXT = st.text("ab#", max_size=30)
STOPS = st.lists(st.text("ab#", min_size=1, max_size=4), max_size=4)


def shown(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """All text that came out, and whether a stop string ended it."""
    matcher = StopStrings(stops)
    out = []
    for piece in pieces:
        result = matcher.push(piece)
        out.append(result.text)
        if result.stopped:
            return "".join(out), True
    return "".join(out) + matcher.flush(), False


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: the shortest beginning that ends with a stop string, without the longest."""
    for end in range(len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            return text[: end - max(map(len, endings))], True
    return text, False


@given(st.lists(SMALL_TEXT, max_size=8), STOPS)
def test_the_result_follows_the_definition_however_the_text_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    assert shown(pieces, stops) == expected("".join(pieces), stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["STOP"])
    assert matcher.push("go on ST") == ("go on ", False)
    assert matcher.push("ART, ") == ("START, ", False)
    assert matcher.push("S") == ("", False)
    assert matcher.flush() == "S"


def test_without_stop_strings_everything_passes_at_once() -> None:
    matcher = StopStrings([])
    assert matcher.push("anything") == ("anything", False)
    assert matcher.flush() == ""
