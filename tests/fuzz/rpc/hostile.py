"""Messages made wrong, by what their descriptors say of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tests.fuzz.damage import any_damage

MOST_DEPTH = 6
_INTEGERS = (0, 1, 2, 3, 15, 16, 17, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_REALS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, -1e38, math.nan, math.inf, -math.inf)
_TEXTS = (
    *("", "a", "\0", "\n", "x\r\ny: z", "../../etc/passwd", "%s%n", "{{7*7}}", "\u202e", "💥"),
    *("<|end|>", "-1", "NaN", '{"temperature": 1e999}', "[" * 500, "127.0.0.1:1", "unix:/tmp/x"),
)
_LONG = (1_000, 70_000, 600_000)
# Of a field's repeated texts; more than any service takes.
_MOST_TEXT = 20_000_000
# Not UTF-8: cut short, overlong, a surrogate, beyond Unicode.
_BAD_TEXTS = (b"\xff\xfe", b"\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80")
_SIZES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def serialise(messages: Sequence[Message], random: Random) -> list[bytes]:
    """A sequence as one who wishes ill would send it; one in ten stays as it is."""
    kind = random.random()
    messages = [_copy(message) for message in messages]
    if kind < 0.1:
        pass
    elif kind < 0.6:
        for _ in range(random.randint(1, 3)):
            _spoil_field(random.choice(messages), random)
    elif kind < 0.7:
        chosen = random.randrange(len(messages))
        messages[chosen] = any_message(messages[chosen].DESCRIPTOR, random)
    elif kind < 0.8 and len(messages) > 1:
        messages = _reorder(messages, random)
    else:
        sent = [message.SerializeToString() for message in messages]
        chosen = random.randrange(len(sent))
        sent[chosen] = _spoil_bytes(sent[chosen], messages[chosen].DESCRIPTOR, random)
        return sent
    return [message.SerializeToString() for message in messages]


def any_message(descriptor: Descriptor, random: Random, *, depth: int = 0) -> Message:
    """A message with any of its fields set to anything that their types hold."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if random.random() < 0.4:
            _set(message, field, random, depth=depth)
    return message


def _copy(message: Message) -> Message:
    made = type(message)()
    made.CopyFrom(message)
    return made


def _reorder(messages: list[Message], random: Random) -> list[Message]:
    """Sent twice, left out, or in another order."""
    kind = random.randrange(4)
    chosen = random.randrange(len(messages))
    if kind == 0:
        return [*messages, *messages]
    if kind == 1:
        return messages[:chosen] + messages[chosen + 1 :]
    if kind == 2:
        return [*messages[: chosen + 1], *[messages[chosen]] * random.choice((1, 3, 200))]
    return random.sample(messages, len(messages))


def _spoil_field(message: Message, random: Random) -> None:
    """Sets, changes or clears one field, somewhere in the message."""
    fields = message.DESCRIPTOR.fields
    if not fields:
        return
    present = [field for field, _ in message.ListFields()]
    field = random.choice(present if present and random.random() < 0.7 else fields)
    inner = _inner_messages(message, field)
    if inner and random.random() < 0.8:
        _spoil_field(random.choice(inner), random)
    elif random.random() < 0.15:
        message.ClearField(field.name)
    else:
        _set(message, field, random, depth=0)


def _inner_messages(message: Message, field: FieldDescriptor) -> list[Message]:
    if field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE:
        return []
    if _is_map(field):
        values = getattr(message, field.name)
        is_message = field.message_type.fields_by_name["value"].message_type is not None
        return [values[key] for key in values] if is_message else []
    if field.is_repeated:
        return list(getattr(message, field.name))
    return [getattr(message, field.name)] if message.HasField(field.name) else []


def _set(message: Message, field: FieldDescriptor, random: Random, *, depth: int) -> None:
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        _set_message(message, field, random, depth=depth)
    elif field.is_repeated:
        values = getattr(message, field.name)
        if random.random() < 0.5:
            del values[:]
        count = random.choice((1, 1, 2, 3, 64, 65, 5000)) if depth == 0 else 1
        value = _value(field, random)
        size = len(value) if isinstance(value, str | bytes) else 0
        values.extend([value] * min(count, _MOST_TEXT // max(size, 1)))
    else:
        setattr(message, field.name, _value(field, random))


def _set_message(message: Message, field: FieldDescriptor, random: Random, *, depth: int) -> None:
    if depth > MOST_DEPTH:
        return
    if _is_map(field):
        value = field.message_type.fields_by_name["value"]
        values, key = getattr(message, field.name), random.choice(_TEXTS)
        if value.message_type is None:
            values[key] = _value(value, random)
        else:
            values[key].CopyFrom(any_message(value.message_type, random, depth=depth + 1))
        return
    made = any_message(field.message_type, random, depth=depth + 1)
    if field.is_repeated:
        getattr(message, field.name).extend([made] * random.choice((1, 1, 2, 20)))
    else:
        getattr(message, field.name).CopyFrom(made)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _value(field: FieldDescriptor, random: Random) -> Any:
    kind = field.cpp_type
    if kind in _SIZES:
        least, most = _SIZES[kind]
        number = random.choice(_INTEGERS) * random.choice((1, 1, 1, -1))
        return min(max(number, least), most)
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return random.choice(_REALS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return random.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return random.choice((0, 1, 2, 3, 99, 2**31 - 1, -1))
    text = random.choice(_TEXTS)
    if random.random() < 0.05:
        text = random.choice(("a", "é", "{")) * random.choice(_LONG)
    is_bytes = field.type == FieldDescriptor.TYPE_BYTES
    return random.choice((text.encode(), random.randbytes(16))) if is_bytes else text


def _spoil_bytes(data: bytes, descriptor: Descriptor, random: Random) -> bytes:
    kind = random.randrange(6)
    if kind == 0:
        return random.randbytes(random.choice((1, 10, 100, 5000)))
    if kind == 1:
        return data + _bad_text(descriptor, random)
    if kind == 2:  # groups in groups, which no message of ours has
        return data + b"\x0b" * random.choice((1, 99, 101, 10_000))
    if kind == 3:  # a field that says it is longer than all there is
        return data + _tag(random.randint(1, 20), 2) + b"\xff\xff\xff\xff\x07"
    if kind == 4:  # a known number of another type
        return data + _tag(random.randint(1, 20), random.randrange(8)) + random.randbytes(9)
    return any_damage(data, random)


def _bad_text(descriptor: Descriptor, random: Random) -> bytes:
    texts = [field.number for field in descriptor.fields if field.type == field.TYPE_STRING]
    bad = random.choice(_BAD_TEXTS)
    return _tag(random.choice(texts or [1]), 2) + bytes([len(bad)]) + bad


def _tag(number: int, wire_type: int) -> bytes:
    tag = number << 3 | wire_type
    return bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
