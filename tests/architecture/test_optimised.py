"""Under `python -O`, where asserts are gone, the same bytes are refused.

pytest writes the asserts of test modules anew, as `if not ...: raise`, so that they hold there too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS_OF_BYTES = (
    "tests/core/weights",
    "tests/core/wire",
    "tests/core/sampling/test_validation.py",
    "tests/core/pipeline/test_stage_answers.py",
    "tests/services/gateway/test_bad_input.py",
)
# That asserts outside of test modules are gone is what is wanted.
NO_WARNING = "ignore:assertions not in test modules:pytest.PytestConfigWarning"


def run_optimised(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-W", NO_WARNING, *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_asserts_of_tests_hold_and_those_of_other_modules_are_gone(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("assert False\n")
    (tmp_path / "test_it.py").write_text(
        "import other\n\ndef test_holds():\n    assert True\n\n"
        "def test_fails():\n    assert False\n"
    )
    ended = run_optimised(f"--rootdir={tmp_path}", str(tmp_path))
    assert "1 failed, 1 passed" in ended.stdout


@pytest.mark.timeout(600)
def test_the_checks_of_bytes_pass_without_asserts() -> None:
    ended = run_optimised(*CHECKS_OF_BYTES)
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert " passed" in ended.stdout
