"""Activation frames: what one link brings, in whatever order, against what is scheduled.

An input is a row of records: a letter (F frame, E expect, A abandon), a length, the content.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from random import Random

import numpy as np
import xxhash
from google.protobuf.message import DecodeError
from penstock.v1 import stage_pb2, tensor_pb2

from core.errors import PenstockError
from core.kernels.blocks.reference import encode_rows
from core.wire.codecs import Activations, codec_named
from core.wire.frames import FrameAssembler, encode_frames
from services.common.shortcut import parse
from tests.fuzz.damage import any_damage, odd_number
from tests.fuzz.target import FuzzTarget

Record = tuple[bytes, bytes]
_HEAD = struct.Struct("<cH")
_SCHEDULE = struct.Struct("<QI")
_HIDDEN_SIZE, _LINK = 8, 1
_U32_FIELDS = ("first_row", "num_rows", "hidden_size", "codec")
_U64_FIELDS = ("link_id", "micro_batch_id", "sequence_number", "checksum", "serialise_ns")


def make_target() -> FuzzTarget:
    return FuzzTarget(
        try_input=_assemble_both,
        refusals=(PenstockError,),
        seeds=[
            _conversation(rows, codec)
            for rows in ((1,), (3, 1), (9, 2, 5))
            for codec in ("bf16", "int8")
        ],
        mutate=_mutate,
    )


def _assemble_both(data: bytes) -> None:
    """Links of both codecs get the input; what one refuses, the other may take."""
    with suppress(PenstockError):
        _assemble(data, "int8")
    _assemble(data, "bf16")


def _assemble(data: bytes, codec: str) -> None:
    assembler = FrameAssembler(_HIDDEN_SIZE, codec, link_id=_LINK)
    width = codec_named(codec).width(_HIDDEN_SIZE)
    for kind, content in _records(data):
        complete = None
        if kind == b"F":
            request = parse(stage_pb2.ActivateRequest, content)
            complete = assembler.add(request.frame)
        elif kind == b"E" and len(content) == _SCHEDULE.size:
            # The number of rows is the coordinator's, checked before it comes here.
            micro_batch_id, num_rows = _SCHEDULE.unpack(content)
            complete = assembler.expect(micro_batch_id, max(1, num_rows))
        elif kind == b"A":
            assembler.abandon(int.from_bytes(content[:8], "little"))
        if complete is not None and complete.hidden_TH.shape[1] != width:
            raise AssertionError("activations are not of the manifest's size")


def _records(data: bytes) -> list[Record]:
    records = []
    while len(data) >= _HEAD.size:
        kind, size = _HEAD.unpack_from(data)
        records.append((kind, data[_HEAD.size : _HEAD.size + size]))
        data = data[_HEAD.size + size :]
    return records


def _join(records: list[Record]) -> bytes:
    return b"".join(_HEAD.pack(kind, len(content)) + content for kind, content in records)


def _conversation(rows: tuple[int, ...], codec: str) -> bytes:
    records: list[Record] = []
    sequence_number = 0
    for micro_batch_id, num_rows in enumerate(rows, start=1):
        frames = encode_frames(
            _activations(num_rows, codec),
            link_id=_LINK,
            micro_batch_id=micro_batch_id,
            first_sequence_number=sequence_number,
            codec=codec,
            max_frame_bytes=64,
        )
        sequence_number += len(frames)
        records += [(b"F", frame.SerializeToString()) for frame in frames]
        place = len(records) - micro_batch_id % 2
        records.insert(place, (b"E", _SCHEDULE.pack(micro_batch_id, num_rows)))
    return _join([*records, (b"A", (1).to_bytes(8, "little"))])


def _activations(num_rows: int, codec: str) -> Activations:
    values = np.arange(num_rows * _HIDDEN_SIZE, dtype=np.uint16).reshape(num_rows, _HIDDEN_SIZE)
    return values if codec == "bf16" else encode_rows(values.astype(np.float32))


def _mutate(data: bytes, random: Random) -> bytes:
    records = _records(data)
    if not records or random.random() < 0.1:
        return any_damage(data, random)
    index = random.randrange(len(records))
    kind = random.randrange(6)
    if kind == 0:
        del records[index]
    elif kind == 1:
        records.insert(random.randrange(len(records) + 1), records[index])
    else:
        letter, content = records[index]
        damage = _damage_frame if letter == b"F" else any_damage
        records[index] = (letter, damage(content, random)[:65535])
    return _join(records)


def _damage_frame(content: bytes, random: Random) -> bytes:
    """Sets one field to an odd number, or changes the data; mostly mends the checksum."""
    try:
        request = stage_pb2.ActivateRequest.FromString(content)
    except DecodeError:
        return any_damage(content, random)
    frame = request.frame
    kind = random.randrange(4)
    if kind == 0:
        frame.data = any_damage(frame.data, random)
    elif kind == 1:
        row_bytes = codec_named(random.choice(("bf16", "int8"))).row_bytes(_HIDDEN_SIZE)
        frame.num_rows = random.randrange(9)
        frame.data = bytes(row_bytes * frame.num_rows)
    else:
        _set_number(frame, random)
    if random.random() < 0.8:
        frame.checksum = xxhash.xxh3_64_intdigest(frame.data)
    return request.SerializeToString()


def _set_number(frame: tensor_pb2.ActivationFrame, random: Random) -> None:
    name = random.choice(_U32_FIELDS + _U64_FIELDS)
    bits = 31 if name in _U32_FIELDS else 64
    setattr(frame, name, odd_number(random, near=getattr(frame, name)) % (1 << bits))
