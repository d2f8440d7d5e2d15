"""One stage of a real mesh gets other weights while it serves."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.common.audit_check import read_lines, verify
from services.common.data_folder import AUDIT_NAME
from tests.support.client import Client, connect
from tests.support.local_mesh import COMMAND_TIMEOUT_S, LocalMesh, until
from tests.support.models import write_servable
from tests.support.other_weights import (
    LONG_TIMEOUT_S,
    LONG_TOKENS,
    MODEL,
    OPTIONS,
    request,
    rest_of,
    write_models,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def mesh(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    yield from started(tmp_path_factory.mktemp("mesh"), folder / "old")


def started(runtime: Path, model: Path) -> Iterator[LocalMesh]:
    mesh = LocalMesh(runtime=runtime, environment={}, is_slowable=True)
    mesh.start("--model", str(model), *OPTIONS)
    try:
        yield mesh
    finally:
        mesh.stop()


def connected(mesh: LocalMesh) -> Iterator[Client]:
    record = mesh.record
    with connect(gateway=record.gateway, coordinator=record.coordinators[0]) as client:
        yield client


@pytest.fixture
def client(mesh: LocalMesh) -> Iterator[Client]:
    yield from connected(mesh)


@pytest.fixture(scope="module")
def of_new_weights(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What a mesh answers that began with the new weights."""
    for mesh in started(tmp_path_factory.mktemp("other"), folder / "new"):
        for client in connected(mesh):
            return tokens(client)
    raise AssertionError


def tokens(client: Client) -> list[list[int]]:
    return [client.send(request(number)).token_ids for number in range(8)]


def test_weights_that_are_no_good_change_nothing(
    mesh: LocalMesh, client: Client, folder: Path
) -> None:
    before, processes = tokens(client), mesh.record.processes
    done = mesh.run("update", "--stage", "1", "--weights", str(folder / "bad"))
    assert done.returncode == 1, done.stdout
    assert "no finite log probability" in done.stderr
    assert "all goes on as it was" in done.stdout
    assert tokens(client) == before
    until(lambda: mesh.record.processes == processes)  # the new one may take a moment to end
    assert len(client.mesh().stages) == 2
    assert audited(mesh)[-1] == "stage not updated"


def test_weights_of_another_shape_are_refused_in_one_line(mesh: LocalMesh, tmp_path: Path) -> None:
    other = write_servable(tmp_path / "other", dataclasses.replace(MODEL, num_layers=6))
    done = mesh.run("update", "--stage", "1", "--weights", str(other))
    assert done.returncode == 2
    assert "weights of the same shapes" in done.stderr
    assert mesh.run("update", "--stage", "2", "--weights", str(other)).returncode == 2


def test_under_load_each_answer_is_wholly_of_old_or_of_new_weights(
    mesh: LocalMesh, client: Client, folder: Path, of_new_weights: list[list[int]]
) -> None:
    of_old_weights = tokens(client)
    assert all(old != new for old, new in zip(of_old_weights, of_new_weights, strict=True))
    long_before = client.send(request(1, LONG_TOKENS), timeout_s=LONG_TIMEOUT_S).token_ids
    pids = {one.name: one.pid for one in mesh.record.processes}
    is_over = threading.Event()

    def keep_asking(number: int) -> list[list[int]]:
        answers = []
        while not is_over.is_set():
            answers.append(client.send(request(number)).token_ids)
        return answers

    with ThreadPoolExecutor(max_workers=9) as pool:
        call = client.generation.Generate(request(1, LONG_TOKENS), timeout=LONG_TIMEOUT_S)
        begun = [*next(call).token_ids]
        loads = [pool.submit(keep_asking, number) for number in range(8)]
        long = pool.submit(rest_of, call)
        try:
            done = mesh.run("update", "--stage", "1", "--weights", str(folder / "new"))
        finally:
            is_over.set()
        assert done.returncode == 0, done.stdout + done.stderr
        for number, load in enumerate(loads):
            old, new = of_old_weights[number], of_new_weights[number]
            answers = load.result()
            num_old = answers.index(new) if new in answers else len(answers)
            assert answers == [old] * num_old + [new] * (len(answers) - num_old)
        assert begun + long.result() == long_before
    assert tokens(client) == of_new_weights
    now = {one.name: one.pid for one in mesh.record.processes}
    assert now.pop("stage-1-b") not in pids.values()
    assert now == {name: pid for name, pid in pids.items() if name != "stage-1"}
    expected = ["replica added", "weights chosen", "replica drained", "stage updated"]
    assert audited(mesh)[-4:] == expected


def audited(mesh: LocalMesh) -> list[str]:
    """What the audit log holds, which is whole."""
    path = mesh.runtime / "data" / "penstock" / AUDIT_NAME
    verify(path)
    return [line.event for line in read_lines(path)]


def test_a_coordinator_killed_in_mid_update_mixes_no_weights(
    folder: Path, tmp_path: Path, of_new_weights: list[list[int]]
) -> None:
    """A long answer has begun on the old weights, and holds the update up, when it is killed."""
    for mesh in started(tmp_path, folder / "old"):
        for client in connected(mesh):
            long_before = client.send(request(1, LONG_TOKENS), timeout_s=LONG_TIMEOUT_S).token_ids
            with mesh.slowed():
                call = client.generation.Generate(request(1, LONG_TOKENS), timeout=LONG_TIMEOUT_S)
                begun = [*next(call).token_ids]
                update = mesh.popen("update", "--stage", "1", "--weights", str(folder / "new"))
                client.wait_for_mesh(lambda mesh: any(one.draining for one in mesh.stages))
                (coordinator,) = [one for one in mesh.record.processes if one.name == "coordinator"]
                os.kill(coordinator.pid, signal.SIGKILL)
            assert begun + rest_of(call) == long_before
            output, _ = update.communicate(timeout=COMMAND_TIMEOUT_S)
            assert update.returncode == 0, output
            assert tokens(client) == of_new_weights
            assert len(client.mesh().stages) == 2
