"""Requests that end early give back what they held. The `client` fixture checks that after
each test no request and no KV block is left on any stage."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from penstock.v1 import coordinator_pb2

from tests.support.client import Client, connect, make_request
from tests.support.local_mesh import LocalMesh

ROOT = Path(__file__).parents[2]
LONG = {"max_tokens": 4000, "ignore_eos": True}
MANY = 8
BLOCKS_OF_192_TOKENS = 12


def is_running(count: int) -> Callable[[coordinator_pb2.GetMeshResponse], bool]:
    def enough(mesh: coordinator_pb2.GetMeshResponse) -> bool:
        return mesh.requests_running == count and all(s.kv_blocks_used for s in mesh.stages)

    return enough


def test_cancelled_requests_give_their_blocks_back(client: Client) -> None:
    calls = [
        client.generation.Generate(make_request(prompt="Once upon a time", sampling=LONG))
        for _ in range(MANY)
    ]
    client.wait_for_mesh(is_running(MANY))
    for call in calls:
        call.cancel()
    client.wait_until_idle()


def test_a_request_that_is_cancelled_before_its_first_token_leaves_nothing(client: Client) -> None:
    request = make_request(token_ids=[1000] * 3000, sampling=LONG)
    for _ in range(MANY):
        client.generation.Generate(request).cancel()
    client.wait_until_idle()


def test_a_client_whose_process_is_killed_gives_its_blocks_back(
    client: Client, mesh: LocalMesh
) -> None:
    program = (
        "import sys, grpc\n"
        "from penstock.v1 import generation_pb2 as pb, generation_pb2_grpc\n"
        "stub = generation_pb2_grpc.GenerationServiceStub(grpc.insecure_channel(sys.argv[1]))\n"
        "sampling = pb.SamplingParameters(max_tokens=4000, ignore_eos=True)\n"
        "request = pb.GenerateRequest(prompt='Once upon a time', sampling=sampling)\n"
        "for response in stub.Generate(request): pass\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, mesh.address], cwd=ROOT) as process:
        client.wait_for_mesh(is_running(1))
        process.kill()
    client.wait_until_idle()


def test_a_closed_channel_gives_its_blocks_back(client: Client, mesh: LocalMesh) -> None:
    record = mesh.record
    with connect(gateway=record.gateway, coordinator=record.coordinators[0]) as other:
        call = other.generation.Generate(make_request(prompt="Once upon a time", sampling=LONG))
        next(call)
        client.wait_for_mesh(is_running(1))
    client.wait_until_idle()


def test_a_deadline_ends_the_request_with_its_status(client: Client) -> None:
    started_s = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        client.generate(prompt="Once upon a time", sampling=LONG, timeout_s=1.0)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started_s < 30
    client.wait_until_idle()


def test_a_stop_string_frees_the_request_behind_it(client: Client) -> None:
    sampling = LONG | {"temperature": 0.0, "stop": ["Friday"]}
    prompt = "The days of the week are Monday, Tuesday,"
    answer = client.generate(prompt=prompt, sampling=sampling)
    assert len(answer.token_ids) < 100
    client.wait_until_idle()


def test_more_requests_than_the_cache_holds_all_get_their_answers(client: Client) -> None:
    """Together they need more KV blocks than there are: some wait, or are preempted."""
    blocks = min(stage.kv_blocks_total for stage in client.mesh().stages)
    request = make_request(
        token_ids=[1000 + index % 7 for index in range(128)],
        sampling={"max_tokens": 64, "temperature": 0.0, "ignore_eos": True},
    )
    count = blocks // BLOCKS_OF_192_TOKENS + 8
    answers = client.send_all([request] * count)
    assert {tuple(answer.token_ids) for answer in answers} == {tuple(answers[0].token_ids)}
