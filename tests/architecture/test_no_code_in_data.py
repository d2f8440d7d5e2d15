"""Nothing that comes from outside is ever run: no module of ours can, whatever calls it.

CVE-2025-32444 and its row (vLLM, SGLang, LightLLM: pickles over sockets), CVE-2025-32434
(`torch.load`, even with `weights_only`), CVE-2025-62164 (tensors of clients by `torch.load`).
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("core", "services", "protos", "tests", "infra")
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
MODULES = frozenset(
    (
        "pickle",
        "_pickle",
        "cloudpickle",
        "dill",
        "marshal",
        "shelve",
        "joblib",
        "yaml",
        "jsonpickle",
    )
)
CALLS = frozenset(("eval", "exec", "__import__"))
# Of modules: they unpickle, or hand text to a shell.
ATTRIBUTES = frozenset(
    (
        *("torch.load", "torch.package", "torch.jit.load", "torch.hub", "numpy.load", "np.load"),
        *("os.system", "os.popen", "pandas.read_pickle", "numba.cuda.jit.load"),
    )
)
KEYWORDS = frozenset(("shell", "allow_pickle", "trust_remote_code"))


def offences(tree: ast.AST) -> list[str]:
    """What a module uses that could run data."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names if name.name.split(".")[0] in MODULES]
            case ast.ImportFrom(module=str(module)):
                found += [module] if module.split(".")[0] in MODULES else []
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                found.append(name)
            case ast.Attribute() if (name := ast.unparse(node)) in ATTRIBUTES:
                found.append(name)
            case ast.keyword(arg=str(name), value=ast.Constant(value=True)) if name in KEYWORDS:
                found.append(name)
    return found


def test_no_module_can_run_what_it_reads() -> None:
    assert len(SOURCES) > 300
    found = {
        str(path.relative_to(ROOT)): what
        for path in SOURCES
        if (what := offences(ast.parse(path.read_text())))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load(path, weights_only=True)",
        "np.load(path)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_each_way_is_found(source: str) -> None:
    assert offences(ast.parse(source))
