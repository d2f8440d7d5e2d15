import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from penstock.v1 import generation_pb2 as _generation_pb2
from penstock.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ControlRequest(_message.Message):
    __slots__ = ("open", "micro_batch", "updates", "report", "open_downstream", "abandon")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    OPEN_DOWNSTREAM_FIELD_NUMBER: _ClassVar[int]
    ABANDON_FIELD_NUMBER: _ClassVar[int]
    open: OpenPipeline
    micro_batch: MicroBatch
    updates: SequenceUpdates
    report: ReportRequest
    open_downstream: OpenDownstream
    abandon: AbandonMicroBatches
    def __init__(self, open: _Optional[_Union[OpenPipeline, _Mapping]] = ..., micro_batch: _Optional[_Union[MicroBatch, _Mapping]] = ..., updates: _Optional[_Union[SequenceUpdates, _Mapping]] = ..., report: _Optional[_Union[ReportRequest, _Mapping]] = ..., open_downstream: _Optional[_Union[OpenDownstream, _Mapping]] = ..., abandon: _Optional[_Union[AbandonMicroBatches, _Mapping]] = ...) -> None: ...

class OpenPipeline(_message.Message):
    __slots__ = ("epoch", "stage_index", "num_stages", "num_slots", "term")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    stage_index: int
    num_stages: int
    num_slots: int
    term: int
    def __init__(self, epoch: _Optional[int] = ..., stage_index: _Optional[int] = ..., num_stages: _Optional[int] = ..., num_slots: _Optional[int] = ..., term: _Optional[int] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenDownstream(_message.Message):
    __slots__ = ("link_id", "address", "epoch")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    link_id: int
    address: str
    epoch: int
    def __init__(self, link_id: _Optional[int] = ..., address: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class AbandonMicroBatches(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SequenceUpdates(_message.Message):
    __slots__ = ("ended_slots", "starts", "block_slots", "block_ids", "rewind_slots", "rewind_positions")
    ENDED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SLOTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    REWIND_SLOTS_FIELD_NUMBER: _ClassVar[int]
    REWIND_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    ended_slots: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedCompositeFieldContainer[SequenceStart]
    block_slots: _containers.RepeatedScalarFieldContainer[int]
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    rewind_slots: _containers.RepeatedScalarFieldContainer[int]
    rewind_positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ended_slots: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[_Union[SequenceStart, _Mapping]]] = ..., block_slots: _Optional[_Iterable[int]] = ..., block_ids: _Optional[_Iterable[int]] = ..., rewind_slots: _Optional[_Iterable[int]] = ..., rewind_positions: _Optional[_Iterable[int]] = ...) -> None: ...

class SequenceStart(_message.Message):
    __slots__ = ("slot", "request_id", "sampling", "known_token_ids", "num_prompt_tokens", "traceparent", "num_cached_positions")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    KNOWN_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    request_id: int
    sampling: _generation_pb2.SamplingParameters
    known_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    traceparent: str
    num_cached_positions: int
    def __init__(self, slot: _Optional[int] = ..., request_id: _Optional[int] = ..., sampling: _Optional[_Union[_generation_pb2.SamplingParameters, _Mapping]] = ..., known_token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., traceparent: _Optional[str] = ..., num_cached_positions: _Optional[int] = ...) -> None: ...

class MicroBatch(_message.Message):
    __slots__ = ("id", "updates", "slots", "first_positions", "num_rows", "num_samples", "token_ids", "sent_unix_ns", "upstream_link", "downstream_link", "replays", "is_alone")
    ID_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_LINK_FIELD_NUMBER: _ClassVar[int]
    DOWNSTREAM_LINK_FIELD_NUMBER: _ClassVar[int]
    REPLAYS_FIELD_NUMBER: _ClassVar[int]
    IS_ALONE_FIELD_NUMBER: _ClassVar[int]
    id: int
    updates: SequenceUpdates
    slots: _containers.RepeatedScalarFieldContainer[int]
    first_positions: _containers.RepeatedScalarFieldContainer[int]
    num_rows: _containers.RepeatedScalarFieldContainer[int]
    num_samples: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sent_unix_ns: int
    upstream_link: int
    downstream_link: int
    replays: bool
    is_alone: bool
    def __init__(self, id: _Optional[int] = ..., updates: _Optional[_Union[SequenceUpdates, _Mapping]] = ..., slots: _Optional[_Iterable[int]] = ..., first_positions: _Optional[_Iterable[int]] = ..., num_rows: _Optional[_Iterable[int]] = ..., num_samples: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., sent_unix_ns: _Optional[int] = ..., upstream_link: _Optional[int] = ..., downstream_link: _Optional[int] = ..., replays: _Optional[bool] = ..., is_alone: _Optional[bool] = ...) -> None: ...

class ControlResponse(_message.Message):
    __slots__ = ("ready", "sampled", "report", "link")
    READY_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    ready: StageReady
    sampled: SampledTokens
    report: StageReport
    link: LinkState
    def __init__(self, ready: _Optional[_Union[StageReady, _Mapping]] = ..., sampled: _Optional[_Union[SampledTokens, _Mapping]] = ..., report: _Optional[_Union[StageReport, _Mapping]] = ..., link: _Optional[_Union[LinkState, _Mapping]] = ...) -> None: ...

class LinkState(_message.Message):
    __slots__ = ("link_id", "stands", "problem")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    STANDS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    link_id: int
    stands: bool
    problem: str
    def __init__(self, link_id: _Optional[int] = ..., stands: _Optional[bool] = ..., problem: _Optional[str] = ...) -> None: ...

class StageReady(_message.Message):
    __slots__ = ("model", "first_layer", "end_layer", "num_layers", "hidden_size", "vocab_size", "context_length", "number_format", "codec", "kv_block_size", "num_kv_blocks", "max_rows", "weights_bytes", "bytes_read", "numerics_fingerprint", "load_duration", "eos_token_ids", "model_digest", "shortcut", "weights_digest", "shortcut_token", "layer_digests", "threads", "threads_alone")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    END_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LOAD_DURATION_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SHORTCUT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SHORTCUT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LAYER_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    THREADS_ALONE_FIELD_NUMBER: _ClassVar[int]
    model: str
    first_layer: int
    end_layer: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    number_format: str
    codec: _tensor_pb2.Codec
    kv_block_size: int
    num_kv_blocks: int
    max_rows: int
    weights_bytes: int
    bytes_read: int
    numerics_fingerprint: str
    load_duration: _duration_pb2.Duration
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    model_digest: str
    shortcut: str
    weights_digest: str
    shortcut_token: bytes
    layer_digests: _containers.RepeatedScalarFieldContainer[str]
    threads: int
    threads_alone: int
    def __init__(self, model: _Optional[str] = ..., first_layer: _Optional[int] = ..., end_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., context_length: _Optional[int] = ..., number_format: _Optional[str] = ..., codec: _Optional[_Union[_tensor_pb2.Codec, str]] = ..., kv_block_size: _Optional[int] = ..., num_kv_blocks: _Optional[int] = ..., max_rows: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., bytes_read: _Optional[int] = ..., numerics_fingerprint: _Optional[str] = ..., load_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., model_digest: _Optional[str] = ..., shortcut: _Optional[str] = ..., weights_digest: _Optional[str] = ..., shortcut_token: _Optional[bytes] = ..., layer_digests: _Optional[_Iterable[str]] = ..., threads: _Optional[int] = ..., threads_alone: _Optional[int] = ...) -> None: ...

class SampledTokens(_message.Message):
    __slots__ = ("micro_batch_id", "token_ids", "logprobs", "sent_unix_ns")
    MICRO_BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    micro_batch_id: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.PositionLogprobs]
    sent_unix_ns: int
    def __init__(self, micro_batch_id: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_generation_pb2.PositionLogprobs, _Mapping]]] = ..., sent_unix_ns: _Optional[int] = ...) -> None: ...

class StageReport(_message.Message):
    __slots__ = ("interval", "busy", "starved", "wire", "serialise", "batch_rows", "batch_compute_us", "kv_blocks_used", "stolen", "starved_for_schedule", "starved_for_upstream", "starved_by_wire", "starved_by_serialising", "performed_id", "computing")
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    STARVED_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    SERIALISE_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    BATCH_COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    STOLEN_FIELD_NUMBER: _ClassVar[int]
    STARVED_FOR_SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    STARVED_FOR_UPSTREAM_FIELD_NUMBER: _ClassVar[int]
    STARVED_BY_WIRE_FIELD_NUMBER: _ClassVar[int]
    STARVED_BY_SERIALISING_FIELD_NUMBER: _ClassVar[int]
    PERFORMED_ID_FIELD_NUMBER: _ClassVar[int]
    COMPUTING_FIELD_NUMBER: _ClassVar[int]
    interval: _duration_pb2.Duration
    busy: _duration_pb2.Duration
    starved: _duration_pb2.Duration
    wire: _duration_pb2.Duration
    serialise: _duration_pb2.Duration
    batch_rows: _containers.RepeatedScalarFieldContainer[int]
    batch_compute_us: _containers.RepeatedScalarFieldContainer[int]
    kv_blocks_used: int
    stolen: _duration_pb2.Duration
    starved_for_schedule: _duration_pb2.Duration
    starved_for_upstream: _duration_pb2.Duration
    starved_by_wire: _duration_pb2.Duration
    starved_by_serialising: _duration_pb2.Duration
    performed_id: int
    computing: _duration_pb2.Duration
    def __init__(self, interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., busy: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., starved: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., wire: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., serialise: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., batch_rows: _Optional[_Iterable[int]] = ..., batch_compute_us: _Optional[_Iterable[int]] = ..., kv_blocks_used: _Optional[int] = ..., stolen: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., starved_for_schedule: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., starved_for_upstream: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., starved_by_wire: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., starved_by_serialising: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., performed_id: _Optional[int] = ..., computing: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ActivateRequest(_message.Message):
    __slots__ = ("frame", "open")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    frame: _tensor_pb2.ActivationFrame
    open: OpenLink
    def __init__(self, frame: _Optional[_Union[_tensor_pb2.ActivationFrame, _Mapping]] = ..., open: _Optional[_Union[OpenLink, _Mapping]] = ...) -> None: ...

class OpenLink(_message.Message):
    __slots__ = ("epoch", "link_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    link_id: int
    def __init__(self, epoch: _Optional[int] = ..., link_id: _Optional[int] = ...) -> None: ...

class ActivateResponse(_message.Message):
    __slots__ = ("credits", "shortcut", "shortcut_token")
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    SHORTCUT_FIELD_NUMBER: _ClassVar[int]
    SHORTCUT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    credits: int
    shortcut: str
    shortcut_token: bytes
    def __init__(self, credits: _Optional[int] = ..., shortcut: _Optional[str] = ..., shortcut_token: _Optional[bytes] = ...) -> None: ...
