"""What is measured: something that serves the generation API, and can be looked into."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.local.identities import authority_of
from services.local.run_folder import ProcessRecord
from tests.support.local_mesh import LocalMesh


@dataclass(frozen=True, kw_only=True)
class System:
    """A running system. `start_s` is None, and `processes` empty, where it was not started here."""

    name: str
    address: str
    start_s: float | None = None
    processes: Sequence[ProcessRecord] = ()
    ca: Path | None = None  # of its authority, where it takes TLS alone


@contextmanager
def started_mesh(options: Sequence[str]) -> Iterator[System]:
    """A local mesh of its own, ended on the way out."""
    with tempfile.TemporaryDirectory() as folder:
        mesh = LocalMesh(runtime=Path(folder), environment={})
        try:
            start_s = mesh.start_timed(*options)
            record = mesh.record
            yield System(
                name="penstock",
                address=record.gateway,
                start_s=start_s,
                processes=record.processes[1:],
                ca=authority_of(record.certs),
            )
        finally:
            mesh.stop()
