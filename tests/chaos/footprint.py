"""What the processes of a mesh hold: memory, threads, file descriptors."""

from __future__ import annotations

from dataclasses import dataclass

from tests.chaos.mesh import ChaosMesh

# What an idle process may hold more than at its first rest: caches of allocators and of gRPC.
MORE_MEMORY_SHARE, MORE_MEMORY_BYTES = 0.2, 48 * 2**20
MORE_THREADS, MORE_DESCRIPTORS = 8, 16


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One process at rest."""

    memory_bytes: int
    threads: int
    descriptors: int

    def excess_over(self, baseline: Footprint) -> list[str]:
        """What has grown beyond the tolerance, for people."""
        allowed = baseline.memory_bytes * (1 + MORE_MEMORY_SHARE) + MORE_MEMORY_BYTES
        found = []
        if self.memory_bytes > allowed:
            mib = [size // 2**20 for size in (baseline.memory_bytes, self.memory_bytes)]
            found.append(f"memory {mib[0]} to {mib[1]} MiB")
        if self.threads > baseline.threads + MORE_THREADS:
            found.append(f"threads {baseline.threads} to {self.threads}")
        if self.descriptors > baseline.descriptors + MORE_DESCRIPTORS:
            found.append(f"descriptors {baseline.descriptors} to {self.descriptors}")
        return found


def footprints(mesh: ChaosMesh) -> dict[str, Footprint]:
    """Of every part."""
    return {name: _footprint(mesh, name) for name in mesh.parts}


def excesses(mesh: ChaosMesh, baselines: dict[str, Footprint]) -> list[str]:
    """What every part holds too much of, against its baseline; one that came later has that of the
    largest of its kind."""
    largest: dict[str, Footprint] = {}
    for name, one in sorted(baselines.items(), key=lambda item: item[1].memory_bytes):
        largest[_kind(name)] = one
    return [
        f"{name}: {what}"
        for name, now in footprints(mesh).items()
        for what in now.excess_over(baselines.get(name, largest[_kind(name)]))
    ]


def _kind(name: str) -> str:
    return name.split("-")[0]


def _footprint(mesh: ChaosMesh, name: str) -> Footprint:
    process = mesh.parts[name].usage()
    with process.oneshot():
        return Footprint(
            memory_bytes=process.memory_info().rss,
            threads=process.num_threads(),
            descriptors=process.num_fds(),
        )
