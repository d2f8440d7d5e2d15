"""Everything that is decided before a process starts: who holds which layers, and listens where."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from services.local.process import ProcessCommand


@dataclass(frozen=True, kw_only=True)
class StageLayout:
    """One stage process."""

    first_layer: int
    end_layer: int
    address: str
    metrics_port: int

    @property
    def layers(self) -> str:
        return f"{self.first_layer}:{self.end_layer}"


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
    speculation: int
    drain_s: int
    stages: tuple[StageLayout, ...]
    coordinator_address: str
    coordinator_metrics_port: int
    gateway_address: str
    gateway_metrics_port: int

    def commands(self) -> tuple[ProcessCommand, ...]:
        """What to run: the stages, the coordinator, the gateway; ended the other way round."""
        stages = (self._stage_command(index) for index in range(len(self.stages)))
        return (*stages, self._coordinator_command(), self._gateway_command())

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> MeshLayout:
        """Reads what `to_json` wrote."""
        fields = json.loads(text)
        stages = tuple(StageLayout(**stage) for stage in fields.pop("stages"))
        return MeshLayout(stages=stages, **fields)

    def _stage_command(self, index: int) -> ProcessCommand:
        stage = self.stages[index]
        return _command(
            f"stage-{index}",
            "services.stage",
            3,
            stage.address,
            stage.metrics_port,
            {
                "--model": self.model_path,
                "--name": self.model_name,
                "--layers": stage.layers,
                "--dtype": self.number_format,
                "--device": self.device,
                "--kv-blocks": str(self.kv_blocks),
                "--max-rows": str(self.max_rows),
                "--max-sequences": str(self.max_sequences),
            },
        )

    def _coordinator_command(self) -> ProcessCommand:
        return _command(
            "coordinator",
            "services.coordinator",
            2,
            self.coordinator_address,
            self.coordinator_metrics_port,
            {
                "--stages": ",".join(stage.address for stage in self.stages),
                "--max-sequences": str(self.max_sequences),
                "--speculation": str(self.speculation),
            },
            flags=("--prefix-cache" if self.prefix_cache else "--no-prefix-cache",),
        )

    def _gateway_command(self) -> ProcessCommand:
        return _command(
            "gateway",
            "services.gateway",
            1,
            self.gateway_address,
            self.gateway_metrics_port,
            {
                "--coordinator": self.coordinator_address,
                "--model": self.model_path,
                "--drain-s": str(self.drain_s),
            },
        )


def _command(
    name: str,
    module: str,
    stop_turn: int,
    address: str,
    metrics_port: int,
    options: dict[str, str],
    *,
    flags: tuple[str, ...] = (),
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
    )
