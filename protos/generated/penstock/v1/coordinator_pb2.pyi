import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from penstock.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConnectRequest(_message.Message):
    __slots__ = ("submissions", "cancellations", "take_over")
    SUBMISSIONS_FIELD_NUMBER: _ClassVar[int]
    CANCELLATIONS_FIELD_NUMBER: _ClassVar[int]
    TAKE_OVER_FIELD_NUMBER: _ClassVar[int]
    submissions: _containers.RepeatedCompositeFieldContainer[Submission]
    cancellations: _containers.RepeatedCompositeFieldContainer[Cancellation]
    take_over: bool
    def __init__(self, submissions: _Optional[_Iterable[_Union[Submission, _Mapping]]] = ..., cancellations: _Optional[_Iterable[_Union[Cancellation, _Mapping]]] = ..., take_over: _Optional[bool] = ...) -> None: ...

class Submission(_message.Message):
    __slots__ = ("request_id", "token_ids", "sampling", "timeout", "traceparent", "cache_salt", "num_output_tokens", "tenant", "priority", "began_on")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    BEGAN_ON_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _generation_pb2.SamplingParameters
    timeout: _duration_pb2.Duration
    traceparent: str
    cache_salt: str
    num_output_tokens: int
    tenant: str
    priority: int
    began_on: Cut
    def __init__(self, request_id: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParameters, _Mapping]] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., traceparent: _Optional[str] = ..., cache_salt: _Optional[str] = ..., num_output_tokens: _Optional[int] = ..., tenant: _Optional[str] = ..., priority: _Optional[int] = ..., began_on: _Optional[_Union[Cut, _Mapping]] = ...) -> None: ...

class Cut(_message.Message):
    __slots__ = ("end_layers", "layer_digests")
    END_LAYERS_FIELD_NUMBER: _ClassVar[int]
    LAYER_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    end_layers: _containers.RepeatedScalarFieldContainer[int]
    layer_digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, end_layers: _Optional[_Iterable[int]] = ..., layer_digests: _Optional[_Iterable[str]] = ...) -> None: ...

class Cancellation(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    def __init__(self, request_id: _Optional[int] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("updates", "mesh", "token_request_ids", "token_ids", "shortcut", "shortcut_token")
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SHORTCUT_FIELD_NUMBER: _ClassVar[int]
    SHORTCUT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[RequestUpdate]
    mesh: MeshState
    token_request_ids: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    shortcut: str
    shortcut_token: bytes
    def __init__(self, updates: _Optional[_Iterable[_Union[RequestUpdate, _Mapping]]] = ..., mesh: _Optional[_Union[MeshState, _Mapping]] = ..., token_request_ids: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., shortcut: _Optional[str] = ..., shortcut_token: _Optional[bytes] = ...) -> None: ...

class RequestUpdate(_message.Message):
    __slots__ = ("request_id", "token_ids", "logprobs", "finish_reason", "usage", "refusal", "began_on")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    BEGAN_ON_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.PositionLogprobs]
    finish_reason: _generation_pb2.FinishReason
    usage: _generation_pb2.Usage
    refusal: Refusal
    began_on: Cut
    def __init__(self, request_id: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_generation_pb2.PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[_generation_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_generation_pb2.Usage, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., began_on: _Optional[_Union[Cut, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "message", "retry_delay")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_DELAY_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    retry_delay: _duration_pb2.Duration
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., retry_delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class MeshState(_message.Message):
    __slots__ = ("model", "stages_ready", "eos_token_ids", "waiting")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STAGES_READY_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    model: _generation_pb2.Model
    stages_ready: _containers.RepeatedScalarFieldContainer[bool]
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    waiting: bool
    def __init__(self, model: _Optional[_Union[_generation_pb2.Model, _Mapping]] = ..., stages_ready: _Optional[_Iterable[bool]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., waiting: _Optional[bool] = ...) -> None: ...

class GetMeshRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetMeshResponse(_message.Message):
    __slots__ = ("model", "stages", "requests_waiting", "requests_running", "tokens_per_second", "uptime", "prompt_tokens", "cached_tokens", "tokens_guessed", "tokens_guessed_right", "sequences_moved", "positions_restored", "split", "term")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_GUESSED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_GUESSED_RIGHT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_MOVED_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_RESTORED_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    model: _generation_pb2.Model
    stages: _containers.RepeatedCompositeFieldContainer[StageState]
    requests_waiting: int
    requests_running: int
    tokens_per_second: float
    uptime: _duration_pb2.Duration
    prompt_tokens: int
    cached_tokens: int
    tokens_guessed: int
    tokens_guessed_right: int
    sequences_moved: int
    positions_restored: int
    split: str
    term: int
    def __init__(self, model: _Optional[_Union[_generation_pb2.Model, _Mapping]] = ..., stages: _Optional[_Iterable[_Union[StageState, _Mapping]]] = ..., requests_waiting: _Optional[int] = ..., requests_running: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., tokens_guessed: _Optional[int] = ..., tokens_guessed_right: _Optional[int] = ..., sequences_moved: _Optional[int] = ..., positions_restored: _Optional[int] = ..., split: _Optional[str] = ..., term: _Optional[int] = ...) -> None: ...

class StageState(_message.Message):
    __slots__ = ("index", "address", "first_layer", "end_layer", "ready", "weights_bytes", "bytes_read", "kv_blocks_used", "kv_blocks_total", "busy_fraction", "starved_fraction", "rows_per_second", "problem", "load_duration", "stolen_fraction", "starved_for_schedule", "starved_for_upstream", "starved_by_wire", "starved_by_serialising", "replica", "spare", "draining", "sequences", "weights_digest", "passed_over", "resting")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    END_LAYER_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BUSY_FRACTION_FIELD_NUMBER: _ClassVar[int]
    STARVED_FRACTION_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    LOAD_DURATION_FIELD_NUMBER: _ClassVar[int]
    STOLEN_FRACTION_FIELD_NUMBER: _ClassVar[int]
    STARVED_FOR_SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    STARVED_FOR_UPSTREAM_FIELD_NUMBER: _ClassVar[int]
    STARVED_BY_WIRE_FIELD_NUMBER: _ClassVar[int]
    STARVED_BY_SERIALISING_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    SPARE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PASSED_OVER_FIELD_NUMBER: _ClassVar[int]
    RESTING_FIELD_NUMBER: _ClassVar[int]
    index: int
    address: str
    first_layer: int
    end_layer: int
    ready: bool
    weights_bytes: int
    bytes_read: int
    kv_blocks_used: int
    kv_blocks_total: int
    busy_fraction: float
    starved_fraction: float
    rows_per_second: float
    problem: str
    load_duration: _duration_pb2.Duration
    stolen_fraction: float
    starved_for_schedule: float
    starved_for_upstream: float
    starved_by_wire: float
    starved_by_serialising: float
    replica: int
    spare: bool
    draining: bool
    sequences: int
    weights_digest: str
    passed_over: bool
    resting: bool
    def __init__(self, index: _Optional[int] = ..., address: _Optional[str] = ..., first_layer: _Optional[int] = ..., end_layer: _Optional[int] = ..., ready: _Optional[bool] = ..., weights_bytes: _Optional[int] = ..., bytes_read: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., busy_fraction: _Optional[float] = ..., starved_fraction: _Optional[float] = ..., rows_per_second: _Optional[float] = ..., problem: _Optional[str] = ..., load_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., stolen_fraction: _Optional[float] = ..., starved_for_schedule: _Optional[float] = ..., starved_for_upstream: _Optional[float] = ..., starved_by_wire: _Optional[float] = ..., starved_by_serialising: _Optional[float] = ..., replica: _Optional[int] = ..., spare: _Optional[bool] = ..., draining: _Optional[bool] = ..., sequences: _Optional[int] = ..., weights_digest: _Optional[str] = ..., passed_over: _Optional[bool] = ..., resting: _Optional[bool] = ...) -> None: ...

class AddReplicaRequest(_message.Message):
    __slots__ = ("stage_index", "address", "spare", "split")
    STAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SPARE_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    stage_index: int
    address: str
    spare: bool
    split: str
    def __init__(self, stage_index: _Optional[int] = ..., address: _Optional[str] = ..., spare: _Optional[bool] = ..., split: _Optional[str] = ...) -> None: ...

class AddReplicaResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbeReplicaRequest(_message.Message):
    __slots__ = ("address", "token_ids", "max_tokens", "split")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    address: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    split: str
    def __init__(self, address: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., split: _Optional[str] = ...) -> None: ...

class ProbeReplicaResponse(_message.Message):
    __slots__ = ("token_ids", "logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class ChooseWeightsRequest(_message.Message):
    __slots__ = ("stage_index", "weights_digest")
    STAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    stage_index: int
    weights_digest: str
    def __init__(self, stage_index: _Optional[int] = ..., weights_digest: _Optional[str] = ...) -> None: ...

class ChooseWeightsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ChooseCutRequest(_message.Message):
    __slots__ = ("split",)
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    split: str
    def __init__(self, split: _Optional[str] = ...) -> None: ...

class ChooseCutResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainReplicaRequest(_message.Message):
    __slots__ = ("address", "moves")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    address: str
    moves: bool
    def __init__(self, address: _Optional[str] = ..., moves: _Optional[bool] = ...) -> None: ...

class DrainReplicaResponse(_message.Message):
    __slots__ = ("sequences",)
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    sequences: int
    def __init__(self, sequences: _Optional[int] = ...) -> None: ...
