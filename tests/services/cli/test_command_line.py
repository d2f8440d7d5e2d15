"""The command line itself: its options, its Makefile, its messages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer.main

from core.errors import CorruptWeights, InvalidInput, NotFound, PlanImpossible, Unavailable
from services.cli import asking, console
from services.cli.app import app
from services.cli.how_to_call import how_to_call

ROOT = Path(__file__).parents[3]
MAKEFILE = (ROOT / "Makefile").read_text()

# Adding an option is a decision: it is made here, too.
SHARED = ["--model", "--stages", "--dtype", "--split"]
SAMPLING = [
    *("--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty"),
    *("--presence-penalty", "--frequency-penalty", "--seed", "--stop", "--stop-token-id"),
    "--ignore-eos",
]
OPTIONS = {
    "mesh": [
        *(*SHARED, "--replicas", "--spares", "--coordinators", "--slow", "--device", "--wire"),
        *("--kv-memory", "--prefix-cache", "--speculation", "--require-keys", "--key"),
        *("--grpc-port", "--metrics-port", "--threads", "--shortcuts", "--certs", "--detach"),
        *("--seal-keys", "--manifest", "--rehash-minutes"),
    ],
    "stop": [],
    "status": [],
    "update": ["--stage", "--weights", "--key"],
    "repartition": ["--split", "--stages", "--now", "--key"],
    "generate": [
        *("--raw", "--system", *SAMPLING, "--timeout"),
        *("--model", "--address", "--ca", "--key", "--usage"),
    ],
    "tokenize": ["--model", "--address", "--ca", "--key"],
    "certs init": ["--folder", "--mesh", "--stages", "--host", "--days", "--replace"],
    "certs renew": ["--folder", "--host", "--days", "--revoke"],
    "models": [],
    "pull": [],
    "plan": ["--stages", "--dtype", "--split", "--seal-keys", "--memory"],
    "manifest make": ["--to"],
    "manifest verify": ["--manifest"],
    "seal keygen": ["--stages", "--seal-keys"],
    "seal make": ["--to", "--stages", "--split", "--for", "--version", "--seal-keys"],
    "seal rewrap": ["--stages", "--split", "--for", "--revoke", "--keep", "--seal-keys"],
    "seal show": ["--seal-keys"],
    "warm": ["--dtype"],
    "keys create": [
        *("--tenant", "--scopes", "--models", "--expires", "--max-streams", "--tokens-per-minute"),
        *("--max-prompt-tokens", "--max-output-tokens", "--max-priority"),
    ],
    "keys list": [],
    "keys revoke": [],
    "audit verify": ["--expect-head"],
    "audit show": [],
}


def commands() -> dict[str, Any]:
    """All of them; those within a group by both names."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", {})
        found |= {f"{name} {part}": one for part, one in inner.items()} or {name: command}
    return found


def penstock(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_options_are_those_that_were_decided() -> None:
    found = {
        name: sorted(
            option
            for parameter in command.params
            for option in parameter.opts
            if option.startswith("--")
        )
        for name, command in commands().items()
    }
    assert found == {name: sorted(options) for name, options in OPTIONS.items()}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_command_says_what_it_does_and_takes(name: str) -> None:
    command = commands()[name]
    assert command.help
    assert all(p.help for p in command.params if p.name != "help"), name


def test_every_option_of_make_reaches_a_program() -> None:
    block = re.search(r"^OPTIONS := ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    assert block is not None
    options = block[1].replace("\\\n", " ").split()
    programs = ("services", "tests/benchmarks", "tests/chaos", "tests/security")
    sources = [source for room in programs for source in (ROOT / room).rglob("*.py")]
    read = set(
        re.findall(r"PENSTOCK_([A-Z_]+)", "".join(p.read_text() for p in sources) + MAKEFILE)
    )
    assert set(options) <= read
    assert len(options) == len(set(options))


def test_make_help_names_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    shown = set(re.findall(r"^  make ([\w-]+)", done.stdout, re.MULTILINE))
    assert shown == set(phony[1].split())


def test_an_unknown_command_and_option_are_usage_errors() -> None:
    assert penstock("dance").returncode == 2
    assert penstock("mesh", "--dance").returncode == 2


def test_a_refusal_is_one_line_whatever_it_quotes() -> None:
    done = penstock("plan", "[bold]no such\nmodel")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "[bold]no such" in line


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("stages", 0, "1 to 30"), 2),
        (NotFound("no such model"), 2),
        (PlanImpossible("too big"), 2),
        (CorruptWeights("half a file"), 1),
        (Unavailable("a stage ended"), 1),
    ],
)
def test_exit_codes_tell_wrong_commands_from_failures(error: Exception, code: int) -> None:
    assert console.exit_code(error) == code


def test_sizes_are_shown_with_three_digits() -> None:
    sizes = [0, 999, 1024, 93_800_000, 2**30, 5 * 2**40, 2**60]
    shown = [console.format_bytes(size) for size in sizes]
    assert shown == ["0 B", "999 B", "1.0 KiB", "89.5 MiB", "1.0 GiB", "5.0 TiB", "1048576 TiB"]


async def test_a_call_that_reaches_nobody_is_described_by_its_status() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/a/b")(b"", timeout=10)
    assert console.describe_rpc_error(caught.value).startswith("UNAVAILABLE: ")


def test_a_question_where_no_mesh_runs_is_told_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(asking, "DEFAULT_ADDRESS", "127.0.0.1:1")  # nobody listens there
    with pytest.raises(Unavailable, match="start one with `make mesh`"):
        asking.tokenize("a")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--max-tokens", 2**32), ("--top-k", 2**32)),
        *(("--seed", 2**64), ("--stop-token-id", 2**32)),
    ],
)
def test_numbers_too_big_for_their_fields_are_usage_errors(option: str, value: int) -> None:
    done = penstock("generate", "a", option, str(value))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert option in done.stderr


def test_the_python_example_is_python_and_names_the_address() -> None:
    text = how_to_call("127.0.0.1:8001")
    python = text.split("From the command line")[0].split("\n\n", 1)[1]
    code = "\n".join(line.removeprefix("    ") for line in python.splitlines())
    compile(code, "example", "exec")
    assert text.count("127.0.0.1:8001") == 3


def test_pull_without_a_name_says_which_names_there_are() -> None:
    done = penstock("pull", "--", "")
    assert done.returncode == 2
    assert "NAME is ''" in done.stderr
    assert "smollm2-135m-instruct" in done.stderr
