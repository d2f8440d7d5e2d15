"""`python -m tests.benchmarks.key_check`: what asking for an API key costs each request.

The check alone, in one process, with the keys in memory as they are after the first request; and
what reading all keys from the store costs after one of them has changed. CPU time of all threads,
which counts the same on a busy machine.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from services.cli.console import out as console
from services.common.data_folder import STORE_NAME
from services.common.keys import ApiKey, KeyText, as_metadata, draw_key, hash_secret
from services.common.store import Store
from services.gateway.access import Access, KeyAccess, OpenAccess
from services.gateway.key_ring import KeyRing
from tests.benchmarks.machine import machine

METHOD = "/penstock.v1.GenerationService/Generate"
# What clients send besides: gRPC's own, and a trace.
METADATA = (("user-agent", "grpc-python/1.81.1"), ("traceparent", f"00-{'1' * 32}-{'2' * 16}-01"))


@dataclass(frozen=True, kw_only=True)
class KeyCheck:
    """Microseconds of CPU a request, median of the rounds, and the slowest round's."""

    open_us: float
    keyed_us: float
    slowest_us: float
    reload_ms: float

    @property
    def cost_us(self) -> float:
        return self.keyed_us - self.open_us


def main(
    requests: Annotated[int, typer.Option(help="Requests of each round.")] = 20_000,
    rounds: Annotated[int, typer.Option(help="How often.")] = 9,
    keys: Annotated[int, typer.Option(help="Keys in the store.")] = 1000,
) -> None:
    """Measures and prints a table."""
    found = asyncio.run(measure(requests=requests, rounds=rounds, num_keys=keys))
    table = Table("what", "cost", title=f"{keys} keys; {machine()['cpu']}", box=None)
    table.add_row("check without keys", f"{found.open_us:.1f} us a request")
    table.add_row("check with keys", f"{found.keyed_us:.1f} us a request")
    table.add_row("slowest round with keys", f"{found.slowest_us:.1f} us a request")
    table.add_row("what keys add", f"{found.cost_us:.1f} us a request")
    table.add_row("reading all keys after a change", f"{found.reload_ms:.0f} ms on a thread")
    console.print(table)


async def measure(*, requests: int, rounds: int, num_keys: int) -> KeyCheck:
    """Checks the last of the keys again and again."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / STORE_NAME)
        for number in range(num_keys):
            text = draw_key()
            store.add_key(_key(text, tenant=f"tenant-{number}"))
        began_at = time.process_time()
        store.all_keys()
        reload_ms = (time.process_time() - began_at) * 1e3
        keyed = KeyAccess(KeyRing(store), salt_secret=store.salt_secret())
        metadata = (*METADATA, *as_metadata(str(text)))
        with_keys = [await _round_us(keyed, metadata, requests) for _ in range(rounds)]
        without = [await _round_us(OpenAccess(), METADATA, requests) for _ in range(rounds)]
        store.close()
    return KeyCheck(
        open_us=statistics.median(without),
        keyed_us=statistics.median(with_keys),
        slowest_us=max(with_keys),
        reload_ms=reload_ms,
    )


def _key(text: KeyText, *, tenant: str) -> ApiKey:
    return ApiKey(
        key_id=text.key_id,
        tenant=tenant,
        secret_hash=hash_secret(text.secret),
        created_at_s=time.time(),
    )


async def _round_us(access: Access, metadata: tuple[tuple[str, str], ...], requests: int) -> float:
    """Microseconds of CPU a request; the store is asked for changes in between, as in service."""
    await access.authorise(METHOD, metadata)
    began_at = time.process_time()
    for _ in range(requests):
        await access.authorise(METHOD, metadata)
    return (time.process_time() - began_at) / requests * 1e6


if __name__ == "__main__":
    typer.run(main)
