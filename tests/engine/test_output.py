"""Text from tokens: characters split over tokens, stop strings split over tokens."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from octavo.engine.core import detokenizer
from octavo.engine.core.detokenizer import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Every byte a token, and one special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    return tokenizer


TEXTS = [
    "plain",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 family",
    "שלום",
    "a\u0301 combining",
    "नमस्ते",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_pieces_make_the_whole_text(tokenizer: Tokenizer, text: str, size: int) -> None:
    ids = tokenizer.encode(text).ids
    stream = TextStream(tokenizer)
    pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == text


def test_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    end = tokenizer.token_to_id("<|im_end|>")
    assert stream.push([*tokenizer.encode("red").ids, end]) + stream.flush() == "red"


def test_bytes_that_never_become_a_character_show_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 日").ids[:-1]
    stream = TextStream(tokenizer)
    assert stream.push(ids) == "ok "
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("size", [1, 3])
def test_a_stop_string_over_token_borders_is_never_shown(tokenizer: Tokenizer, size: int) -> None:
    ids = tokenizer.encode("one two END three").ids
    stream = TextStream(tokenizer, ["END", "never"])
    shown = "".join(stream.push(ids[i : i + size]) for i in range(0, len(ids), size))
    assert shown + stream.flush() == "one two "
    assert stream.stopped


def test_what_looked_like_a_stop_string_is_shown_in_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["END"])
    assert stream.push(tokenizer.encode("the EN").ids) == "the "
    assert stream.flush() == "EN"
    assert not stream.stopped


def test_stop_strings_agree_with_a_search_of_the_whole_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(0, 20)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 5))) for _ in range(2)]
        ids, stream, shown = tokenizer.encode(text).ids, TextStream(tokenizer, stops), ""
        while ids and not stream.stopped:
            size = rng.randint(1, 4)
            shown += stream.push(ids[:size])
            ids = ids[size:]
        shown += stream.flush()
        assert not any(stop in shown for stop in stops)
        assert text.startswith(shown)
        if not stream.stopped:
            assert shown == text


def test_stop_strings_cost_a_token_little_however_long_they_are(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one holds back all of the text, which the others are not looked for in again."""
    tried: list[int] = []

    def overlap(text: str, stop: str, most: int) -> int:
        tried.append(most)
        return real(text, stop, most)

    real = detokenizer._overlap
    monkeypatch.setattr(detokenizer, "_overlap", overlap)
    stream = TextStream(tokenizer, ["a" * 200 + "!", *("b" * 200 + str(n) for n in range(9))])
    for token in tokenizer.encode("a" * 150).ids:
        assert stream.push([token]) == ""
    assert sum(tried) == 9 * 150 + sum(range(151))
    assert stream.flush() == "a" * 150


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_stop_string_that_is_to_be_shown_ends_the_text(tokenizer: Tokenizer, size: int) -> None:
    ids = tokenizer.encode("one two END three").ids
    stream = TextStream(tokenizer, ["END", "never"], include_stop=True)
    shown = "".join(stream.push(ids[i : i + size]) for i in range(0, len(ids), size))
    assert shown + stream.flush() == "one two END"
    assert stream.stopped


def test_special_tokens_may_be_shown(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, skip_special_tokens=False)
    end = tokenizer.token_to_id("<|im_end|>")
    assert stream.push([*tokenizer.encode("red").ids, end]) + stream.flush() == "red<|im_end|>"
    ids = [end, *tokenizer.encode("日").ids[:-1]]
    stream = TextStream(tokenizer, skip_special_tokens=False)
    assert stream.push(ids) + stream.flush() == "<|im_end|>\ufffd"


@pytest.mark.parametrize("size", [1, 4])
def test_no_stop_string_ends_the_first_tokens(tokenizer: Tokenizer, size: int) -> None:
    ids = tokenizer.encode("aXbXcX").ids  # a character a token
    for least, expected in ((0, "a"), (1, "a"), (2, "aXb"), (5, "aXbXc"), (6, "aXbXcX")):
        stream = TextStream(tokenizer, ["X"], min_tokens=least)
        shown = "".join(stream.push(ids[i : i + size]) for i in range(0, len(ids), size))
        assert shown + stream.flush() == expected
        assert stream.stopped == (least < 6)
