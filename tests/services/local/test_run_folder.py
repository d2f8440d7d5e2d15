from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import Exhausted
from services.local.run_folder import (
    MeshRecord,
    RunFolder,
    default_folder,
    find_process,
    record_process,
)


def a_record() -> MeshRecord:
    supervisor = record_process("supervisor", os.getpid(), log="mesh.log")
    return MeshRecord(
        model="tiny",
        model_path="/models/tiny.gguf",
        number_format="bf16",
        gateway="127.0.0.1:8001",
        coordinators=("127.0.0.1:9000",),
        processes=(supervisor,),
    )


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write(a_record())
    assert folder.read() == a_record()


def test_a_second_claim_is_refused_with_pid_port_and_what_to_do(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.claim():
        folder.write(a_record())
        with pytest.raises(Exhausted, match=rf"pid {os.getpid()}, port 8001.*make stop"):
            folder.refuse_if_claimed()


def test_two_processes_cannot_claim_one_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from services.local.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).claim(): print('claimed')"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with RunFolder(tmp_path).claim():
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    taken = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "a mesh is already starting" in refused.stderr
    assert taken.stdout == "claimed\n"


def test_a_claim_ends_with_its_owner_and_takes_the_record_along(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.claim():
        folder.write(a_record())
        assert folder.running() == a_record()
    assert folder.running() is None
    assert folder.read() is None


def test_a_record_left_by_a_killed_supervisor_does_not_count_as_running(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write(a_record())
    assert folder.running() is None
    folder.refuse_if_claimed()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"processes": 3}', '{"processes": [{}]}'])
def test_a_damaged_record_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "mesh.json").write_text(text)
    assert RunFolder(tmp_path).read() is None


def test_a_later_process_with_the_same_pid_is_not_mistaken() -> None:
    record = a_record().supervisor
    assert find_process(record) is not None
    assert find_process(replace(record, started_at=record.started_at - 60)) is None


def test_the_default_folder_follows_the_runtime_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_folder() == tmp_path / "penstock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert default_folder() == Path.home() / ".cache" / "penstock" / "run"
