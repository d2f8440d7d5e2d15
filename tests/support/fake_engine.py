"""A stage's engine that computes a checkable function instead of a model.

Its KV cache holds token ids. The next token is a function of the whole prefix, read back from
the blocks that the coordinator named, so that a wrong block, position or order changes the
answer. It refuses every order that a real engine would refuse, by AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

VOCAB_SIZE = 1000
EOS = 0


def next_token(prefix: Sequence[int]) -> int:
    """The fake model; it never says EOS."""
    return 1 + crc32(bytes(str(list(prefix)), "ascii")) % (VOCAB_SIZE - 1)


def repeated_token(prefix: Sequence[int]) -> int:
    """A fake model whose text soon repeats itself, though not for long."""
    return 1 + crc32(bytes(str(list(prefix[-2:])), "ascii") + bytes([len(prefix) // 9])) % 3


def completion(
    prompt: Sequence[int],
    num_tokens: int,
    next_token: Callable[[Sequence[int]], int] = next_token,
) -> list[int]:
    """What a pipeline must generate."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeEngine:
    """Mirrors sequences and KV blocks of one stage."""

    def __init__(
        self,
        *,
        num_kv_blocks: int,
        is_last: bool,
        block_size: int = 16,
        next_token: Callable[[Sequence[int]], int] = next_token,
    ) -> None:
        self.num_kv_blocks = num_kv_blocks
        self.is_last = is_last
        self.block_size = block_size
        self.next_token = next_token
        self.tables: dict[int, list[int]] = {}
        # Where each slot's next run may begin: at the earliest, and at the latest.
        self._spans: dict[int, tuple[int, int]] = {}
        self._kv: dict[tuple[int, int], int] = {}

    def apply(self, updates: Any) -> None:
        """Takes SequenceUpdates, of the contract or of core: their fields have equal names."""
        for slot in updates.ended_slots:
            assert slot in self.tables, f"slot {slot} ended twice"
            del self.tables[slot]
        for start in updates.starts:
            assert start.slot not in self.tables, f"slot {start.slot} started twice"
            assert start.num_cached_positions % self.block_size == 0, "a part of a block is cached"
            self.tables[start.slot] = []
            self._spans[start.slot] = (start.num_cached_positions, start.num_cached_positions)
        held = {block for table in self.tables.values() for block in table}
        for slot, block in zip(updates.block_slots, updates.block_ids, strict=True):
            table = self.tables[slot]
            is_cached = len(table) * self.block_size < self._spans[slot][0]
            assert is_cached or block not in held, f"block {block} is held twice"
            assert block not in table, f"block {block} is twice in a sequence"
            assert 0 <= block < self.num_kv_blocks, f"block {block} does not exist"
            held.add(block)
            table.append(block)
        for slot, position in zip(updates.rewind_slots, updates.rewind_positions, strict=True):
            least, most = self._spans[slot]
            self._spans[slot] = (min(least, position), min(most, position))
        for start in updates.starts:
            covered = len(self.tables[start.slot]) * self.block_size
            assert start.num_cached_positions <= covered, "cached positions without a block"

    def run(
        self,
        slots: Sequence[int],
        first_positions: Sequence[int],
        num_rows: Sequence[int],
        num_samples: Sequence[int],
        token_ids: Sequence[int],
    ) -> list[int]:
        """Computes the runs of a micro-batch; returns a token for each sampled row."""
        assert len(set(slots)) == len(slots), "two runs of one sequence"
        sampled, row = [], 0
        for slot, first, count, num_sampled in zip(
            slots, first_positions, num_rows, num_samples, strict=True
        ):
            table = self.tables[slot]
            assert count >= 1, "a run without rows"
            assert first + count <= len(table) * self.block_size, "no block for a row"
            for position in range(first, first + count):
                self._kv[self._place(table, position)] = token_ids[row]
                row += 1
            assert 0 <= num_sampled <= count, "more samples than rows"
            least, most = self._spans[slot]
            assert least <= first <= most, "a run neither goes on nor goes back behind a guess"
            end = first + count
            self._spans[slot] = (end - max(num_sampled - 1, 0), end)
            prefix = [self._kv[self._place(table, p)] for p in range(end)]
            sampled += [self.next_token(prefix[:e]) for e in range(end - num_sampled + 1, end + 1)]
        assert row == len(token_ids), "rows and token ids differ in number"
        return sampled

    def prefix(self, slot: int, end: int) -> list[int]:
        """What the cache holds of a sequence up to a position."""
        table = self.tables[slot]
        assert end <= self._spans[slot][1], "rows that were not computed"
        return [self._kv[self._place(table, position)] for position in range(end)]

    def _place(self, table: list[int], position: int) -> tuple[int, int]:
        return table[position // self.block_size], position % self.block_size
