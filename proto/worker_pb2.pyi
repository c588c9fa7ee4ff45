from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JoinRequest(_message.Message):
    __slots__ = ("version", "engine_id", "epoch", "rank", "tensor_parallel_size")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    version: str
    engine_id: str
    epoch: int
    rank: int
    tensor_parallel_size: int
    def __init__(self, version: _Optional[str] = ..., engine_id: _Optional[str] = ..., epoch: _Optional[int] = ..., rank: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("fingerprint", "model", "pid", "cores")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    model: str
    pid: int
    cores: str
    def __init__(self, fingerprint: _Optional[str] = ..., model: _Optional[str] = ..., pid: _Optional[int] = ..., cores: _Optional[str] = ...) -> None: ...

class EndRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class EndReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StoreRequest(_message.Message):
    __slots__ = ("key", "get", "set", "add", "swap", "delete")
    KEY_FIELD_NUMBER: _ClassVar[int]
    GET_FIELD_NUMBER: _ClassVar[int]
    SET_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    SWAP_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    key: str
    get: Nothing
    set: bytes
    add: int
    swap: Swap
    delete: Nothing
    def __init__(self, key: _Optional[str] = ..., get: _Optional[_Union[Nothing, _Mapping]] = ..., set: _Optional[bytes] = ..., add: _Optional[int] = ..., swap: _Optional[_Union[Swap, _Mapping]] = ..., delete: _Optional[_Union[Nothing, _Mapping]] = ...) -> None: ...

class Nothing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Swap(_message.Message):
    __slots__ = ("expected", "desired")
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    DESIRED_FIELD_NUMBER: _ClassVar[int]
    expected: bytes
    desired: bytes
    def __init__(self, expected: _Optional[bytes] = ..., desired: _Optional[bytes] = ...) -> None: ...

class StoreReply(_message.Message):
    __slots__ = ("epoch", "value")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    value: bytes
    def __init__(self, epoch: _Optional[int] = ..., value: _Optional[bytes] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class PingReply(_message.Message):
    __slots__ = ("epoch", "step_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("epoch", "model", "device", "dtype", "rank", "tensor_parallel_size", "rendezvous", "block_size", "quantization", "kv_cache_dtype", "num_sharing")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARING_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    model: str
    device: str
    dtype: str
    rank: int
    tensor_parallel_size: int
    rendezvous: str
    block_size: int
    quantization: str
    kv_cache_dtype: str
    num_sharing: int
    def __init__(self, epoch: _Optional[int] = ..., model: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., rank: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., rendezvous: _Optional[str] = ..., block_size: _Optional[int] = ..., quantization: _Optional[str] = ..., kv_cache_dtype: _Optional[str] = ..., num_sharing: _Optional[int] = ...) -> None: ...

class LoadProgress(_message.Message):
    __slots__ = ("done_bytes", "total_bytes", "memory")
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    done_bytes: int
    total_bytes: int
    memory: MemoryReport
    def __init__(self, done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., memory: _Optional[_Union[MemoryReport, _Mapping]] = ...) -> None: ...

class MemoryReport(_message.Message):
    __slots__ = ("weight_bytes", "total_bytes", "free_bytes", "kv_block_bytes", "dtype", "device")
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    weight_bytes: int
    total_bytes: int
    free_bytes: int
    kv_block_bytes: int
    dtype: str
    device: str
    def __init__(self, weight_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., kv_block_bytes: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class AllocateRequest(_message.Message):
    __slots__ = ("epoch", "num_blocks")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    num_blocks: int
    def __init__(self, epoch: _Optional[int] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class AllocateReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StepRequest(_message.Message):
    __slots__ = ("epoch", "step_id", "token_ids", "positions", "num_scheduled_tokens", "context_lens", "block_tables", "sampling", "encode", "embeddings", "drop", "copies", "previous_step_id", "awaits")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_SCHEDULED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TABLES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_STEP_ID_FIELD_NUMBER: _ClassVar[int]
    AWAITS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    token_ids: bytes
    positions: bytes
    num_scheduled_tokens: bytes
    context_lens: bytes
    block_tables: bytes
    sampling: Sampling
    encode: _containers.RepeatedCompositeFieldContainer[Encode]
    embeddings: _containers.RepeatedCompositeFieldContainer[Embedding]
    drop: _containers.RepeatedCompositeFieldContainer[Unit]
    copies: bytes
    previous_step_id: int
    awaits: bytes
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., positions: _Optional[bytes] = ..., num_scheduled_tokens: _Optional[bytes] = ..., context_lens: _Optional[bytes] = ..., block_tables: _Optional[bytes] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., encode: _Optional[_Iterable[_Union[Encode, _Mapping]]] = ..., embeddings: _Optional[_Iterable[_Union[Embedding, _Mapping]]] = ..., drop: _Optional[_Iterable[_Union[Unit, _Mapping]]] = ..., copies: _Optional[bytes] = ..., previous_step_id: _Optional[int] = ..., awaits: _Optional[bytes] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("rows", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "output_index", "seen_token_ids", "slots", "presence_penalty", "frequency_penalty", "edits", "logprob_places", "prompt_targets", "masks")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    SEEN_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_PLACES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TARGETS_FIELD_NUMBER: _ClassVar[int]
    MASKS_FIELD_NUMBER: _ClassVar[int]
    rows: bytes
    temperature: bytes
    top_k: bytes
    top_p: bytes
    min_p: bytes
    repetition_penalty: bytes
    seed: bytes
    output_index: bytes
    seen_token_ids: _containers.RepeatedScalarFieldContainer[bytes]
    slots: bytes
    presence_penalty: bytes
    frequency_penalty: bytes
    edits: LogitEdits
    logprob_places: bytes
    prompt_targets: PromptTargets
    masks: TokenMasks
    def __init__(self, rows: _Optional[bytes] = ..., temperature: _Optional[bytes] = ..., top_k: _Optional[bytes] = ..., top_p: _Optional[bytes] = ..., min_p: _Optional[bytes] = ..., repetition_penalty: _Optional[bytes] = ..., seed: _Optional[bytes] = ..., output_index: _Optional[bytes] = ..., seen_token_ids: _Optional[_Iterable[bytes]] = ..., slots: _Optional[bytes] = ..., presence_penalty: _Optional[bytes] = ..., frequency_penalty: _Optional[bytes] = ..., edits: _Optional[_Union[LogitEdits, _Mapping]] = ..., logprob_places: _Optional[bytes] = ..., prompt_targets: _Optional[_Union[PromptTargets, _Mapping]] = ..., masks: _Optional[_Union[TokenMasks, _Mapping]] = ...) -> None: ...

class TokenMasks(_message.Message):
    __slots__ = ("places", "allowed")
    PLACES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    places: bytes
    allowed: bytes
    def __init__(self, places: _Optional[bytes] = ..., allowed: _Optional[bytes] = ...) -> None: ...

class LogitEdits(_message.Message):
    __slots__ = ("places", "after", "token_ids", "bias")
    PLACES_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    places: bytes
    after: bytes
    token_ids: bytes
    bias: bytes
    def __init__(self, places: _Optional[bytes] = ..., after: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., bias: _Optional[bytes] = ...) -> None: ...

class PromptTargets(_message.Message):
    __slots__ = ("at", "token_ids")
    AT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    at: bytes
    token_ids: bytes
    def __init__(self, at: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ...) -> None: ...

class Unit(_message.Message):
    __slots__ = ("media_hash", "index")
    MEDIA_HASH_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    media_hash: bytes
    index: int
    def __init__(self, media_hash: _Optional[bytes] = ..., index: _Optional[int] = ...) -> None: ...

class Encode(_message.Message):
    __slots__ = ("unit", "grid_thw", "rank", "shape", "pixels", "embeds")
    UNIT_FIELD_NUMBER: _ClassVar[int]
    GRID_THW_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    EMBEDS_FIELD_NUMBER: _ClassVar[int]
    unit: Unit
    grid_thw: _containers.RepeatedScalarFieldContainer[int]
    rank: int
    shape: _containers.RepeatedScalarFieldContainer[int]
    pixels: bytes
    embeds: bytes
    def __init__(self, unit: _Optional[_Union[Unit, _Mapping]] = ..., grid_thw: _Optional[_Iterable[int]] = ..., rank: _Optional[int] = ..., shape: _Optional[_Iterable[int]] = ..., pixels: _Optional[bytes] = ..., embeds: _Optional[bytes] = ...) -> None: ...

class Embedding(_message.Message):
    __slots__ = ("unit", "start", "num_tokens", "dest", "row")
    UNIT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEST_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    unit: Unit
    start: int
    num_tokens: int
    dest: int
    row: int
    def __init__(self, unit: _Optional[_Union[Unit, _Mapping]] = ..., start: _Optional[int] = ..., num_tokens: _Optional[int] = ..., dest: _Optional[int] = ..., row: _Optional[int] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("epoch", "step_id", "sampled", "missing", "errors", "seconds", "logprobs", "prompt_logprobs", "encode_seconds")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    sampled: bytes
    missing: _containers.RepeatedCompositeFieldContainer[Unit]
    errors: _containers.RepeatedCompositeFieldContainer[RowError]
    seconds: float
    logprobs: Logprobs
    prompt_logprobs: Logprobs
    encode_seconds: float
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ..., sampled: _Optional[bytes] = ..., missing: _Optional[_Iterable[_Union[Unit, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[RowError, _Mapping]]] = ..., seconds: _Optional[float] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., encode_seconds: _Optional[float] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("at", "chosen", "top_token_ids", "top")
    AT_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    at: bytes
    chosen: bytes
    top_token_ids: bytes
    top: bytes
    def __init__(self, at: _Optional[bytes] = ..., chosen: _Optional[bytes] = ..., top_token_ids: _Optional[bytes] = ..., top: _Optional[bytes] = ...) -> None: ...

class RowError(_message.Message):
    __slots__ = ("row", "text", "code", "field")
    ROW_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    row: int
    text: str
    code: str
    field: str
    def __init__(self, row: _Optional[int] = ..., text: _Optional[str] = ..., code: _Optional[str] = ..., field: _Optional[str] = ...) -> None: ...
