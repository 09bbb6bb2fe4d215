"""Incremental text: never half a character, stop strings cut out wherever tokens divide them."""

import random

import pytest

from gptjax.infer.text import REPLACEMENT, TextStream

SAMPLE = "naïve 日本語 🙂🙂 ends.\n\tTabs  and   runs"


def decode_bytes(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


def decode_words(tokens):
    """Like a SentencePiece model with a dummy prefix: the first space of a call is dropped."""
    vocab = [" a", " b", "c", " d"]
    return "".join(vocab[token] for token in tokens).removeprefix(" ")


def chunks(tokens, rng):
    while tokens:
        n = rng.randint(1, 4)
        yield tokens[:n]
        tokens = tokens[n:]


def run(decode, parts, **kwargs):
    stream = TextStream(decode, **kwargs)
    pieces = [stream.push(part) for part in parts]
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return pieces, stream


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_whole_characters_and_join_to_the_text(seed):
    rng = random.Random(seed)
    pieces, _ = run(decode_bytes, chunks(list(SAMPLE.encode()), rng))
    assert "".join(pieces) == SAMPLE
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(50))
def test_broken_bytes_give_the_text_of_one_decode_however_divided(seed):
    rng = random.Random(seed)
    tokens = [rng.choice([0x61, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0x82, 0xFF]) for _ in range(60)]
    pieces, _ = run(decode_bytes, chunks(tokens, rng))
    assert "".join(pieces) == decode_bytes(tokens)


def test_incomplete_end_is_held_until_finish():
    stream = TextStream(decode_bytes)
    assert stream.push("a€".encode()[:3]) == "a"
    assert stream.push("€".encode()[2:]) == "€"
    assert stream.push("€".encode()[:1]) == ""
    assert stream.finish() == REPLACEMENT


def test_a_tokenizer_that_drops_the_leading_space_keeps_it_inside_a_completion():
    pieces, _ = run(decode_words, [[1], [2, 0], [3]], prompt=[0])
    assert pieces[:3] == [" b", "c a", " d"]
    pieces, _ = run(decode_words, [[1], [2], [0, 3]])
    assert "".join(pieces) == "bc a d"


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_spanning_tokens_are_cut_and_nothing_after_them_leaks(seed):
    rng = random.Random(seed)
    text = "one two STO three STOP four"
    pieces, stream = run(decode_bytes, chunks(list(text.encode()), rng), stop=["STOP", "never"])
    assert "".join(pieces) == "one two STO three "
    assert stream.stopped


def test_the_earliest_of_several_stops_wins_and_a_half_stop_at_the_end_is_text():
    _, stream = run(decode_bytes, [b"ab", b"cdef"], stop=["de", "cd"])
    assert stream.text == "ab"
    # "b" is complete before "abc" is, and "abc" begins before "bc", with which it ends.
    for stop, text in ((["abc", "b"], "xa"), (["bc", "abc"], "x")):
        for parts in ([b"xabcd"], [b"xa", b"bcd"], [b"xab", b"cd"], [b"x", b"a", b"b", b"c", b"d"]):
            _, stream = run(decode_bytes, parts, stop=stop)
            assert stream.text == text and stream.stopped
    _, stream = run(decode_bytes, [b"x ST"], stop=["STOP"])
    assert stream.text == "x ST" and not stream.stopped


def test_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop"):
        TextStream(decode_bytes, stop=[""])
