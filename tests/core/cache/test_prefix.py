"""A key stands for everything that a block's content follows from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.cache.prefix import extend_keys, root_key

ROOT = root_key(weights="w", salt="")
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=20)


def keys_of(token_ids: list[int], *, root: bytes = ROOT) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, token_ids, root=root, block_size=4)
    return keys


@given(TOKENS, st.integers(0, 20))
def test_keys_can_be_added_as_tokens_come(token_ids: list[int], num_before: int) -> None:
    keys = keys_of(token_ids[:num_before])
    extend_keys(keys, token_ids, root=ROOT, block_size=4)
    assert keys == keys_of(token_ids)
    assert len(keys) == len(token_ids) // 4


@given(TOKENS, TOKENS)
def test_keys_are_equal_as_far_as_whole_blocks_are(one: list[int], two: list[int]) -> None:
    num_equal = 0
    while num_equal < min(len(one), len(two)) and one[num_equal] == two[num_equal]:
        num_equal += 1
    pairs = zip(keys_of(one), keys_of(two), strict=False)
    assert [a == b for a, b in pairs] == [
        block < num_equal // 4 for block in range(min(len(one), len(two)) // 4)
    ]


def test_another_salt_or_other_weights_change_every_key() -> None:
    roots = [
        root_key(weights=weights, salt=salt)
        for weights, salt in (("w", ""), ("w", "s"), ("s", "w"), ("ws", ""), ("", "ws"))
    ]
    keys = [key for root in roots for key in keys_of(list(range(12)), root=root)]
    assert len(set(keys)) == len(keys) == 15
    assert {len(key) for key in keys} == {16}
