from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class StartReplicaRequest(_message.Message):
    __slots__ = ("stage_index", "model_path", "spare")
    STAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    MODEL_PATH_FIELD_NUMBER: _ClassVar[int]
    SPARE_FIELD_NUMBER: _ClassVar[int]
    stage_index: int
    model_path: str
    spare: bool
    def __init__(self, stage_index: _Optional[int] = ..., model_path: _Optional[str] = ..., spare: _Optional[bool] = ...) -> None: ...

class StartReplicaResponse(_message.Message):
    __slots__ = ("address", "name", "log_path")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LOG_PATH_FIELD_NUMBER: _ClassVar[int]
    address: str
    name: str
    log_path: str
    def __init__(self, address: _Optional[str] = ..., name: _Optional[str] = ..., log_path: _Optional[str] = ...) -> None: ...

class StopReplicaRequest(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class StopReplicaResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
