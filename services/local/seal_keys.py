"""What a local mesh opens sealed models with, and how they are cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from core.errors import InvalidInput
from core.models.llama.parts import granted_layers
from core.pipeline.partitioner import parse_split
from core.weights.sealed.header import Holder, SealHeader, read_header
from core.weights.sealed.identity import OWNER, SealKeys, read_seal_keys
from core.weights.sealed.opening import is_sealed
from services.local.key_files import private_key, public_key, stage_name
from services.local.settings import MeshSettings


def opened_layers(holder: Holder) -> str:
    """From the first that it has the key of to the last: "14:30"."""
    return "{}:{}".format(*granted_layers(holder.wraps))


def seal_keys(model: Path, folder: Path) -> SealKeys | None:
    """What the first stage opens a model with; None where the model is not sealed.

    Raises NotFound or InvalidInput.
    """
    if not is_sealed(model):
        return None
    return read_seal_keys(public_key(folder, OWNER), private_key(folder, stage_name(0)))


def follow_seal(settings: MeshSettings) -> MeshSettings:
    """Cuts a sealed model as it was sealed, unless the settings say how; others as they are.

    Raises InvalidInput where the holders' layers are no one cut, as while layers move; NotFound,
    SealBroken.
    """
    model = Path(settings.model).expanduser()
    if settings.split is not None or not is_sealed(model):
        return settings
    sealer = read_seal_keys(public_key(settings.seal_keys, OWNER)).sealer
    split = _sealed_split(read_header(model, sealer=sealer))
    return replace(settings, split=split) if split else settings


def _sealed_split(header: SealHeader) -> str:
    spans: list[str] = []
    while (name := stage_name(len(spans))) in header.holders:
        spans.append(opened_layers(header.holders[name]))
    split = ",".join(spans)
    try:
        if split:
            parse_split(split, num_layers=granted_layers(header.parts)[1])
    except InvalidInput:
        opened = ", ".join(
            f"{name} opens {opened_layers(holder)}"
            for name, holder in header.holders.items()
            if name != OWNER
        )
        raise InvalidInput(
            "split",
            None,
            f"layers of the stages, since the keys of {header.model} are those of no one cut "
            f"({opened}); or deal them out with `penstock seal rewrap FOLDER --split ...`",
        ) from None
    return split
