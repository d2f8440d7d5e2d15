"""A mesh of two coordinators: whichever serves may be killed, also in the middle of an update."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from penstock.v1 import coordinator_pb2 as pb

from services.local.run_folder import find_process
from tests.support import other_weights
from tests.support.client import Client, connect
from tests.support.local_mesh import COMMAND_TIMEOUT_S, LocalMesh, until
from tests.support.other_weights import (
    LONG_TIMEOUT_S,
    LONG_TOKENS,
    request,
    rest_of,
    write_models,
)

OPTIONS = ("--coordinators", "2", *other_weights.OPTIONS)


@dataclass(frozen=True)
class Running:
    """A mesh, and its two coordinators as each of them answers."""

    mesh: LocalMesh
    coordinators: dict[str, Client]

    @property
    def client(self) -> Client:
        return next(iter(self.coordinators.values()))

    def term_of(self, name: str) -> int | None:
        """When a coordinator took the stages over, 0 where it waits; None where it is away."""
        try:
            return self.coordinators[name].mesh().term
        except grpc.RpcError:
            return None

    def serving(self) -> str:
        """The name of the one that serves."""
        return max(self.coordinators, key=lambda name: self.term_of(name) or 0)

    def kill_serving(self) -> str:
        """Kills the one that serves; returns its name once another one serves, and it waits."""
        name = self.serving()
        before = self.pid(name)
        os.kill(before, signal.SIGKILL)
        until(lambda: self.pid(name) != before and self.term_of(name) == 0)
        until(lambda: self.serving() != name and self.answers(lambda mesh: mesh.model.ready))
        return name

    def answers(self, is_so: Callable[[pb.GetMeshResponse], bool]) -> bool:
        """Whether the one that serves says so."""
        return is_so(self.coordinators[self.serving()].mesh())

    def pid(self, name: str) -> int:
        (one,) = [process for process in self.mesh.record.processes if process.name == name]
        return one.pid if find_process(one) else 0

    def status(self) -> str:
        done = self.mesh.run("status")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tokens(self) -> list[list[int]]:
        return [self.client.send(request(number)).token_ids for number in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def running(folder: Path, tmp_path: Path) -> Iterator[Running]:
    mesh = LocalMesh(runtime=tmp_path, environment={}, is_slowable=True)
    mesh.start("--model", str(folder / "old"), *OPTIONS)
    try:
        record = mesh.record
        first, second = record.coordinators
        with (
            connect(gateway=record.gateway, coordinator=first) as one,
            connect(gateway=record.gateway, coordinator=second) as other,
        ):
            yield Running(mesh, {"coordinator": one, "coordinator-b": other})
    finally:
        mesh.stop()


@pytest.fixture(scope="module")
def of_new_weights(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What a mesh answers that began with the new weights."""
    mesh = LocalMesh(runtime=tmp_path_factory.mktemp("other"), environment={})
    mesh.start("--model", str(folder / "new"), *OPTIONS)
    try:
        record = mesh.record
        with connect(gateway=record.gateway, coordinator=record.coordinators[0]) as client:
            return Running(mesh, {"coordinator": client}).tokens()
    finally:
        mesh.stop()


def test_a_stream_goes_on_when_the_coordinator_that_serves_is_killed(running: Running) -> None:
    long = request(1, LONG_TOKENS)
    undisturbed = running.client.send(long, timeout_s=LONG_TIMEOUT_S).token_ids
    for _ in range(2):  # there and back
        call = running.client.generation.Generate(long, timeout=LONG_TIMEOUT_S)
        begun = [*next(call).token_ids]
        with ThreadPoolExecutor(max_workers=1) as pool:
            rest = pool.submit(rest_of, call)
            killed = running.kill_serving()
            assert begun + rest.result() == undisturbed
        assert f"{running.serving()} serves (of 2)" in running.status()
        assert running.serving() != killed


def test_the_status_survives_the_death_of_the_one_that_stands_by(running: Running) -> None:
    serving = running.serving()
    (waiting,) = running.coordinators.keys() - {serving}
    os.kill(running.pid(waiting), signal.SIGKILL)
    assert f"{serving} serves (of 2)" in running.status()


def test_a_standby_that_takes_over_in_mid_update_completes_it_and_mixes_nothing(
    running: Running, folder: Path, of_new_weights: list[list[int]]
) -> None:
    """A long answer has begun on the old weights while new ones load, and holds the update up, when
    one is killed; the one that takes over was started before there were new ones."""
    long = request(1, LONG_TOKENS)
    of_old_weights = running.client.send(long, timeout_s=LONG_TIMEOUT_S).token_ids
    update = running.mesh.popen("update", "--stage", "1", "--weights", str(folder / "new"))
    until(lambda: running.answers(lambda mesh: len(mesh.stages) == 3))
    with running.mesh.slowed():
        call = running.client.generation.Generate(long, timeout=LONG_TIMEOUT_S)
        begun = [*next(call).token_ids]
        until(lambda: update.poll() is not None or running.answers(is_draining))
        assert update.poll() is None, "nothing held the update up"
        running.kill_serving()
    assert begun + rest_of(call) == of_old_weights
    output, _ = update.communicate(timeout=COMMAND_TIMEOUT_S)
    assert update.returncode == 0, output
    assert running.tokens() == of_new_weights
    assert running.answers(lambda mesh: len(mesh.stages) == 2)
    running.kill_serving()
    assert running.tokens() == of_new_weights
    assert running.answers(lambda mesh: len(mesh.stages) == 2)


def is_draining(mesh: pb.GetMeshResponse) -> bool:
    """Whether a replica is to leave, which some sequence holds."""
    return any(one.draining for one in mesh.stages)


def test_a_coordinator_killed_while_new_weights_are_tried_leaves_all_as_it_was(
    running: Running, folder: Path
) -> None:
    before, processes = running.tokens(), running.mesh.record.processes
    update = running.mesh.popen("update", "--stage", "1", "--weights", str(folder / "new"))
    until(lambda: running.answers(lambda mesh: len(mesh.stages) == 3))
    running.kill_serving()
    output, _ = update.communicate(timeout=COMMAND_TIMEOUT_S)
    assert update.returncode == 1, output
    assert b"all goes on as it was" in output
    assert running.tokens() == before
    names = {one.name for one in processes}
    until(lambda: {one.name for one in running.mesh.record.processes} == names)
    assert running.answers(lambda mesh: len(mesh.stages) == 2)
