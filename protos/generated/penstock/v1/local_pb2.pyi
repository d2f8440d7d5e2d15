from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class TryReplicaRequest(_message.Message):
    __slots__ = ("stage_index", "model_path", "spare")
    STAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    SPARE_FIELD_NUMBER: _ClassVar[int]
    stage_index: int
    model_path: str
    spare: bool
    def __init__(self, stage_index: _Optional[int] = ..., model_path: _Optional[str] = ..., spare: _Optional[bool] = ...) -> None: ...

class TryReplicaResponse(_message.Message):
    __slots__ = ("address", "name")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    address: str
    name: str
    def __init__(self, address: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class KeepReplicaRequest(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class KeepReplicaResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TryCutRequest(_message.Message):
    __slots__ = ("split",)
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    split: str
    def __init__(self, split: _Optional[str] = ...) -> None: ...

class TryCutResponse(_message.Message):
    __slots__ = ("stage_index", "address", "name", "spare", "num_processes")
    STAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPARE_FIELD_NUMBER: _ClassVar[int]
    NUM_PROCESSES_FIELD_NUMBER: _ClassVar[int]
    stage_index: int
    address: str
    name: str
    spare: bool
    num_processes: int
    def __init__(self, stage_index: _Optional[int] = ..., address: _Optional[str] = ..., name: _Optional[str] = ..., spare: _Optional[bool] = ..., num_processes: _Optional[int] = ...) -> None: ...

class KeepCutRequest(_message.Message):
    __slots__ = ("split",)
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    split: str
    def __init__(self, split: _Optional[str] = ...) -> None: ...

class KeepCutResponse(_message.Message):
    __slots__ = ("leaving",)
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    leaving: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, leaving: _Optional[_Iterable[str]] = ...) -> None: ...

class StopReplicaRequest(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class StopReplicaResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
