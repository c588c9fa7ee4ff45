"""The program of `make demo`: right answers and its exit status."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

import octavo
from octavo.benchmarks import demo


def test_every_answer_is_right(capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    said = capfd.readouterr().out
    for word in ("star.png", "moving.mp4", "the second", "407", "Octavo", "TTFT", "TPOT", "tok/s"):
        assert word in said
    assert "all answers are right; the server has stopped" in said


def test_a_wrong_answer_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server is replaced by a fixed wrong answer."""

    def send(client: octavo.Client, question: demo.Question) -> None:
        question.deltas.put(SimpleNamespace(text="pink", finish_reason="stop"))

    monkeypatch.setattr(demo, "send", send)
    monkeypatch.setattr(demo, "server", lambda: nullcontext("127.0.0.1:1"))
    assert demo.main() == 1
    said = capfd.readouterr().out
    assert "pink" in said and "wrong" in said and "some answers are wrong" in said


def test_a_server_that_does_not_start_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        demo.main()
