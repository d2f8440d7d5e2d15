"""What processes import decides how fast they start and how much memory they take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def loaded_modules(program: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after running `program`."""
    command = [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "services.gateway.__main__",
        "services.coordinator.__main__",
        "services.stage.__main__",
        "services.local.__main__",
        "services.cli.app",
    ],
)
def test_no_process_imports_torch_or_transformers_to_start(module: str) -> None:
    loaded = loaded_modules(f"import {module}")
    assert module in loaded
    assert not {"torch", "transformers"} & loaded


def test_what_is_imported_ahead_is_no_torch_either() -> None:
    program = "from services.local.fork_server import preload; preload()"
    assert not {"torch", "transformers"} & loaded_modules(program)


@pytest.mark.parametrize("module", ["services.gateway.__main__", "services.coordinator.__main__"])
def test_what_only_passes_tokens_on_compiles_nothing(module: str) -> None:
    assert not {"numba", "llvmlite"} & loaded_modules(f"import {module}")


def test_all_of_core_imports_without_the_network_stack() -> None:
    program = (
        "import importlib, pkgutil, core\n"
        "names = [m.name for m in pkgutil.walk_packages(core.__path__, 'core.')]\n"
        "names = [n for n in names if not n.endswith(('.cuda', '_child'))]\n"
        "assert len(names) > 20\n"
        "[importlib.import_module(n) for n in names]"
    )
    assert "grpc" not in loaded_modules(program)
