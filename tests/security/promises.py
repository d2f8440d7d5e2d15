"""What SECURITY.md promises, as data: one line a promise, with what tries to break it.

`tests` are files or node ids of pytest; `parsers` are targets of `tests/fuzz`; `rpcs` are servers
whose every RPC is fuzzed.
"""

from __future__ import annotations

from dataclasses import dataclass

SECURITY = "tests/security"
FRAMES = f"{SECURITY}/test_frames_of_strangers.py"
TEMPLATES = f"{SECURITY}/test_templates_of_strangers.py"
CONNECTIONS = f"{SECURITY}/test_connections_of_strangers.py"
NAMES = f"{SECURITY}/test_names_of_strangers.py"
INVERSION = "tests/numerics/test_inversion.py"


@dataclass(frozen=True, kw_only=True)
class Promise:
    """One sentence of SECURITY.md, and who tries to break it."""

    says: str
    tests: tuple[str, ...] = ()
    parsers: tuple[str, ...] = ()
    rpcs: tuple[str, ...] = ()


PROMISES = (
    Promise(
        says="Nothing that comes from outside is run: no pickle, no eval, no torch.load",
        tests=("tests/architecture/test_no_code_in_data.py",),
    ),
    Promise(says="A frame's shape and type are checked, not believed", tests=(FRAMES,)),
    Promise(says="A chat template cannot leave its sandbox", tests=(TEMPLATES,)),
    Promise(says="No client shuts others out by a connection", tests=(CONNECTIONS,)),
    Promise(says="No name forges a log line, opens a file or reaches a part", tests=(NAMES,)),
    Promise(
        says="A damaged file of a model is refused, and costs no more than its size",
        parsers=("gguf", "safetensors", "llama2c", "tokenizer-json", "chat-template"),
    ),
    Promise(says="No frame breaks whoever reads it", parsers=("frames",)),
    Promise(says="No request to the gateway breaks or stops it", rpcs=("gateway",)),
    Promise(
        says="No order or frame breaks a stage, nor keeps the next coordinator out",
        rpcs=("stage",),
    ),
    Promise(
        says="No message breaks the coordinator or the supervisor",
        rpcs=("coordinator", "supervisor"),
    ),
)
# No promise: SECURITY.md says what this test shows.
NOT_PROMISED = Promise(
    says="A stage that sees activations reads the tokens back", tests=(INVERSION,)
)
