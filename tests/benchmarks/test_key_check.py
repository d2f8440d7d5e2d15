"""The benchmark of the key check measures what it says."""

from __future__ import annotations

from tests.benchmarks.key_check import measure


async def test_both_ways_are_measured() -> None:
    found = await measure(requests=50, rounds=3, num_keys=3)
    assert found.open_us > 0
    assert found.slowest_us >= found.keyed_us > 0
    assert found.reload_ms > 0
