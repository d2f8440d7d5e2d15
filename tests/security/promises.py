"""What SECURITY.md promises, as data: one line a promise, with what tries to break it.

`tests` are files or node ids of pytest; `parsers` are targets of `tests/fuzz`; `rpcs` are servers
whose every RPC is fuzzed; `callers` are those who fuzz RPCs of a mesh with certificates and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

SECURITY = "tests/security"
FRAMES = f"{SECURITY}/test_frames_of_strangers.py"
TEMPLATES = f"{SECURITY}/test_templates_of_strangers.py"
CONNECTIONS = f"{SECURITY}/test_connections_of_strangers.py"
MODELS = f"{SECURITY}/test_models_of_strangers.py"
NAMES = f"{SECURITY}/test_names_of_strangers.py"
SEALED = "tests/core/weights/sealed"
GATEWAY = "tests/services/gateway"
COMMON = "tests/services/common"
STAGE = "tests/services/stage"
END_TO_END = "tests/end_to_end"
INVERSION = "tests/numerics/test_inversion.py"


@dataclass(frozen=True, kw_only=True)
class Promise:
    """One sentence of SECURITY.md, and who tries to break it."""

    says: str
    tests: tuple[str, ...] = ()
    parsers: tuple[str, ...] = ()
    rpcs: tuple[str, ...] = ()
    callers: tuple[str, ...] = ()


PROMISES = (
    Promise(
        says="Nothing that comes from outside is run: no pickle, no eval, no torch.load",
        tests=("tests/architecture/test_no_code_in_data.py", MODELS),
    ),
    Promise(says="A frame's shape and type are checked, not believed", tests=(FRAMES,)),
    Promise(says="A chat template cannot leave its sandbox", tests=(TEMPLATES,)),
    Promise(says="No client shuts others out by a connection", tests=(CONNECTIONS,)),
    Promise(says="No name forges a log line, opens a file or reaches a part", tests=(NAMES,)),
    Promise(
        says="A damaged file of a model is refused, and costs no more than its size",
        parsers=("gguf", "safetensors", "llama2c", "tokenizer-json", "chat-template", "archives"),
    ),
    Promise(
        says="No text that a model's tokenizer is slow for stops a gateway",
        tests=(
            f"{GATEWAY}/test_encoding_threads.py",
            "tests/core/tokens/test_hostile_vocabularies.py",
        ),
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
    Promise(
        says="Checks of bytes hold without asserts",
        tests=("tests/architecture/test_asserts.py", "tests/architecture/test_optimised.py"),
    ),
    Promise(
        says="A part talks to those whose part it is, and to nobody else",
        tests=(
            f"{COMMON}/test_mutual_tls.py",
            f"{COMMON}/test_identity.py",
            f"{STAGE}/test_identities.py",
            f"{END_TO_END}/test_mutual_tls.py",
        ),
        callers=("wrong-role", "neighbour"),
    ),
    Promise(
        says="Only the peer of a stream enters the shortcut beside it",
        tests=(f"{COMMON}/test_shortcut.py",),
    ),
    Promise(
        says="No public RPC without a key that allows it, where keys are required",
        tests=(f"{GATEWAY}/test_keys.py", f"{COMMON}/test_keys.py", f"{COMMON}/test_store.py"),
        callers=("wrong-key", "right-key"),
    ),
    Promise(
        says="A key takes no more than its limits",
        tests=(f"{GATEWAY}/test_key_limits.py", f"{GATEWAY}/test_quota.py"),
    ),
    Promise(
        says="A tenant sees nothing of another one",
        tests=(f"{GATEWAY}/test_tenants.py", f"{END_TO_END}/test_keys.py"),
    ),
    Promise(
        says="The audit log tells when a line was removed, changed or moved",
        tests=(f"{COMMON}/test_audit.py", f"{GATEWAY}/test_refusals.py"),
    ),
    Promise(
        says="A sealed model opens for its holders alone, as it was sealed",
        tests=(
            f"{SEALED}/test_opening.py",
            f"{SEALED}/test_tampering.py",
            f"{SEALED}/test_chunks.py",
            f"{SEALED}/test_rewrapping.py",
            f"{SEALED}/test_identity.py",
        ),
        parsers=("sealed",),
    ),
    Promise(
        says="What was sealed never touches the disk in the clear",
        tests=(f"{END_TO_END}/test_sealed.py", f"{STAGE}/test_dumps.py"),
    ),
    Promise(
        says="Weights that changed, in a file or in memory, are found",
        tests=("tests/core/weights/test_manifest.py", f"{STAGE}/test_weight_watch.py"),
    ),
)
# No promise: SECURITY.md says what this test shows.
NOT_PROMISED = Promise(
    says="A stage that sees activations reads the tokens back", tests=(INVERSION,)
)
