"""`assert` vanishes under `python -O`: none may stand between outside input and what trusts it.

Each one that core and services have is listed here with what it says of our own code. One more is
a decision: would the program be wrong without it? Then it has to be an error of `core/errors.py`.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]

OUR_OWN_STATE = "what the module itself has set or kept"
OUR_OWN_CALL = "what the caller, of ours, has checked"
FOR_TYPES = "what the type checker cannot know"

ALLOWED = {
    "core/cache/blocks.py": (3, OUR_OWN_STATE),
    "core/engine/engine.py": (1, FOR_TYPES),
    "core/kernels/cuda_device.py": (1, OUR_OWN_CALL),
    "core/models/llama/cuda_model.py": (3, FOR_TYPES),
    "core/models/llama/weight_names.py": (2, OUR_OWN_CALL),
    "core/pipeline/admission.py": (1, FOR_TYPES),
    "core/pipeline/failover.py": (1, FOR_TYPES),
    "core/pipeline/mirror.py": (2, FOR_TYPES),
    "core/pipeline/scheduler.py": (5, OUR_OWN_STATE),
    "core/pipeline/simulate.py": (2, FOR_TYPES),
    "core/pipeline/waiting.py": (1, OUR_OWN_STATE),
    "core/sampling/sampler.py": (1, OUR_OWN_CALL),
    "core/tokens/chat_template.py": (4, FOR_TYPES),
    "core/tokens/stop_strings.py": (1, OUR_OWN_CALL),
    "core/wire/frames.py": (3, OUR_OWN_CALL),
    "services/common/cancellation.py": (1, OUR_OWN_CALL),
    "services/common/identity.py": (1, FOR_TYPES),
    "services/common/shortcut.py": (1, FOR_TYPES),
    "services/common/telemetry.py": (2, OUR_OWN_CALL),
    "services/coordinator/replica_link.py": (2, OUR_OWN_STATE),
    "services/coordinator/replicas.py": (2, OUR_OWN_STATE),
    "services/gateway/coordinator_link.py": (1, FOR_TYPES),
    "services/local/background.py": (2, FOR_TYPES),
    "services/local/mesh.py": (1, FOR_TYPES),
    "services/local/process.py": (2, FOR_TYPES),
    "services/stage/process.py": (1, OUR_OWN_CALL),
}


def num_asserts(path: Path) -> int:
    tree = ast.parse(path.read_text())
    return sum(isinstance(node, ast.Assert) for node in ast.walk(tree))


def test_every_assert_is_listed_with_its_reason() -> None:
    sources = [path for room in ("core", "services") for path in (ROOT / room).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): num_asserts(path) for path in sources}
    assert {name: count for name, count in found.items() if count} == {
        name: count for name, (count, _) in ALLOWED.items()
    }
