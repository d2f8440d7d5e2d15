"""The stage processes that a coordinator is told of when it begins."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from core.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Addresses, `host:port`. Of a stage's replicas with several weights the last ones have those
    that new sequences take."""

    stages: tuple[tuple[str, ...], ...]  # of each stage's replicas, first stage first
    spares: frozenset[str] = frozenset()  # of these, those that wait for others to fail

    def __post_init__(self) -> None:
        text = ",".join("|".join(replicas) for replicas in self.stages)
        addresses = self.addresses
        if not all(self.stages) or not addresses or not all(addresses):
            raise InvalidInput("stages", text, "addresses of replicas, first stage first")
        if len(set(addresses)) != len(addresses):
            raise InvalidInput("stages", text, "a different address each")
        if strangers := sorted(self.spares.difference(addresses)):
            raise InvalidInput("spares", ",".join(strangers), f"addresses of {text}")

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of all replicas."""
        return tuple(address for replicas in self.stages for address in replicas)

    def to_json(self) -> str:
        """As a file has it."""
        return json.dumps({"stages": self.stages, "spares": sorted(self.spares)}, indent=1)


def read_roster(path: Path) -> Roster:
    """Raises InvalidInput where the file has no roster."""
    try:
        fields = json.loads(path.read_text())
        stages = tuple(tuple(map(str, replicas)) for replicas in fields["stages"])
        return Roster(stages=stages, spares=frozenset(map(str, fields["spares"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput("stages_file", str(path), "a file of stages and spares") from error


def parse_roster(stages: str, spares: str = "") -> Roster:
    """Reads `h:1|h:2,h:3`: stages part by commas, and replicas of a stage by bars; spares by
    commas. Raises InvalidInput."""
    return Roster(
        stages=tuple(
            tuple(address.strip() for address in stage.split("|")) for stage in stages.split(",")
        ),
        spares=frozenset(filter(None, (address.strip() for address in spares.split(",")))),
    )
