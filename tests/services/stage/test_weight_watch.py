"""Weights that change in memory are noticed, and the stage that has them serves nobody."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.channels import open_channel
from services.stage.process import run_stage
from services.stage.settings import StageSettings
from services.stage.weight_watch import PIECE_BYTES, WeightWatch
from tests.support.counting_engine import CountingEngine, counting_model
from tests.support.metrics import scrape
from tests.support.stages import TIMEOUT_S, ControlStream

NUM_WORDS = (PIECE_BYTES + 4096) // 4  # two pieces


def arrays() -> dict[str, np.ndarray]:
    return {
        "panels": np.arange(NUM_WORDS, dtype=np.uint32),
        "nothing": np.zeros((0, 8), np.float32),
        "embedding": np.arange(64, dtype=np.uint16).reshape(8, 8),
    }


def test_unchanged_weights_are_found_unchanged_and_counted() -> None:
    watch = WeightWatch(arrays(), interval_s=60)
    assert list(islice(watch.check(), 6)) == [""] * 6
    assert watch.num_bytes_checked == 2 * (NUM_WORDS * 4 + 128)


@pytest.mark.parametrize("word", [0, NUM_WORDS - 1])
def test_one_flipped_bit_is_found_in_the_piece_that_has_it(word: int) -> None:
    weights = arrays()
    watch = WeightWatch(weights, interval_s=60)
    weights["panels"][word] ^= 1 << 30
    expected = ["panels", "", ""] if word == 0 else ["", "panels", ""]
    assert list(islice(watch.check(), 3)) == expected


def test_without_an_interval_nothing_is_hashed() -> None:
    watch = WeightWatch(arrays(), interval_s=0)
    watch.start(lambda _: pytest.fail("nothing was to be hashed"))
    assert "weight-watch" not in {thread.name for thread in threading.enumerate()}


class Facts(logging.Handler):
    """The ports of the stage, once it listens."""

    def __init__(self) -> None:
        super().__init__()
        self.found: asyncio.Future[logging.LogRecord] = asyncio.get_running_loop().create_future()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "stage listens":
            self.found.set_result(record)


async def test_a_stage_whose_weights_change_raises_the_alarm_and_serves_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    weights = arrays()
    engine = CountingEngine(is_first=True, is_last=True)
    watch = WeightWatch(weights, interval_s=0.01)
    model = replace(counting_model(engine, index=0, num_stages=1), watch=watch)
    settings = StageSettings(
        model=Path("none"),
        name="fake",
        first_layer=0,
        end_layer=1,
        listen="127.0.0.1:0",
        metrics_port=0,
    )
    facts = Facts()
    logging.getLogger("services.stage").addHandler(facts)
    stage = asyncio.create_task(run_stage(settings, load=lambda _: model))
    try:
        record = await asyncio.wait_for(facts.found, TIMEOUT_S)
        address = f"127.0.0.1:{record.port}"  # type: ignore[attr-defined]
        async with ControlStream(address) as control:
            await control.open(epoch=1, index=0, num_stages=1)
            await control.next("ready")
            weights["panels"][7] ^= 1
            failure = await control.failure()
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        assert "have changed in memory: panels" in (failure.details() or "")
        async with ControlStream(address) as control:
            await control.open(epoch=2, index=0, num_stages=1)
            assert (await control.failure()).code() is grpc.StatusCode.UNAVAILABLE
        async with open_channel(address) as channel:
            for name in ("", "fake/stage/0"):
                request = health_pb2.HealthCheckRequest(service=name)
                answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S)
                assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        samples = await asyncio.to_thread(scrape, record.metrics_port)  # type: ignore[attr-defined]
        assert samples.value("penstock_stage_weights_damaged") == 1
        assert samples.value("penstock_stage_weights_checked_bytes_total") > 0
        alarms = [one for one in caplog.records if one.levelno == logging.ERROR]
        assert [one.getMessage() for one in alarms] == ["weights damaged"]
    finally:
        logging.getLogger("services.stage").removeHandler(facts)
        stage.cancel()
        await asyncio.gather(stage, return_exceptions=True)
