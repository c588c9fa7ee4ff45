"""Data URIs as browsers and clients write them, and malformed ones."""

import base64
import io
import random
import tracemalloc
from urllib.parse import quote, unquote_to_bytes

import pytest

from octavo.benchmarks.media.cases import encoded, mp4, noise
from octavo.engine.client.errors import ClientError
from octavo.engine.client.media import media_item
from octavo.engine.config.media_limits import MediaLimits
from octavo.engine.errors import InputError
from octavo.engine.media.data_uri import CHUNK, percent_decoded
from octavo.engine.media.source import MediaAccess, open_source
from octavo.engine.media.source_text import looks_like_base64
from octavo.engine.media.task import MediaTask

DATA = encoded(noise())
TEXT = base64.b64encode(DATA).decode()
URL_SAFE = base64.urlsafe_b64encode(DATA).decode()
assert TEXT.endswith("=") and TEXT != URL_SAFE and "/" in TEXT


def read(source: str, limits: MediaLimits | None = None) -> bytes:
    access, task = MediaAccess(roots=()), MediaTask(limits or MediaLimits())
    file = open_source(source, access, "image", task)
    assert isinstance(file, io.BytesIO)
    return file.read()


def error_of(source: str, limits: MediaLimits | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read(source, limits)
    return str(caught.value)


LINES = "\r\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76))  # as MIME has them
SAME = {
    "plain": f"data:image/png;base64,{TEXT}",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    "mixed case": f"Data:image/PNG;Base64,{TEXT}",
    "no type": f"data:;base64,{TEXT}",
    "only a family": f"data:image;base64,{TEXT}",
    "another type": f"data:text/plain;base64,{TEXT}",
    "a parameter": f"data:image/png;charset=utf-8;base64,{TEXT}",
    "parameters": f'data:image/png;name="a b.png";charset=utf-8;base64,{TEXT}',
    "blanks before base64": f"data:image/png; base64,{TEXT}",
    "blanks after base64": f"data:image/png;base64 ,{TEXT}",
    "a blank before the data": f"data:image/png;base64, {TEXT}",
    "blanks before the URI": f" \n\tdata:image/png;base64,{TEXT}",
    "blanks after the URI": f"data:image/png;base64,{TEXT} \r\n",
    "lines": f"data:image/png;base64,{LINES}",
    "no padding": f"data:image/png;base64,{TEXT.rstrip('=')}",
    "URL-safe": f"data:image/png;base64,{URL_SAFE}",
    "URL-safe without padding": f"data:image/png;base64,{URL_SAFE.rstrip('=')}",
    "percent-encoded base64": f"data:image/png;base64,{quote(TEXT, safe='')}",
    "percent-encoded lines": f"data:image/png;base64,{quote(LINES, safe='')}",
    "percent-encoded bytes": f"data:image/png,{quote(DATA)}",
    "all percent-encoded": "data:image/png," + "".join(f"%{byte:02x}" for byte in DATA),
    "bytes without a type": f"data:,{quote(DATA, safe='')}",
}


@pytest.mark.parametrize("name", SAME)
def test_data_uris_are_read_as_browsers_read_them(name: str) -> None:
    assert read(SAME[name]) == DATA
    sent = media_item({"type": "image", "image": SAME[name]})  # `Client` passes them on
    assert sent.url == SAME[name]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("data:image/png", "the comma is missing"),
        ("data:image/png;base64", "the comma is missing"),
        ("data:" + "x" * 10_000 + f";base64,{TEXT}", "the comma is missing"),
        ("data:image/png;base64,", "has no bytes"),
        ("data:image/png;base64,!!", "is not valid base64"),
        ("data:image/png;base64,A", "is not valid base64"),
        ("data:image/png;base64,AAAA=AAA", "is not valid base64"),
        ("data:image/png;base64,AAAA====", "is not valid base64"),
        ("data:image/png;base64,\u00e9AAA", "is not valid base64"),
        ("data:image/png;base64,\ud800AAA", "is not valid base64"),
        (" https://a.org/b.png", "remove the space before the URL"),
        ("\nfile:///b.png", "remove the space before the URL"),
        ("ftp://a.org/b.png", "only http://, https://, file:// and data: are supported"),
    ],
)
def test_malformed_sources_are_rejected_clearly(source: str, words: str) -> None:
    assert words in error_of(source)


BARE = {
    form: base64.b64encode(encoded(noise(), form)).decode()
    for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
} | {"MP4": base64.b64encode(mp4(4)).decode()}


@pytest.mark.parametrize("form", BARE)
@pytest.mark.parametrize("length", [48, 200, 10_000])
def test_bare_base64_is_reported_as_such(form: str, length: int) -> None:
    """A server said that it reads no files, a client that the file's name is too long."""
    for text in (BARE[form][:length], " " + BARE[form][:length], BARE[form][:length] + "\n"):
        assert "looks like base64; put data:image/png;base64," in error_of(text)
        with pytest.raises(ClientError, match="looks like base64"):
            media_item({"type": "image", "image": text})


def test_paths_are_not_taken_for_base64() -> None:
    for path in ("iVBORw0KGgo.png", "/9j/photo.jpg", "Qk", "R0lGOD", "a/b/c", "UklGR/x.webp"):
        assert not looks_like_base64(path)
        assert "reading files" in error_of(path)


def test_percent_decoding_is_that_of_python() -> None:
    rng = random.Random(0)
    for _ in range(300):
        data = "".join(rng.choices("%%%%0123abFXg ", k=rng.randrange(40))).encode()
        assert percent_decoded(data) == unquote_to_bytes(data), data
    for shift in range(4):  # escapes at the borders of chunks
        data = b"a" * (CHUNK - shift) + b"%41%4" + b"b" * CHUNK + b"%%43%"
        assert percent_decoded(data) == unquote_to_bytes(data)
    assert percent_decoded(b"%" * (2 * CHUNK)) == b"%" * (2 * CHUNK)


@pytest.mark.lesson("L22")
def test_bombs_the_work_for_a_data_uri_is_bounded() -> None:
    limits = MediaLimits(max_media_bytes=1 << 20)
    for source in (
        "data:,".ljust(4 << 20, "x"),
        "data:;base64,".ljust(4 << 20, "A"),
        "data:," + "x" * (2 << 20),
        "data:;base64," + "A" * (2 << 20),
    ):
        assert "--max-media-bytes" in error_of(source, limits)
    source = "data:," + "%41" * (4 << 20)
    tracemalloc.start()
    assert read(source) == b"A" * (4 << 20)
    assert tracemalloc.get_traced_memory()[1] < 8 * len(source)
    tracemalloc.stop()


def test_a_video_is_a_data_uri_as_well() -> None:
    text = base64.b64encode(mp4(8)).decode().rstrip("=")
    assert read(f"DATA:video/MP4;BASE64,{text}") == mp4(8)
