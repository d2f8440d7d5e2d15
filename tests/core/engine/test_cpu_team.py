"""Several threads compute a micro-batch: the same bits as one, and no thread is left over."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from core.engine.cpu_team import ClockOf, CpuTeam
from core.kernels.arithmetic import Arithmetic
from core.models.llama.model import StageMember
from core.sampling.parameters import SamplingParameters
from tests.core.engine.conftest import OpenModel
from tests.support.arithmetics import host_arithmetics, integer_arithmetics, nibble_arithmetics
from tests.support.chain import Chain, Run

GREEDY = SamplingParameters(max_tokens=8, temperature=0.0)
DRAWN = SamplingParameters(max_tokens=8, temperature=1.0, seed=7, logprobs=2)
IDS = [int(token) for token in np.random.default_rng(5).integers(0, 256, 200)]
# Rows of each sequence in one micro-batch after the other: 64, 1, 2, 7, and 3 of each other's.
SCHEDULE = ({0: 64}, {0: 1}, {0: 1, 1: 1}, {1: 7}, {0: 1, 1: 3, 2: 3}, {2: 30, 3: 31}, {0: 1, 3: 1})
FloatArray = npt.NDArray[np.float32]


def logits_of(chain: Chain) -> list[FloatArray]:
    """All logits of the schedule."""
    for slot in range(4):
        chain.start(slot, GREEDY)
    logits = []
    for rows_of in SCHEDULE:
        runs = [Run(slot, IDS[slot : slot + count], 0) for slot, count in rows_of.items()]
        batch = chain._micro_batch(runs)
        logits.append(chain.engines[0].logits(batch, None).copy())
    for slot in range(4):
        chain.end(slot)
    return logits


def tokens_of(chain: Chain) -> list[tuple[int, ...]]:
    """Tokens of the schedule, some of them the likeliest, some drawn."""
    for slot in range(4):
        chain.start(slot, GREEDY if slot < 2 else DRAWN)
    tokens = [
        chain.step([Run(slot, IDS[slot : slot + count]) for slot, count in rows_of.items()])
        for rows_of in SCHEDULE
    ]
    for slot in range(4):
        chain.end(slot)
    return tokens


KINDS = [("mistral", one) for one in (*host_arithmetics(), *integer_arithmetics())]
KINDS += [("llama-mixed", one) for one in nibble_arithmetics()]
KINDS += [("llama-odd-sizes", Arithmetic("bf16", "portable"))]
CASES = [(name, one, "f32") for name, one in KINDS]
CASES += [(name, one, "bf16") for name, one in KINDS if one.number_format != "fp32"]


@pytest.mark.parametrize(
    ("name", "arithmetic", "wire"), CASES, ids=lambda case: getattr(case, "name", case)
)
def test_teams_of_any_size_compute_the_same_bits(
    name: str, arithmetic: Arithmetic, wire: str, open_model: Callable[[str], OpenModel]
) -> None:
    model = open_model(name)

    def chain(size: int) -> Chain:
        """A new one: a team that waits for cores pauses only after more than the schedule."""
        return Chain(
            model.checkpoint,
            model.config,
            number_format=arithmetic.number_format,
            wire=wire,
            arithmetic=arithmetic,
            num_kv_blocks=64,
            max_rows=64,
            num_threads=size,
        )

    expected, tokens = logits_of(chain(1)), tokens_of(chain(1))
    assert all(np.isfinite(part).all() for part in expected)
    for size in (2, 3):
        for part, other in zip(expected, logits_of(chain(size)), strict=True):
            np.testing.assert_array_equal(other, part)
        assert tokens_of(chain(size)) == tokens


class Members:
    """What members do, in Python, and who did it."""

    def __init__(self) -> None:
        self.computed: list[int] = []
        self._computes = threading.Semaphore(0)

    def lead(self, member: StageMember) -> None:
        self.computed.append(member.number)

    def help(self, member: StageMember) -> None:
        while os.read(member.call, 1):
            self.computed.append(member.number)
            self._computes.release()

    def wait(self) -> None:
        """For a helper that computes."""
        assert self._computes.acquire(timeout=10)


@pytest.mark.parametrize("clock_of", [None, lambda identity: time.CLOCK_MONOTONIC])
def test_as_many_members_compute_as_are_asked_for(clock_of: ClockOf | None) -> None:
    """Also where the system does not say how long other threads had a core."""
    members = Members()
    team = CpuTeam([members.lead, members.help, members.help], clock_of=clock_of)
    team.run(1)
    team.run(2)
    members.wait()
    assert sorted(members.computed) == [0, 0, 1]
    team.run(3)
    members.wait()
    members.wait()
    assert sorted(members.computed) == [0, 0, 0, 1, 1, 2]


def test_helpers_that_hang_do_not_keep_a_team_from_ending() -> None:
    goes_on = threading.Event()

    def hang(member: StageMember) -> None:
        goes_on.wait()

    before = set(threading.enumerate())
    team = CpuTeam([Members().lead, hang, hang])
    helpers = set(threading.enumerate()) - before
    del team
    gc.collect()
    assert [helper.is_alive() for helper in helpers] == [True, True]
    goes_on.set()
    for helper in helpers:
        helper.join()


def test_helpers_end_with_the_team() -> None:
    before = set(threading.enumerate())
    members = Members()
    team = CpuTeam([members.lead, members.help, members.help])
    assert len(set(threading.enumerate()) - before) == 2
    del team
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_helpers_end_with_the_engine(open_model: Callable[[str], OpenModel]) -> None:
    model = open_model("mistral")
    before = set(threading.enumerate())
    chain = Chain(model.checkpoint, model.config, num_kv_blocks=8, num_threads=3)
    assert len(set(threading.enumerate()) - before) == 2
    del chain
    gc.collect()
    assert set(threading.enumerate()) <= before
