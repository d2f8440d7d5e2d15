"""How the running mesh is shown: a line, and a table of its replicas."""

from __future__ import annotations

from penstock.v1 import coordinator_pb2 as pb
from rich.table import Table

from services.cli import console
from services.local.coordinators import Serving
from services.local.layout import replica_name
from services.local.run_folder import MeshRecord


def headline(record: MeshRecord, serving: Serving) -> str:
    """What serves, and how it goes on the whole."""
    mesh = serving.mesh
    uptime_s = int(mesh.uptime.ToTimedelta().total_seconds())
    return (
        f"{record.model} ({record.number_format}, {record.wire} on the wire), "
        f"cut into {mesh.split or 'nothing yet'}, "
        f"at {record.gateway}, up {uptime_s} s: "
        f"{mesh.requests_running} requests running, {mesh.requests_waiting} waiting, "
        f"{mesh.tokens_per_second:.0f} tokens/s, "
        f"{mesh.cached_tokens / max(mesh.prompt_tokens, 1):.0%} of {mesh.prompt_tokens} prompt "
        f"tokens cached{_guesses(mesh)}{_moves(mesh)}{_coordinator(record, serving)}"
    )


def _guesses(mesh: pb.GetMeshResponse) -> str:
    if not mesh.tokens_guessed:
        return ""
    share = mesh.tokens_guessed_right / mesh.tokens_guessed
    return f", {mesh.tokens_guessed} tokens guessed, {share:.0%} right"


def _moves(mesh: pb.GetMeshResponse) -> str:
    if not mesh.sequences_moved:
        return ""
    return (
        f", {mesh.sequences_moved} times a sequence moved to another path, "
        f"{mesh.positions_restored} positions restored"
    )


def _coordinator(record: MeshRecord, serving: Serving) -> str:
    if len(record.coordinators) == 1:
        return ""
    names = {process.address: process.name for process in record.processes}
    return f", {names[serving.address]} serves (of {len(record.coordinators)})"


def status_table(record: MeshRecord, mesh: pb.GetMeshResponse) -> Table:
    """One row a replica."""
    columns = ("process", "layers", "address", "health", "weights", "read from file")
    shares = ("busy (stolen)", "starved: schedule, upstream, wire, serialise")
    table = Table(*columns, "sequences", "KV blocks", "tokens/s", *shares, box=None)
    names = {process.address: process.name for process in record.processes}
    for stage in mesh.stages:
        table.add_row(
            names.get(stage.address, replica_name(stage.index, stage.replica)),
            f"{stage.first_layer}:{stage.end_layer}",
            stage.address,
            _health(stage),
            f"{console.format_bytes(stage.weights_bytes)} ({stage.weights_digest[:8]})",
            console.format_bytes(stage.bytes_read),
            str(stage.sequences),
            f"{stage.kv_blocks_used}/{stage.kv_blocks_total}",
            f"{stage.rows_per_second:.0f}",
            f"{stage.busy_fraction:.0%} ({stage.stolen_fraction:.0%})",
            f"{stage.starved_fraction:.0%}: {stage.starved_for_schedule:.0%}, "
            f"{stage.starved_for_upstream:.0%}, {stage.starved_by_wire:.0%}, "
            f"{stage.starved_by_serialising:.0%}",
        )
    return table


def _health(stage: pb.StageState) -> str:
    if not stage.ready:
        return stage.problem or "not ready"
    if stage.draining:
        return "draining"
    if stage.resting:
        return "resting: far slower than others"
    if stage.passed_over:
        return "ready, on trial"
    return "ready, spare" if stage.spare else "ready"
