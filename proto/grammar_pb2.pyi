from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ServerRequest(_message.Message):
    __slots__ = ("load", "fork")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    load: Load
    fork: Fork
    def __init__(self, load: _Optional[_Union[Load, _Mapping]] = ..., fork: _Optional[_Union[Fork, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("vocab_size", "end_token_ids")
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    END_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    vocab_size: int
    end_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, vocab_size: _Optional[int] = ..., end_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Fork(_message.Message):
    __slots__ = ("niceness",)
    NICENESS_FIELD_NUMBER: _ClassVar[int]
    niceness: int
    def __init__(self, niceness: _Optional[int] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("error", "is_ready")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    IS_READY_FIELD_NUMBER: _ClassVar[int]
    error: str
    is_ready: bool
    def __init__(self, error: _Optional[str] = ..., is_ready: bool = ...) -> None: ...

class Trial(_message.Message):
    __slots__ = ("field", "cpu_seconds")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    field: str
    cpu_seconds: float
    def __init__(self, field: _Optional[str] = ..., cpu_seconds: _Optional[float] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("is_timed_out", "error", "cpu_seconds", "num_bytes")
    IS_TIMED_OUT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    is_timed_out: bool
    error: str
    cpu_seconds: float
    num_bytes: int
    def __init__(self, is_timed_out: bool = ..., error: _Optional[str] = ..., cpu_seconds: _Optional[float] = ..., num_bytes: _Optional[int] = ...) -> None: ...
