"""A run under CI fails when a test is skipped that nobody allowed to be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_pytest(folder: Path, reason: str, *, ci: str) -> subprocess.CompletedProcess[str]:
    """Runs one skipped and one passing test with our plugin."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_one.py").write_text(
        f"import pytest\ndef test_a(): pytest.skip({reason!r})\ndef test_b(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    environment = os.environ | {"CI": ci, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [*command, str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("reason", "ci", "code"),
    [
        ("it is Sunday", "true", 1),
        ("it is Sunday", "", 0),
        ("no CUDA device: none was found", "true", 0),
    ],
)
def test_a_skip_fails_the_run_only_under_ci_and_only_when_not_allowed(
    tmp_path: Path, reason: str, ci: str, code: int
) -> None:
    done = run_pytest(tmp_path, reason, ci=ci)
    assert done.returncode == code, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    assert ("test_one.py::test_a: it is Sunday" in done.stdout) == (code == 1)
