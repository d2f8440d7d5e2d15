"""Layers of a real mesh move between its stages under load, and every answer is what it was."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from penstock.v1 import generation_pb2 as pb

from services.local.run_folder import MeshRecord, find_process
from tests.support.client import Answer, Client, connect, connect_securely, make_request
from tests.support.local_mesh import COMMAND_TIMEOUT_S, LocalMesh, until
from tests.support.models import TinyModel, write_gguf, write_servable
from tests.support.tiny_tokenizer import write_tiny_tokenizer

TWO, THREE, OTHER = "0:2,2:4", "0:2,2:3,3:4", "0:1,1:4"
TINY = TinyModel(context_length=8192)
NUM_STREAMS = 16
LONG_TOKENS = 2000
LONG_TIMEOUT_S = 300


@dataclass(frozen=True)
class Running:
    """A mesh, and what it answers when nothing disturbs it."""

    mesh: LocalMesh
    client: Client
    undisturbed: list[Answer]

    def pids(self) -> dict[str, int]:
        """Of the processes that live."""
        return {one.name: one.pid for one in self.mesh.record.processes if find_process(one)}

    def kill(self, name: str) -> None:
        os.kill(self.pids()[name], signal.SIGKILL)

    def repartition(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.mesh.run("repartition", *options)

    @contextmanager
    def under_load(self) -> Iterator[None]:
        """Streams that follow one another, and one that is long: none fails, all are the same."""
        is_over = threading.Event()

        def keep_asking(number: int) -> list[Answer]:
            answers = []
            while not is_over.is_set():
                answers.append(self.client.send(request(number), timeout_s=LONG_TIMEOUT_S))
            return answers

        with ThreadPoolExecutor(max_workers=NUM_STREAMS + 1) as pool:
            call = self.client.generation.Generate(long_request(), timeout=LONG_TIMEOUT_S)
            begun = next(call)
            long = pool.submit(lambda: Answer(responses=(begun, *call)))
            loads = [pool.submit(keep_asking, number) for number in range(NUM_STREAMS)]
            try:
                yield
            finally:
                is_over.set()
            for number, load in enumerate(loads):
                for answer in load.result():
                    assert_same(answer, self.undisturbed[number])
            assert_same(long.result(), self.undisturbed[-1])
        self.client.wait_until_idle()


def assert_same(answer: Answer, expected: Answer) -> None:
    assert answer.token_ids == expected.token_ids
    assert answer.logprobs == expected.logprobs


def request(number: int, num_tokens: int = 48) -> pb.GenerateRequest:
    """Greedy ones and seeded ones."""
    drawn = {"temperature": 0.0} if number % 2 else {"temperature": 1.0, "seed": number}
    sampling = drawn | {"max_tokens": num_tokens, "ignore_eos": True, "logprobs": 0}
    return make_request(token_ids=[5, 6, 7 + number], sampling=sampling)


def long_request() -> pb.GenerateRequest:
    return request(NUM_STREAMS, LONG_TOKENS)


def all_requests() -> list[pb.GenerateRequest]:
    return [*map(request, range(NUM_STREAMS)), long_request()]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_servable(tmp_path / "tiny", TINY))


@pytest.fixture
def running(model: str, tmp_path: Path) -> Iterator[Running]:
    with started(LocalMesh(runtime=tmp_path, environment={}), model) as running:
        yield running


@contextmanager
def started(
    mesh: LocalMesh, model: str, *options: str, number_format: str = "bf16"
) -> Iterator[Running]:
    sizes = ("--split", TWO, "--kv-memory", "16MiB", "--dtype", number_format)
    mesh.start("--model", model, *sizes, *options)
    try:
        with connected(mesh.record) as client:
            yield Running(mesh, client, client.send_all(all_requests()))
    finally:
        mesh.stop()


def connected(record: MeshRecord) -> AbstractContextManager[Client]:
    addresses = {"gateway": record.gateway, "coordinator": record.coordinators[0]}
    if record.certs:
        return connect_securely(**addresses, certs=Path(record.certs))
    return connect(**addresses)


def test_two_stages_become_three_and_two_of_another_cut(running: Running) -> None:
    before = running.pids()
    with running.under_load():
        done = running.repartition("--split", THREE)
        assert done.returncode == 0, done.stdout + done.stderr
        three = running.pids()
        shown = running.mesh.run("status").stdout
    assert THREE in shown
    assert three.keys() == before.keys() - {"stage-1"} | {"stage-1-b", "stage-2"}
    assert three["stage-0"] == before["stage-0"]
    with running.under_load():
        done = running.repartition("--split", OTHER, "--now")
        assert done.returncode == 0, done.stdout + done.stderr
        assert running.client.mesh().sequences_moved > 0
    two = running.pids()
    assert len(two) == len(before)
    assert not {name for name in two if "stage" in name and two[name] in three.values()}
    with running.under_load():
        killed = running.pids()["coordinator"]
        running.kill("coordinator")
        until(lambda: running.pids().get("coordinator", killed) != killed)
    assert running.client.mesh().split == OTHER


def test_a_new_process_that_is_killed_on_trial_leaves_all_as_it_was(running: Running) -> None:
    before = running.pids()
    with running.under_load():
        command = running.mesh.popen("repartition", "--split", THREE)
        until(lambda: "stage-2" in running.pids())
        running.kill("stage-2")
        output, _ = command.communicate(timeout=COMMAND_TIMEOUT_S)
    assert command.returncode == 1
    assert b"all goes on as it was" in output
    until(lambda: running.pids() == before)
    mesh = running.client.mesh()
    assert mesh.split == TWO
    assert len(mesh.stages) == 2


def test_a_new_process_that_is_killed_once_it_serves_is_started_again(running: Running) -> None:
    with running.under_load():
        command = running.mesh.popen("repartition", "--split", THREE, "--now")
        running.client.wait_for_mesh(lambda mesh: mesh.split == THREE)
        running.kill("stage-2")
        output, _ = command.communicate(timeout=COMMAND_TIMEOUT_S)
        assert command.returncode == 0, output
    assert "stage-1" not in running.pids()
    running.client.wait_for_mesh(lambda mesh: all(one.ready for one in mesh.stages))


def test_what_is_no_other_cut_is_refused_in_one_line(running: Running) -> None:
    for options, words in (
        (("--split", TWO), "another cut"),
        (("--split", "0:3"), "covering 0:4"),
        ((), "a number of stages"),
        (("--split", THREE, "--stages", "3"), "a number of stages"),
        (("--stages", "9"), "9 stages for 4 layers"),
    ):
        done = running.repartition(*options)
        assert done.returncode != 0
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number_format", ["int8", "int4"])
def test_layers_of_whole_numbers_move(number_format: str, tmp_path: Path) -> None:
    folder = tmp_path / "nibbles"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", TINY, block_type=GGMLQuantizationType.Q4_1)
    write_tiny_tokenizer(folder)
    mesh = LocalMesh(runtime=tmp_path, environment={})
    with started(mesh, str(folder), number_format=number_format) as running:
        with running.under_load():
            run(mesh, "repartition", "--split", THREE, "--now")
        assert running.client.mesh().sequences_moved > 0
        afterwards = running.client.send_all(all_requests())
        for answer, expected in zip(afterwards, running.undisturbed, strict=True):
            assert_same(answer, expected)


def test_layers_of_a_sealed_model_move_between_replicas_that_prove_who_they_are(
    model: str, tmp_path: Path
) -> None:
    mesh = LocalMesh(runtime=tmp_path, environment={"PENSTOCK_SEAL_KEYS": str(tmp_path / "keys")})
    sealed = str(tmp_path / "sealed")
    run(mesh, "seal", "keygen", "--stages", "3")
    run(mesh, "seal", "make", model, "--to", sealed, "--split", TWO)
    with started(mesh, sealed, "--certs", "auto", "--replicas", "2") as running:
        with running.under_load():
            run(mesh, "seal", "rewrap", sealed, "--split", THREE, "--keep")
            run(mesh, "repartition", "--split", THREE, "--now")
        assert running.client.mesh().sequences_moved > 0
        stages = sorted(name for name in running.pids() if "stage" in name)
    assert stages == ["stage-0", "stage-0-b", "stage-1-c", "stage-1-d", "stage-2", "stage-2-b"]


def run(mesh: LocalMesh, *command: str) -> None:
    done = mesh.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
