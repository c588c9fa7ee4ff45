from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Request(_message.Message):
    __slots__ = ("open", "get_times", "get_frames", "frame_taken", "stop", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    GET_TIMES_FIELD_NUMBER: _ClassVar[int]
    GET_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FRAME_TAKEN_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: Open
    get_times: GetTimes
    get_frames: GetFrames
    frame_taken: FrameTaken
    stop: Stop
    close: Close
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., get_times: _Optional[_Union[GetTimes, _Mapping]] = ..., get_frames: _Optional[_Union[GetFrames, _Mapping]] = ..., frame_taken: _Optional[_Union[FrameTaken, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("reader_id", "kind", "field", "limits")
    class LimitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    READER_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    reader_id: int
    kind: str
    field: str
    limits: _containers.ScalarMap[str, int]
    def __init__(self, reader_id: _Optional[int] = ..., kind: _Optional[str] = ..., field: _Optional[str] = ..., limits: _Optional[_Mapping[str, int]] = ...) -> None: ...

class GetTimes(_message.Message):
    __slots__ = ("reader_id", "indices")
    READER_ID_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    reader_id: int
    indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, reader_id: _Optional[int] = ..., indices: _Optional[_Iterable[int]] = ...) -> None: ...

class GetFrames(_message.Message):
    __slots__ = ("reader_id", "indices", "height", "width", "num_slots", "buffer_bytes")
    READER_ID_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    BUFFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    reader_id: int
    indices: _containers.RepeatedScalarFieldContainer[int]
    height: int
    width: int
    num_slots: int
    buffer_bytes: int
    def __init__(self, reader_id: _Optional[int] = ..., indices: _Optional[_Iterable[int]] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., num_slots: _Optional[int] = ..., buffer_bytes: _Optional[int] = ...) -> None: ...

class FrameTaken(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Stop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Close(_message.Message):
    __slots__ = ("reader_id",)
    READER_ID_FIELD_NUMBER: _ClassVar[int]
    reader_id: int
    def __init__(self, reader_id: _Optional[int] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("ready", "header", "times", "frame_ready", "done", "stopped", "error")
    READY_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    FRAME_READY_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ready: Ready
    header: Header
    times: Times
    frame_ready: FrameReady
    done: Done
    stopped: Stopped
    error: Error
    def __init__(self, ready: _Optional[_Union[Ready, _Mapping]] = ..., header: _Optional[_Union[Header, _Mapping]] = ..., times: _Optional[_Union[Times, _Mapping]] = ..., frame_ready: _Optional[_Union[FrameReady, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., stopped: _Optional[_Union[Stopped, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("sandbox",)
    SANDBOX_FIELD_NUMBER: _ClassVar[int]
    sandbox: str
    def __init__(self, sandbox: _Optional[str] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("height", "width", "num_frames", "fps")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    num_frames: int
    fps: float
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ..., num_frames: _Optional[int] = ..., fps: _Optional[float] = ...) -> None: ...

class Times(_message.Message):
    __slots__ = ("times",)
    TIMES_FIELD_NUMBER: _ClassVar[int]
    times: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, times: _Optional[_Iterable[float]] = ...) -> None: ...

class FrameReady(_message.Message):
    __slots__ = ("index",)
    INDEX_FIELD_NUMBER: _ClassVar[int]
    index: int
    def __init__(self, index: _Optional[int] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Stopped(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Error(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...
