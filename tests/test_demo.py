"""`make demo`'s program: right answers and an exit status that tells."""

from pathlib import Path

import pytest

from octavo.benchmarks import demo


def test_every_answer_is_right(capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    said = capfd.readouterr().out
    for word in ("star.png", "moving.mp4", "the second", "407", "Octavo", "TTFT", "TPOT", "tok/s"):
        assert word in said
    assert "every answer is right; the server has stopped" in said


def test_a_wrong_answer_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_questions = demo.make_questions

    def unfair(folder: Path) -> list[demo.Question]:
        questions = make_questions(folder)
        questions[0].right = lambda text: text == "pink"
        return questions

    monkeypatch.setattr(demo, "make_questions", unfair)
    assert demo.main() == 1
    assert "not every answer is right" in capfd.readouterr().out


def test_a_server_that_does_not_start_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        demo.main()
