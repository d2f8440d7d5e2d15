from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_F32: _ClassVar[Codec]
    CODEC_BF16: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]
CODEC_UNSPECIFIED: Codec
CODEC_F32: Codec
CODEC_BF16: Codec
CODEC_INT8: Codec

class ActivationFrame(_message.Message):
    __slots__ = ("link_id", "micro_batch_id", "sequence_number", "codec", "first_row", "num_rows", "hidden_size", "data", "checksum", "serialise_ns", "sent_unix_ns")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    SERIALISE_NS_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    link_id: int
    micro_batch_id: int
    sequence_number: int
    codec: Codec
    first_row: int
    num_rows: int
    hidden_size: int
    data: bytes
    checksum: int
    serialise_ns: int
    sent_unix_ns: int
    def __init__(self, link_id: _Optional[int] = ..., micro_batch_id: _Optional[int] = ..., sequence_number: _Optional[int] = ..., codec: _Optional[_Union[Codec, str]] = ..., first_row: _Optional[int] = ..., num_rows: _Optional[int] = ..., hidden_size: _Optional[int] = ..., data: _Optional[bytes] = ..., checksum: _Optional[int] = ..., serialise_ns: _Optional[int] = ..., sent_unix_ns: _Optional[int] = ...) -> None: ...
