"""Which replicas are linked while layers move: those whose layers join up, if one may call the
other."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from penstock.v1 import stage_pb2

from core.errors import Superseded
from core.pipeline.events import Event
from services.common.credentials import Credentials
from services.common.identity import COORDINATOR
from services.coordinator.replica_link import Incarnation
from services.coordinator.replicas import Replicas
from services.coordinator.roster import Roster
from services.coordinator.settings import CoordinatorSettings
from tests.support.certificates import credentials, write_mesh
from tests.support.fake_stages import FakeStage

Pairs = set[tuple[str, str]]
# By what replicas are called here: the first three are of the new cut, the others leave.
LAYERS = {"0:1": (0, 1), "1:2": (1, 2), "2:4": (2, 4), "old 0:2": (0, 2), "old 2:4": (2, 4)}
NEW, OLD = list(LAYERS)[:3], list(LAYERS)[3:]
OF_THE_NEW_CUT, OF_THE_OLD_ONE = {("0:1", "1:2"), ("1:2", "2:4")}, {("old 0:2", "old 2:4")}
OF_BOTH = {("old 0:2", "2:4"), ("1:2", "old 2:4")}


class Nobody:
    """Hears all, and does nothing."""

    def post(self, event: Event) -> None: ...

    def on_sampled(self, message: stage_pb2.SampledTokens) -> None: ...

    def on_report(self, replica: Incarnation, report: stage_pb2.StageReport) -> None: ...

    def on_mesh_changed(self) -> None: ...

    def on_superseded(self, error: Superseded) -> None: ...


class Moving:
    """A mesh with the replicas of both cuts, all of them open, and the links that were dialled."""

    def __init__(self, own: Credentials | None) -> None:
        self._addresses = {name: f"host:{port}" for port, name in enumerate(LAYERS, start=1)}
        self.incarnations: dict[str, Incarnation] = {}
        self._ids = itertools.count(1)
        self._dialled: list[tuple[Incarnation, str, int]] = []
        old = tuple((self._addresses[name],) for name in OLD)
        settings = CoordinatorSettings(listen="127.0.0.1:0", roster=Roster(stages=old))
        self.replicas = Replicas(settings, Nobody(), credentials=own)
        for name in OLD:
            self.open(name)
        for index, name in enumerate(NEW):
            self.replicas.add(index, self._addresses[name], is_spare=False, split=",".join(NEW))
            self.open(name)

    def open(self, name: str) -> None:
        first, end = LAYERS[name]
        stage = FakeStage(index=0, num_stages=2, first_layer=first, end_layer=end)

        def send(request: stage_pb2.ControlRequest) -> None:
            order = request.open_downstream
            self._dialled.append((incarnation, order.address, order.link_id))

        incarnation = Incarnation(
            replica_id=next(self._ids),
            link=self.replicas.by_address(self._addresses[name]),
            epoch=1,
            ready=stage.ready(),
            stream=SimpleNamespace(send=send),  # type: ignore[arg-type]
        )
        self.incarnations[name] = incarnation
        self.replicas.on_open(incarnation)

    def lose(self, name: str) -> None:
        incarnation = self.incarnations.pop(name)
        self.replicas.on_lost(incarnation.link, incarnation)

    def take_dialled(self) -> Pairs:
        """Who was told to dial whom; all of these links stand from then on."""
        names = {address: name for name, address in self._addresses.items()}
        pairs = {(names[one.place.address], names[to]) for one, to, _ in self._dialled}
        for upstream, _, link_id in self._dialled:
            state = stage_pb2.LinkState(link_id=link_id, stands=True)
            self.replicas.on_message(upstream, stage_pb2.ControlResponse(link=state))
        self._dialled.clear()
        return pairs


@pytest.fixture
def certified(tmp_path: Path) -> Moving:
    write_mesh(tmp_path, COORDINATOR)
    return Moving(credentials(tmp_path, COORDINATOR))


def test_without_certificates_all_are_linked_whose_layers_join_up() -> None:
    assert Moving(None).take_dialled() == OF_THE_NEW_CUT | OF_THE_OLD_ONE | OF_BOTH


def test_what_certificates_forbid_is_not_dialled(certified: Moving) -> None:
    assert certified.take_dialled() == OF_THE_NEW_CUT | OF_THE_OLD_ONE


def test_a_process_that_leaves_stays_the_stage_that_its_certificate_names(
    certified: Moving,
) -> None:
    """Also where its layers are those of another stage of the cut that was chosen."""
    certified.take_dialled()
    certified.replicas.choose(certified.replicas.known_cut().at(",".join(NEW)))
    certified.lose("1:2")
    certified.open("1:2")
    assert certified.take_dialled() == OF_THE_NEW_CUT


def test_a_replica_misses_nobody_who_may_not_call_it(certified: Moving) -> None:
    certified.take_dialled()
    certified.lose("1:2")
    assert certified.replicas.is_connected(certified.incarnations["2:4"])
