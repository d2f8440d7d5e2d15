"""Where the keys of sealed models lie: one folder for all identities of a local mesh.

`owner.pub` is the sealer that is trusted, `stage-0.key` what every replica of stage 0 opens its
layers with, and so on.
"""

from __future__ import annotations

from pathlib import Path


def stage_name(stage_index: int) -> str:
    """The holder of a stage's keys."""
    return f"stage-{stage_index}"


def private_key(folder: Path, name: str) -> Path:
    """The file of an identity."""
    return folder / f"{name}.key"


def public_key(folder: Path, name: str) -> Path:
    """The file that others may have of it."""
    return folder / f"{name}.pub"
