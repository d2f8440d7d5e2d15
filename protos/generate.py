"""Makes the Python stubs under protos/generated from the .proto files.

`python protos/generate.py` writes them; `--check` only says whether they are fresh.
"""

from __future__ import annotations

import sys
import tempfile
from filecmp import dircmp
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).parent
GENERATED = ROOT / "generated"


def generate(out: Path) -> None:
    """Writes all stubs below `out`; raises SystemExit when protoc refuses."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/**/*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    out.mkdir(parents=True, exist_ok=True)
    arguments = [
        "protoc",
        f"-I{ROOT}",
        f"-I{well_known}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_grpc_out={out}",
        # Beside the interpreter, so that the virtual environment need not be on PATH.
        f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}",
        *sources,
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed; see above")
    for source in sources:
        for folder in (out / source).parents:
            if folder == out:
                break
            (folder / "__init__.py").touch()


def differences(left: Path, right: Path) -> list[str]:
    """Names the files that differ between two folders."""
    found: list[str] = []

    def walk(comparison: dircmp[str], prefix: str) -> None:
        names = [*comparison.left_only, *comparison.right_only, *comparison.diff_files]
        found.extend(prefix + name for name in names if name != "__pycache__")
        for name, child in comparison.subdirs.items():
            if name != "__pycache__":
                walk(child, f"{prefix}{name}/")

    walk(dircmp(left, right), "")
    return sorted(found)


def main() -> None:
    if "--check" not in sys.argv:
        generate(GENERATED)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = differences(Path(folder), GENERATED)
    if stale:
        raise SystemExit(f"stubs are stale, run `make protos`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
