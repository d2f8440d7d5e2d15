"""The commands as a user types them, against the running mesh or with none."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from services.local.number_format import automatic_formats
from services.local.run_folder import find_process
from tests.support.client import Client, connect
from tests.support.local_mesh import ROOT, START_TIMEOUT_S, LocalMesh

PROMPT = "The days of the week are Monday, Tuesday,"


@pytest.fixture
def no_mesh(tmp_path: Path) -> LocalMesh:
    """A run folder in which nothing runs."""
    return LocalMesh(runtime=tmp_path, environment={})


def make(mesh: LocalMesh, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=mesh.variables(),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def one_line(text: str) -> str:
    (line,) = text.strip().splitlines()
    return line


def test_status_shows_each_stage(mesh: LocalMesh, client: Client) -> None:
    done = mesh.run("status")
    assert done.returncode == 0, done.stderr
    headline, columns, *stages = done.stdout.strip().splitlines()
    assert headline.startswith(
        f"smollm2-135m-instruct ({automatic_formats()[0]}, f32 on the wire), "
        f"cut into {client.mesh().split}, at {mesh.address}, "
    )
    assert "KV blocks" in columns
    states = client.mesh().stages
    assert len(stages) == len(states) == 2
    for row, state in zip(stages, states, strict=True):
        assert f"{state.first_layer}:{state.end_layer}" in row
        assert re.search(rf"0/{state.kv_blocks_total}\b", row)
        assert " ready " in row


def test_each_stage_has_read_only_its_own_part_of_the_file(mesh: LocalMesh, client: Client) -> None:
    size = Path(mesh.record.model_path).stat().st_size
    read = [stage.bytes_read for stage in client.mesh().stages]
    assert all(0.2 * size < one < 0.8 * size for one in read)


def test_a_second_start_is_refused_in_one_line(mesh: LocalMesh) -> None:
    done = mesh.run("mesh", "--detach")
    port = mesh.address.rpartition(":")[2]
    pid = mesh.record.supervisor.pid
    assert done.returncode != 0
    assert one_line(done.stderr) == (
        f"error: a mesh is already running (pid {pid}, port {port}): stop it with `make stop`"
    )


def test_generate_streams_what_the_public_api_says_greedily_by_default(
    mesh: LocalMesh, client: Client
) -> None:
    done = mesh.run("generate", "--raw", "--max-tokens", "8", PROMPT)
    answer = client.generate(prompt=PROMPT, sampling={"temperature": 0.0, "max_tokens": 8})
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer.text + "\n"


def test_generate_prints_usage_to_stderr(mesh: LocalMesh) -> None:
    done = mesh.run("generate", "--usage", "--max-tokens", "3", "--ignore-eos", "Hello")
    assert re.match(r"LENGTH: \d+ prompt tokens \(\d+ cached\), 3 completion tokens", done.stderr)


def test_generate_shows_a_refusal_in_one_line(mesh: LocalMesh) -> None:
    done = mesh.run("generate", "--temperature", "-1", "Hello")
    assert done.returncode == 1
    assert one_line(done.stderr).startswith("error: INVALID_ARGUMENT: sampling.temperature is -1")


@pytest.mark.parametrize(
    "prompt", ['It\'s "quoted" & $HOME `id` \\ $(shell id) #1', "two\nlines", "$$PATH %d {x}"]
)
def test_make_hands_a_prompt_on_as_it_is(mesh: LocalMesh, client: Client, prompt: str) -> None:
    options = ("RAW=1", "TEMPERATURE=1", "SEED=5", "MAX_TOKENS=12")
    done = make(mesh, "generate", f"PROMPT={prompt}", *options)
    assert done.returncode == 0, done.stderr
    sampling = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    answer = client.generate(prompt=prompt, sampling=sampling)
    assert done.stdout == answer.text + "\n"


def test_ctrl_c_ends_generate_and_frees_its_blocks(mesh: LocalMesh, client: Client) -> None:
    with mesh.popen("generate", "--max-tokens", "4000", "--ignore-eos", "Hello") as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130
    assert b"Traceback" not in rest
    client.wait_until_idle()


def test_status_and_generate_say_when_no_mesh_runs(no_mesh: LocalMesh) -> None:
    assert "no mesh is running" in one_line(no_mesh.run("status").stderr)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = taken.getsockname()[1]
    done = no_mesh.run("generate", "--address", f"127.0.0.1:{closed}", "Hello")
    assert done.returncode == 1
    assert one_line(done.stderr).startswith("error: UNAVAILABLE")


def test_stop_without_a_mesh_is_no_error(no_mesh: LocalMesh) -> None:
    done = no_mesh.run("stop")
    assert (done.returncode, done.stdout) == (0, "no mesh is running\n")


@pytest.mark.parametrize("option", ["--grpc-port", "--metrics-port"])
def test_a_taken_port_is_refused_in_one_line(no_mesh: LocalMesh, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        other = {"--grpc-port", "--metrics-port"} - {option}
        done = no_mesh.run("mesh", option, port, other.pop(), "0")
    assert done.returncode == 2
    assert port in one_line(done.stderr)
    assert "another process listens" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no-such-model"], "smollm2-135m-instruct"),
        (["--model", "/no/such/file.gguf"], "/no/such/file.gguf"),
        (["--stages", "0"], "stages is 0"),
        (["--stages", "31"], "30"),
        (["--dtype", "int3"], "bf16"),
        (["--split", "0:10,11:30"], "split"),
        (["--split", "0:10,10:29"], "30"),
        (["--split", "nonsense"], "FIRST:END"),
        (["--kv-memory", "much"], "512MiB"),
        (["--kv-memory", "100TiB"], "102400.00 GiB"),
        (["--kv-memory", "1KiB"], "KiB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_started_is_refused_in_one_line(
    no_mesh: LocalMesh, arguments: list[str], words: str
) -> None:
    done = no_mesh.run("mesh", "--grpc-port", "0", "--metrics-port", "0", *arguments)
    assert done.returncode == 2
    assert words in one_line(done.stderr)
    assert done.stdout == ""


def test_a_damaged_weight_file_is_one_line_and_starts_nothing(
    no_mesh: LocalMesh, mesh: LocalMesh, tmp_path: Path
) -> None:
    whole = Path(mesh.record.model_path).read_bytes()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(whole[: len(whole) // 2])
    done = no_mesh.run("mesh", "--model", str(damaged), "--grpc-port", "0", "--metrics-port", "0")
    assert done.returncode != 0
    assert "damaged.gguf" in one_line(done.stderr)


def test_plan_shows_the_table_and_starts_nothing(no_mesh: LocalMesh) -> None:
    done = no_mesh.run("plan", "--stages", "3")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\s*\d+\s+\d+:\d+", done.stdout, re.MULTILINE)) == 3
    assert no_mesh.run_folder.read() is None


def test_a_foreground_mesh_answers_and_ends_on_ctrl_c(no_mesh: LocalMesh) -> None:
    with no_mesh.popen(
        "mesh", "--grpc-port", "0", "--metrics-port", "0", "--kv-memory", "96MiB", "--stages", "1"
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.decode())
            if "Ctrl-C ends it" in lines[-1]:
                break
        printed = "".join(lines)
        assert "stage 0 ready: layers 0:30" in printed, printed
        assert "buf curl" in printed
        (fork_server,) = psutil.Process(process.pid).children()
        parts = fork_server.children()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read().decode()
    assert process.returncode == 0
    assert rest == ""
    assert len(parts) == 3
    assert not any(child.is_running() for child in (fork_server, *parts))


def test_a_mesh_in_the_background_survives_a_stage_and_ends_on_stop(
    no_mesh: LocalMesh,
) -> None:
    no_mesh.start("--kv-memory", "96MiB")
    try:
        record = no_mesh.record
        stage = record.processes[2]
        killed = find_process(stage)
        assert killed is not None
        with connect(gateway=record.gateway, coordinator=record.coordinators[0]) as client:
            killed.kill()
            client.wait_for_mesh(lambda now: not now.stages[1].ready)
            client.wait_for_mesh(
                lambda now: all(one.ready for one in now.stages) and now.model.ready,
                timeout_s=START_TIMEOUT_S / 2,
            )
            answer = client.generate(prompt=PROMPT, sampling={"temperature": 0.0, "max_tokens": 8})
        assert answer.text.startswith(" Wednesday, Thursday")
        log = no_mesh.run_folder.log_path("mesh").read_text()
        assert "stage-1 ended (signal SIGKILL" in log
        processes = no_mesh.record.processes
    finally:
        no_mesh.stop()
    assert not any(find_process(process) for process in processes)
    assert no_mesh.run_folder.read() is None
