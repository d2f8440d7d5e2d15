"""The comparison's own arithmetic, and that a turn really ends what it started."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.benchmarks.peers.goals import Outcome, goals_table, outcomes
from tests.benchmarks.peers.memory import memory_limit, most_tokens
from tests.benchmarks.peers.results import Results, peak_memory, rates_table, spread
from tests.benchmarks.peers.turns import Child, PeerFailed, child_turn
from tests.benchmarks.peers.work import Prompts, Wave, decode, estimate_s, prefill, warm_up
from tests.benchmarks.report import Figures, StageShares

CHILDREN = Path(__file__).parent / "children"


def some_results() -> Results:
    results = Results()
    rounds = {
        "penstock int8": ("penstock", (900, 1600, 2000)),
        "penstock bf16": ("penstock", (1200, 1000, 1100)),
        "vllm bf16": ("vllm", (1000, 500, 2000)),
        "vllm w8a8": ("vllm", (800, 900, 700)),
    }
    for name, (family, rates) in rounds.items():
        results.families[name] = family
        for rate in rates:
            results.add(name, "decode 64", rate=rate, figures=[])
    return results


def outcome(rows: list[Outcome], measure: str, goal: str) -> Outcome:
    return next(row for row in rows if (row.measure, row.goal) == (measure, goal))


def test_a_rate_is_the_median_over_the_rounds() -> None:
    results = some_results()
    assert results.rate("penstock int8", "decode 64") == 1600
    assert results.rate("penstock int8", "decode 8") is None
    assert results.rate("unknown", "decode 64") is None


def test_the_best_of_a_family_is_chosen_by_its_median() -> None:
    results = some_results()
    assert results.best("decode 64", results.of_family("vllm")) == ("vllm bf16", 1000)
    assert results.best("prefill", results.of_family("vllm")) is None


def test_a_goal_compares_the_best_of_ours_with_the_best_of_theirs() -> None:
    results = some_results()
    results.figures["penstock int8"]["decode 64"] = [mesh_figures()]
    results.start_s["penstock int8"] = [3.0]
    rows = outcomes(results, memory_limits={})
    best = outcome(rows, "decode 64, tokens/s", ">= 1.6 x")
    assert best.ratio == pytest.approx(1.6)
    assert best.met
    bf16 = outcome(rows, "decode 64, tokens/s", ">= 1.2 x")
    assert bf16.ratio == pytest.approx(1.1)
    assert bf16.met is False


def test_a_goal_with_one_side_missing_is_neither_met_nor_missed() -> None:
    results = some_results()
    del results.rates["vllm bf16"], results.rates["vllm w8a8"]
    results.figures["penstock int8"]["decode 64"] = [mesh_figures()]
    results.start_s["penstock int8"] = [3.0]
    rows = outcomes(results, memory_limits={})
    missing = outcome(rows, "decode 64, tokens/s", ">= 1.6 x")
    assert (missing.ratio, missing.met, missing.against) == (None, None, "not measured")
    assert not any(row.measure.startswith("prefill") for row in rows)


def mesh_figures() -> Figures:
    latencies = dict.fromkeys(
        ("ttft_p50_ms", "ttft_p99_ms", "inter_token_p50_ms", "inter_token_p99_ms"), 1.0
    )
    stages = [
        StageShares(name="stage-0", busy=0.9, starved=0.05, wire=0.0, serialise=0.0),
        StageShares(name="stage-1", busy=0.7, starved=0.25, wire=0.0, serialise=0.0),
    ]
    return Figures(
        load="",
        duration_s=1.0,
        requests=1,
        tokens_per_s=1.0,
        prompt_tokens_per_s=1.0,
        stages=stages,
        cpu_us_per_token={"gateway": 30.0, "coordinator": 60.0, "stage-0": 900.0},
        **latencies,
    )


def test_what_concerns_ours_alone_is_read_off_the_fastest_format() -> None:
    results = some_results()
    results.figures["penstock int8"]["decode 64"] = [mesh_figures()]
    results.start_s["penstock int8"] = [3.0, 5.0, 4.5]
    results.peak_memory_bytes["penstock int8"] = [{"gateway": 2**20, "stage-0": 2**21}]
    rows = outcomes(results, memory_limits={"penstock int8": 2**22})
    by_measure = {row.measure: row for row in rows}
    starved = by_measure["starved share of the slowest stage, 64 streams"]
    assert (starved.ratio, starved.met) == (pytest.approx(0.05 / 0.08), True)
    services = by_measure["gateway + coordinator CPU a token, 64 streams"]
    assert (services.ratio, services.met) == (pytest.approx(90 / 80), False)
    assert by_measure["start to first token"].met is False
    assert by_measure["memory of all processes"].ratio == pytest.approx(3 / 4)


def test_memory_is_of_all_processes_together_in_the_worst_round() -> None:
    results = Results()
    results.peak_memory_bytes["one"] = [{"a": 5, "b": 6}, {"a": 9, "b": 1}]
    assert peak_memory(results, "one") == 11
    assert peak_memory(results, "other") is None


def test_a_spread_shows_median_and_range() -> None:
    assert spread([1200.0, 1000.0, 1100.0]) == "1,100 [1,000-1,200]"
    assert spread([1234.5]) == "1,234"


def test_the_tables_show_what_is_missing_as_missing() -> None:
    results = some_results()
    results.families["llamacpp"] = "llamacpp"
    table = rates_table(results, ["decode 64", "prefill"])
    assert list(table.columns[1].cells)[-1] == "-"
    assert set(table.columns[2].cells) == {"-"}
    row = Outcome(measure="m", ours="o", against="a", ratio=None, goal="g", met=None)
    (cells,) = zip(*(column.cells for column in goals_table([row]).columns), strict=True)
    assert cells == ("m", "o", "a", "-", "g", "-")


def test_all_systems_get_the_same_prompts_and_no_prompt_comes_twice() -> None:
    work = decode(8)
    prompts = Prompts(list(range(5000)))
    first, again = (list(prompts.waves(work, turn=0)) for _ in range(2))
    other_round = list(prompts.waves(work, turn=1))
    assert first == again
    assert first != other_round
    seen = [tuple(prompt) for wave in first for prompt in wave.prompts]
    assert len(set(seen)) == len(seen) == work.num_requests == 16
    assert {len(prompt) for prompt in seen} == {16}
    assert [len(wave.prompts) for wave in first] == [8, 8]


def test_the_warm_up_is_the_same_load_on_other_prompts() -> None:
    work = decode(1)
    prompts = Prompts(list(range(5000)))
    (wave,) = prompts.waves(warm_up(work), turn=0)
    assert wave.num_new_tokens == 4
    assert wave.prompts[0] not in [p for one in prompts.waves(work, turn=0) for p in one.prompts]


def test_the_rate_of_prefill_counts_prompts_and_that_of_decoding_new_tokens() -> None:
    assert decode(64).counted_tokens == 64 * 128
    assert decode(1).counted_tokens == decode(1).num_requests * 128
    assert prefill().counted_tokens == prefill().num_requests * 1024


def test_the_estimate_counts_starts_and_work_of_every_round() -> None:
    works = [decode(64), prefill()]
    tokens = sum(work.counted_tokens for work in works)
    assert estimate_s(works, rate=lambda _: 100.0, start_s=10.0, rounds=3) == pytest.approx(
        3 * (10 + 1.1 * tokens / 100)
    )


@pytest.mark.parametrize("caches_bytes", [False, True])
def test_the_memory_limit_follows_the_weights_the_kv_and_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caches_bytes: bool
) -> None:
    from tests.support.models import TINY_MODELS, write_gguf

    monkeypatch.setattr("services.local.partition.caches_bytes", lambda _: caches_bytes)
    tiny = TINY_MODELS["llama-tied"]
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny)
    works = [decode(4), replace(prefill(), streams=1)]
    assert most_tokens(works) == 1025
    int8, int4 = (memory_limit(path, f"penstock {one}", works) for one in ("int8", "int4"))
    head_bytes = tiny.head_dim + 4 if caches_bytes else 2 * tiny.head_dim
    kv_bytes = 1025 * tiny.num_layers * 2 * tiny.num_kv_heads * head_bytes
    assert int8 - kv_bytes - 4 * 400_000_000 == pytest.approx(
        2 * (int4 - kv_bytes - 4 * 400_000_000), abs=2
    )
    assert memory_limit(path, "penstock bf16", works) is None


def test_weights_are_rounded_row_by_row_to_int8() -> None:
    torch = pytest.importorskip("torch")
    from tests.benchmarks.peers.export import quantise_rows

    weight = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32))
    values, scale = quantise_rows(weight)
    assert values.dtype == torch.int8
    assert values.abs().amax(dim=1).tolist() == [127] * 5
    assert (values * scale - weight).abs().max() <= scale.max() / 2 + 1e-6


PEER = """
import subprocess, sys
sys.path.insert(0, {children!r})
from protocol import answer_tasks

def load(options):
    print("a peer prints what it likes")
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    if options["broken"]:
        raise SystemExit("no such model")
    return lambda prompts, num_new_tokens: len(prompts) * num_new_tokens

answer_tasks(load)
"""


def peer(folder: Path, *, broken: bool = False) -> Child:
    script = folder / "peer.py"
    script.write_text(PEER.format(children=str(CHILDREN)))
    return Child(
        python=Path(sys.executable),
        script=script,
        options={"broken": broken},
        environment={"PATH": os.environ["PATH"]},
    )


@pytest.mark.timeout(60)
def test_a_peer_answers_through_its_pipe_and_is_ended_with_its_children(tmp_path: Path) -> None:
    others = psutil.Process().children(recursive=True)
    with child_turn(peer(tmp_path), log=tmp_path / "log") as turn:
        done = turn.run(Wave(prompts=[[1, 2], [3]], num_new_tokens=7))
        family = set(psutil.Process().children(recursive=True)) - set(others)
        peaks = turn.peak_memory()
    assert done.num_tokens == 14
    assert done.seconds >= 0
    assert len(peaks) == len(family) == 2
    assert "what it likes" in (tmp_path / "log").read_text()
    assert not any(one.is_running() and one.status() != "zombie" for one in family)


@pytest.mark.timeout(60)
def test_a_peer_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(PeerFailed, match="no such model"),
        child_turn(peer(tmp_path, broken=True), log=tmp_path / "log"),
    ):
        pass
