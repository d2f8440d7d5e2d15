"""`python -m tests.benchmarks.peers`: ours and the peers in alternation, and the goals.

Each round, each system is started, does all work once, and is ended before the next one
starts; nothing else should run meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from services.cli.console import out as console
from services.cli.console import say
from services.local.catalogue import DEFAULT_MODEL
from services.local.fetch import resolve_model
from tests.benchmarks.machine import machine
from tests.benchmarks.peers.goals import Outcome, goals_table, outcomes
from tests.benchmarks.peers.memory import memory_limit
from tests.benchmarks.peers.results import Results, rates_table
from tests.benchmarks.peers.systems import PEERS, Contestant, mesh_options, ours, vllm_server
from tests.benchmarks.peers.trace_contest import (
    ARRIVALS,
    Contest,
    contest,
    contest_table,
    mesh_server,
)
from tests.benchmarks.peers.turns import Done, PeerFailed, Turn
from tests.benchmarks.peers.work import (
    Prompts,
    Work,
    decode,
    estimate_s,
    prefill,
    read_prompts,
    warm_up,
)

# At their own rates and the lower one servers get as many requests each, at about so many a second.
TRACE_ARRIVALS_S = 3 * ARRIVALS / 0.5
# How ours may be asked, and what its name then ends with.
_CALLS = {"many": "", "each": ", a call each"}


def main(
    streams: Annotated[
        str, typer.Option(envvar="PENSTOCK_STREAMS", help="Numbers of requests at once.")
    ] = "1 8 32 64 128 256",
    formats: Annotated[
        str, typer.Option(envvar="PENSTOCK_FORMATS", help="Our number formats.")
    ] = "int8 bf16",
    calls: Annotated[
        str,
        typer.Option(
            envvar="PENSTOCK_CALLS",
            help="How ours is asked: `many` requests in one call, one in `each`, or both.",
        ),
    ] = "many each",
    peers: Annotated[
        str, typer.Option(envvar="PENSTOCK_PEERS", help="Those to compare with.")
    ] = " ".join(PEERS),
    rounds: Annotated[int, typer.Option(envvar="PENSTOCK_ROUNDS", min=1)] = 3,
    seconds: Annotated[
        float,
        typer.Option(
            envvar="PENSTOCK_SECONDS",
            help="How long the trace saturates each server; 0 leaves the trace out.",
        ),
    ] = 60.0,
    json_path: Annotated[
        Path | None, typer.Option("--json", envvar="PENSTOCK_JSON", help="Where to write JSON.")
    ] = None,
    model: Annotated[str | None, typer.Option(envvar="PENSTOCK_MODEL")] = None,
    stages: Annotated[str | None, typer.Option(envvar="PENSTOCK_STAGES")] = None,
) -> None:
    """Measures, and prints the rates and the goals."""
    path = resolve_model(model or DEFAULT_MODEL)
    works = [decode(int(count)) for count in streams.split()] + [prefill()]
    results = Results()
    if seconds and "64" not in streams.split():
        raise typer.BadParameter("64 must be among the streams for the trace, or its seconds 0")
    if unknown := set(calls.split()) - set(_CALLS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; known: {', '.join(_CALLS)}")
    options, contestants = {}, []
    for number_format in formats.split():
        for call in calls.split():
            name = f"penstock {number_format}" + _CALLS[call]
            options[name] = mesh_options(number_format, model, stages)
            contestants.append(ours(name, options[name], one_call=call == "many"))
    logs = Path(tempfile.mkdtemp(prefix="penstock-peers-"))
    for name in peers.split():
        contestants += _prepare(name, path, logs, results)
    minutes = _minutes(contestants, works, rounds)
    if seconds:
        minutes += (2 * seconds + TRACE_ARRIVALS_S) / 60
    say(f"about {minutes:.0f} minutes; logs of the peers in {logs}")
    prompts = read_prompts(path)
    for turn in range(rounds):
        for contestant in contestants:
            say(f"round {turn + 1} of {rounds}, {contestant.name}")
            _take_turn(contestant, works, prompts, turn=turn, results=results)
    limits = {one.name: memory_limit(path, one.name, works) for one in contestants}
    goals = outcomes(results, memory_limits={k: v for k, v in limits.items() if v is not None})
    trace = _trace(results, path, options, logs, seconds=seconds) if seconds else None
    if trace is not None:
        goals += trace.outcomes()
    _show(results, works, goals, trace)
    if json_path is not None:
        json_path.write_text(
            json.dumps(_document(results, works, goals, rounds, trace), indent=1) + "\n"
        )


def _prepare(name: str, model: Path, logs: Path, results: Results) -> Sequence[Contestant]:
    """Installs a peer; one that cannot be had is noted, and the others run without it."""
    if name not in PEERS:
        raise typer.BadParameter(f"no such peer: {name}; known: {', '.join(PEERS)}")
    say(f"preparing {name} (the first time takes minutes)")
    try:
        return PEERS[name](model, logs)
    except PeerFailed as error:
        results.families[name] = name
        _note_failure(results, name, error)
        return []


def _take_turn(
    contestant: Contestant,
    works: Sequence[Work],
    prompts: Prompts,
    *,
    turn: int,
    results: Results,
) -> None:
    """One system's part of a round; where it fails, what it had done counts."""
    name = contestant.name
    results.families[name] = contestant.family
    try:
        with contestant.open() as system:
            results.start_s.setdefault(name, []).append(system.start_s)
            for work in (one for one in works if contestant.takes(one)):
                for wave in prompts.waves(warm_up(work), turn=turn):
                    system.run(wave)
                rate = _measure(system, name, work, prompts, turn=turn, results=results)
                say(f"  {work.name}: {rate:,.0f} tokens/s")
            peaks = results.peak_memory_bytes.setdefault(name, [])
            peaks.append(system.peak_memory())
    except PeerFailed as error:
        _note_failure(results, name, error)


def _measure(
    system: Turn, name: str, work: Work, prompts: Prompts, *, turn: int, results: Results
) -> float:
    """Does the work, checks that all of it was done, and keeps the rate."""
    done = [system.run(wave) for wave in prompts.waves(work, turn=turn)]
    _require_all(done, work)
    rate = work.counted_tokens / sum(one.seconds for one in done)
    figures = [one.figures for one in done if one.figures]
    results.add(name, work.name, rate=rate, figures=figures)
    return rate


def _require_all(done: Sequence[Done], work: Work) -> None:
    expected = work.num_requests * work.num_new_tokens
    got = sum(one.num_tokens for one in done)
    if got != expected:
        raise PeerFailed(f"{work.name}: {got} new tokens instead of {expected}")


def _note_failure(results: Results, name: str, error: PeerFailed) -> None:
    results.failures[name] = str(error)
    say(f"  {name} failed: {error}")


def _minutes(contestants: Sequence[Contestant], works: Sequence[Work], rounds: int) -> float:
    seconds = (
        estimate_s(
            [work for work in works if one.takes(work)],
            rate=one.rate,
            start_s=one.start_s,
            rounds=rounds,
        )
        for one in contestants
    )
    return sum(seconds) / 60


def _trace(
    results: Results,
    model: Path,
    options: Mapping[str, Sequence[str]],
    logs: Path,
    *,
    seconds: float,
) -> Contest | None:
    """The trace against vLLM's server, each side as it was fastest at 64 streams."""
    mine = results.best("decode 64", results.of_family("penstock"))
    single = [name for name in results.of_family("vllm") if not name.endswith("pipelined")]
    theirs = results.best("decode 64", single)
    if mine is None or theirs is None:
        return None
    say(f"the trace: {mine[0]} and the server of {theirs[0]}")
    try:
        servers = {
            theirs[0]: vllm_server(model, theirs[0], logs),
            mine[0]: mesh_server(options[mine[0]]),
        }
        return asyncio.run(
            contest(servers, ours=mine[0], theirs=theirs[0], seconds=seconds, say=say)
        )
    except PeerFailed as error:
        _note_failure(results, "trace", error)
        return None


def _show(
    results: Results, works: Sequence[Work], goals: Sequence[Outcome], trace: Contest | None
) -> None:
    say()
    console.print(rates_table(results, [work.name for work in works]))
    for name, failure in results.failures.items():
        say(f"{name} failed: {failure}")
    if trace is not None:
        say()
        console.print(contest_table(trace))
    say()
    console.print(goals_table(goals))


def _document(
    results: Results,
    works: Sequence[Work],
    goals: Sequence[Outcome],
    rounds: int,
    trace: Contest | None,
) -> dict[str, object]:
    """What goes into the JSON file."""
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "rounds": rounds,
        "works": [asdict(work) for work in works],
        "results": asdict(results),
        "trace": None if trace is None else asdict(trace),
        "goals": [asdict(goal) for goal in goals],
    }


if __name__ == "__main__":
    typer.run(main)
