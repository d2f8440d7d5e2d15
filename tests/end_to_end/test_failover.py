"""Stages of a real mesh die or hang in mid-generation, and every answer is what it would have been.

The long series of faults is in tests/chaos; here is one of each kind.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from penstock.v1 import generation_pb2 as pb

from tests.support.client import CALL_TIMEOUT_S, Answer, Client, connect, make_request
from tests.support.local_mesh import START_TIMEOUT_S, LocalMesh, until

NUM_STREAMS = 8
NUM_TOKENS = 64
MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Running:
    """A mesh, and what it answers when nothing disturbs it."""

    mesh: LocalMesh
    client: Client
    undisturbed: list[Answer]

    def signal(self, name: str, number: signal.Signals) -> None:
        (process,) = [one for one in self.mesh.record.processes if one.name == name]
        os.kill(process.pid, number)

    def until_all_are_ready(self) -> None:
        self.client.wait_for_mesh(
            lambda mesh: mesh.model.ready and all(stage.ready for stage in mesh.stages),
            timeout_s=START_TIMEOUT_S / 2,
        )

    def is_serving(self, name: str) -> bool:
        stub = health_pb2_grpc.HealthStub(self.client.channel)
        request = health_pb2.HealthCheckRequest(service=name)
        status = stub.Check(request, timeout=CALL_TIMEOUT_S).status
        return bool(status == health_pb2.HealthCheckResponse.SERVING)

    def assert_that_nothing_changes(self, disturb: Callable[[], None]) -> None:
        """Calls `disturb` once each of several streams has begun."""
        have_begun = Barrier(NUM_STREAMS + 1)

        def stream(request: pb.GenerateRequest) -> Answer:
            call = self.client.generation.Generate(request, timeout=CALL_TIMEOUT_S)
            first = next(call)
            have_begun.wait(CALL_TIMEOUT_S)
            return Answer(responses=(first, *call))

        with ThreadPoolExecutor(max_workers=NUM_STREAMS) as pool:
            answers = pool.map(stream, requests())
            have_begun.wait(CALL_TIMEOUT_S)
            disturb()
            for answer, expected in zip(answers, self.undisturbed, strict=True):
                assert answer.token_ids == expected.token_ids
                assert answer.logprobs == expected.logprobs
        self.client.wait_until_idle()
        self.until_all_are_ready()


def requests() -> list[pb.GenerateRequest]:
    """Greedy and sampled, each long enough to be cut in the middle."""
    made = []
    for number in range(NUM_STREAMS):
        drawn = {"temperature": 0.0} if number % 2 else {"temperature": 0.9, "seed": number}
        sampling = drawn | {"max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 0}
        made.append(make_request(prompt=f"Story {number}: once upon a time", sampling=sampling))
    return made


def start(mesh: LocalMesh, *options: str) -> Iterator[Running]:
    mesh.start("--kv-memory", "96MiB", *options)
    try:
        record = mesh.record
        with connect(gateway=record.gateway, coordinator=record.coordinators[0]) as client:
            yield Running(mesh, client, client.send_all(requests()))
    finally:
        mesh.stop()


@pytest.fixture(scope="module")
def spared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two stages in int8, each with a spare."""
    mesh = LocalMesh(runtime=tmp_path_factory.mktemp("spared"), environment={})
    yield from start(mesh, "--dtype", "int8", "--spares", "1")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two stages in bf16, each alone."""
    mesh = LocalMesh(runtime=tmp_path_factory.mktemp("single"), environment={})
    yield from start(mesh, "--dtype", "bf16")


def test_many_requests_in_one_call_outlast_a_stage(spared: Running) -> None:
    messages = (pb.GenerateManyRequest(id=i, request=one) for i, one in enumerate(requests()))
    before, token_ids = spared.client.mesh().sequences_moved, [list[int]() for _ in requests()]
    begun = False
    for response in spared.client.generation.GenerateMany(messages, timeout=CALL_TIMEOUT_S):
        for answer in response.answers:
            token_ids[answer.id] += answer.response.token_ids
        if not begun and all(token_ids):
            begun = True
            spared.signal("stage-1", signal.SIGKILL)
    assert token_ids == [expected.token_ids for expected in spared.undisturbed]
    assert spared.client.mesh().sequences_moved > before
    spared.until_all_are_ready()


@pytest.mark.parametrize("name", ["stage-0", "stage-1"])
def test_a_spare_goes_on_for_a_stage_that_is_killed(spared: Running, name: str) -> None:
    before = spared.client.mesh().sequences_moved
    spared.assert_that_nothing_changes(lambda: spared.signal(name, signal.SIGKILL))
    assert spared.client.mesh().sequences_moved > before


def test_a_spare_goes_on_for_a_stage_that_hangs(spared: Running) -> None:
    def hang() -> None:
        spared.signal("stage-1", signal.SIGSTOP)
        spared.client.wait_for_mesh(lambda mesh: "no pulse" in str(mesh.stages))
        assert spared.is_serving(MODEL)
        spared.signal("stage-1", signal.SIGCONT)

    spared.assert_that_nothing_changes(hang)


@pytest.mark.parametrize("name", ["stage-0", "stage-1"])
def test_streams_wait_for_a_stage_that_is_started_again(single: Running, name: str) -> None:
    single.assert_that_nothing_changes(lambda: single.signal(name, signal.SIGKILL))


def test_health_is_red_while_a_stage_hangs_and_green_again_afterwards(single: Running) -> None:
    def hang() -> None:
        single.signal("stage-1", signal.SIGSTOP)
        until(lambda: not single.is_serving(f"{MODEL}/stage/1") and not single.is_serving(MODEL))
        assert single.is_serving(f"{MODEL}/stage/0")
        single.signal("stage-1", signal.SIGCONT)
        until(lambda: single.is_serving(f"{MODEL}/stage/1") and single.is_serving(MODEL))

    single.assert_that_nothing_changes(hang)


def test_requests_that_come_while_a_stage_is_away_are_served_when_it_is_back(
    single: Running,
) -> None:
    single.signal("stage-0", signal.SIGKILL)
    single.client.wait_for_mesh(lambda mesh: not mesh.model.ready)
    try:
        answers = single.client.send_all(requests())
    except grpc.RpcError as error:
        pytest.fail(f"refused: {error}")
    assert [answer.token_ids for answer in answers] == [
        answer.token_ids for answer in single.undisturbed
    ]
    single.until_all_are_ready()
