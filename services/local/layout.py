"""Everything that is decided before a process starts: who holds which layers, and listens where.

A layout is a value; a mesh that changes while it runs goes from one to the next.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import InvalidInput, NotFound, shown
from core.pipeline.plan import StageSlice
from core.weights.sealed.identity import OWNER
from services.common.data_folder import AUDIT_NAME
from services.common.identity import COORDINATOR, GATEWAY, name_of, stage_role
from services.coordinator.roster import Roster
from services.local.key_files import private_key, public_key, stage_name
from services.local.process import ProcessCommand


@dataclass(frozen=True, kw_only=True)
class ReplicaLayout:
    """One stage process. `model_path`: where its weights come from, once they are others than the
    mesh's."""

    number: int  # in its name; from 0 within the stage that it began in
    address: str
    metrics_port: int
    is_spare: bool = False
    model_path: str = ""


@dataclass(frozen=True, kw_only=True)
class StageLayout:
    """The processes that hold the same layers."""

    first_layer: int
    end_layer: int
    replicas: tuple[ReplicaLayout, ...]
    slow_down: float = 1.0

    @property
    def layers(self) -> str:
        return f"{self.first_layer}:{self.end_layer}"


@dataclass(frozen=True, kw_only=True)
class CoordinatorLayout:
    """A process of which one serves, while the others wait."""

    number: int  # in its name, from 0
    address: str
    metrics_port: int


@dataclass(frozen=True, kw_only=True)
class MeshLayout:
    """A mesh, ready to be started."""

    model_name: str
    model_path: str
    number_format: str
    device: str
    kv_blocks: int
    prefix_cache: bool
    max_sequences: int
    max_rows: int
    threads: int  # of a stage that compute a micro-batch
    threads_alone: int  # likewise, while no other stage computes
    speculation: int
    drain_s: int
    require_keys: bool
    data_folder: str  # of API keys and audit log
    stages: tuple[StageLayout, ...]
    coordinators: tuple[CoordinatorLayout, ...]
    gateway_address: str
    gateway_metrics_port: int
    wire: str = "f32"  # codec of activations between stages
    shortcuts: bool = True
    stages_file: str = ""  # has the roster, once there is a run folder
    certs: str = ""  # folder of the processes' identities; empty: all in the clear
    # Folder with the keys of a sealed model; "": it is not sealed.
    seal_keys: str = ""
    # Digests that stages hold the model to; "": none.
    manifest: str = ""
    rehash_minutes: float = 10.0

    def commands(self) -> tuple[ProcessCommand, ...]:
        """What to run: stages, coordinators, the gateway; ended the other way round."""
        stages = (
            self.stage_command(index, one)
            for index, stage in enumerate(self.stages)
            for one in stage.replicas
        )
        coordinators = map(self.coordinator_command, self.coordinators)
        return (*stages, *coordinators, self.gateway_command())

    @property
    def audit_path(self) -> Path:
        return Path(self.data_folder) / AUDIT_NAME

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> MeshLayout:
        """Reads what `to_json` wrote."""
        fields = json.loads(text)
        stages = tuple(_stage_from(stage) for stage in fields.pop("stages"))
        coordinators = tuple(CoordinatorLayout(**one) for one in fields.pop("coordinators"))
        return MeshLayout(stages=stages, coordinators=coordinators, **fields)

    def with_replica(self, stage_index: int, one: ReplicaLayout) -> MeshLayout:
        """The mesh with one more replica; raises InvalidInput where there is no such stage."""
        replicas = (*self.stage(stage_index).replicas, one)
        return self._with_replicas(stage_index, replicas)

    def without_replica(self, address: str) -> MeshLayout:
        """The mesh without a replica; raises NotFound where none listens there."""
        for index, stage in enumerate(self.stages):
            kept = tuple(one for one in stage.replicas if one.address != address)
            if len(kept) < len(stage.replicas):
                return self._with_replicas(index, kept)
        raise NotFound(f"no replica listens at {shown(address)}", field="address")

    def stage(self, stage_index: int) -> StageLayout:
        """Raises InvalidInput where there is none."""
        if stage_index >= len(self.stages):
            raise InvalidInput("stage_index", stage_index, f"below {len(self.stages)}")
        return self.stages[stage_index]

    def slice_of(self, stage: StageLayout) -> StageSlice:
        """Of the model."""
        return StageSlice(
            first_layer=stage.first_layer,
            end_layer=stage.end_layer,
            num_layers=self.stages[-1].end_layer,
        )

    @property
    def stage_addresses(self) -> frozenset[str]:
        """Of all stage processes."""
        return frozenset(one.address for stage in self.stages for one in stage.replicas)

    def _with_replicas(self, stage_index: int, replicas: tuple[ReplicaLayout, ...]) -> MeshLayout:
        stages = list(self.stages)
        stages[stage_index] = replace(stages[stage_index], replicas=replicas)
        return replace(self, stages=tuple(stages))

    def _identity(self, role: str) -> dict[str, str]:
        """The option for a process of this role."""
        return {"--certs": str(Path(self.certs) / name_of(role))} if self.certs else {}

    def stage_command(self, index: int, one: ReplicaLayout) -> ProcessCommand:
        """Runs a replica."""
        return _command(
            replica_name(index, one.number),
            "services.stage",
            3,
            one.address,
            one.metrics_port,
            {
                "--model": one.model_path or self.model_path,
                "--name": self.model_name,
                "--layers": self.stages[index].layers,
                "--dtype": self.number_format,
                "--device": self.device,
                "--wire": self.wire,
                "--kv-blocks": str(self.kv_blocks),
                "--max-rows": str(self.max_rows),
                "--threads": str(self.threads),
                "--threads-alone": str(self.threads_alone),
                "--max-sequences": str(self.max_sequences),
                "--slow-down": str(self.stages[index].slow_down),
                "--rehash-minutes": str(self.rehash_minutes),
                **self._opening(index),
                # Others than the mesh's weights have another manifest.
                **({"--manifest": self.manifest} if self.manifest and not one.model_path else {}),
            }
            | self._identity(stage_role(index)),
            flags=() if self.shortcuts else ("--no-shortcuts",),
            role=stage_role(index),
            can_be_forked=self.device == "cpu",
        )

    @property
    def roster(self) -> Roster:
        """What coordinators are told of the stage processes."""
        replicas = [stage.replicas for stage in self.stages]
        return Roster(
            stages=tuple(tuple(one.address for one in stage) for stage in replicas),
            spares=frozenset(one.address for stage in replicas for one in stage if one.is_spare),
        )

    def coordinator_command(self, one: CoordinatorLayout) -> ProcessCommand:
        """Runs a coordinator."""
        return _command(
            f"coordinator{replica_suffix(one.number)}",
            "services.coordinator",
            2,
            one.address,
            one.metrics_port,
            {
                "--stages-file": self.stages_file,
                "--max-sequences": str(self.max_sequences),
                "--speculation": str(self.speculation),
                "--audit": str(self.audit_path),
            }
            | self._identity(COORDINATOR),
            flags=(
                "--prefix-cache" if self.prefix_cache else "--no-prefix-cache",
                "--shortcuts" if self.shortcuts else "--no-shortcuts",
            ),
        )

    def gateway_command(self) -> ProcessCommand:
        """Runs the gateway."""
        return _command(
            "gateway",
            "services.gateway",
            1,
            self.gateway_address,
            self.gateway_metrics_port,
            {
                "--coordinator": ",".join(one.address for one in self.coordinators),
                "--model": self.model_path,
                "--drain-s": str(self.drain_s),
                "--data": self.data_folder,
            }
            | self._identity(GATEWAY)
            | self._sealer(),
            flags=("--require-keys" if self.require_keys else "--no-require-keys",),
        )

    def _opening(self, stage_index: int) -> dict[str, str]:
        """What a stage opens a sealed model with."""
        if not self.seal_keys:
            return {}
        identity = private_key(Path(self.seal_keys), stage_name(stage_index))
        return {"--identity-key": str(identity)} | self._sealer()

    def _sealer(self) -> dict[str, str]:
        """Whose sealed model is believed."""
        return {"--sealer": str(public_key(Path(self.seal_keys), OWNER))} if self.seal_keys else {}


def replica_name(stage_index: int, number: int) -> str:
    """What a stage's process is called: "stage-0" is the first, "stage-0-b" the second."""
    return f"stage-{stage_index}{replica_suffix(number)}"


def replica_suffix(number: int) -> str:
    """Tells processes of one kind apart: "", "-b", "-c" ... and beyond the letters numbers."""
    if number == 0:
        return ""
    return f"-{chr(ord('a') + number)}" if number < 26 else f"-{number}"


def _stage_from(fields: dict[str, Any]) -> StageLayout:
    replicas = tuple(ReplicaLayout(**one) for one in fields.pop("replicas"))
    return StageLayout(replicas=replicas, **fields)


def _command(
    name: str,
    module: str,
    stop_turn: int,
    address: str,
    metrics_port: int,
    options: dict[str, str],
    *,
    flags: tuple[str, ...] = (),
    role: str = "",
    can_be_forked: bool = True,
) -> ProcessCommand:
    shared = {"--listen": address, "--metrics-port": str(metrics_port)}
    arguments = [part for option in (shared | options).items() for part in option]
    return ProcessCommand(
        name=name,
        module=module,
        arguments=(*arguments, *flags),
        address=address,
        metrics_port=metrics_port,
        stop_turn=stop_turn,
        role=role,
        can_be_forked=can_be_forked,
    )
