import pickle
import string

import numpy as np
import pytest
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.data import corpus, tokenizer

NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "\t\ttabs\tand\r\nline ends\r\n\n\n   \n",
    "nul \0 bell \x07 delete \x7f",
    "\u2581 the character SentencePiece writes for a space, doubled \u2581\u2581 and alone",
    "\u2585 and its mark for the unknown, \u2047",
    "<s></s><pad><unk><mask><0x0A>",
    "\ufeffbyte order mark, \u200b\u200d joiners, e\u0301 not \u00e9",
    "\U0001f469\u200d\U0001f680 \U0010ffff \ud7ff \ue000 \ufffd",
    "中文、日本語、한국어、العربية",
]


@pytest.fixture(scope="module")
def code():
    return [path.read_text() for path in list(corpus.modules().values())[:60]]


@pytest.fixture(scope="module")
def bpe(code):
    return tokenizer.train_bpe(code, 600)


@pytest.fixture(scope="module", params=["sentencepiece", "bytes"])
def any_text(request, bpe):
    return bpe if request.param == "sentencepiece" else tokenizer.byte_level()


@pytest.mark.parametrize("text", NASTY)
def test_round_trip_of_nasty_texts(any_text, text):
    assert any_text.decode(any_text.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text(alphabet=" \t\n\r\u2581ab<>0x"))
@example(text=" \u2581 ")
def test_round_trip_of_any_unicode(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_round_trip_of_source_code(bpe, code):
    for text, ids in zip(code, bpe.encode_batch(code), strict=True):
        assert bpe.decode(ids.tolist()) == text
        assert not set(ids.tolist()) & bpe.special_ids


def test_pieces_hold_indentation_line_ends_and_symbols(bpe):
    assert {b"    ", b"        ", b":\n", b"self."} <= set(bpe.pieces)
    assert len(bpe.encode("        ")) == 1


def test_long_text_is_encoded_in_parts_without_loss(bpe, monkeypatch):
    whole = "def f(x):\n    return x\n\n" * 200
    at_once = bpe.encode(whole)
    monkeypatch.setattr(tokenizer, "_ENCODE_CHUNK_CHARACTERS", 100)
    assert bpe.encode(whole) == at_once
    assert bpe.decode(bpe.encode("x" * 1000 + "   \n" * 300)) == "x" * 1000 + "   \n" * 300


def test_special_ids_are_apart_and_stand_for_nothing(bpe):
    ids = [bpe.pad_id, bpe.bos_id, bpe.eos_id, bpe.unk_id, bpe.mask_id]
    assert ids == [0, 1, 2, 3, 4]
    assert bpe.eos_ids == (2,) and bpe.special_ids == {0, 1, 2, 3, 4}
    assert bpe.decode([1, *bpe.encode("a b"), 2, 0, 0]) == "a b"
    assert bpe.vocab_size == len(bpe.pieces) == 600


def test_any_ids_decode_and_a_character_may_be_cut(bpe):
    bpe.decode(range(bpe.vocab_size))
    cut = bpe.encode("\U0001f600")[:-1]
    assert bpe.decode(cut) == "\ufffd"
    assert bpe.decode_bytes(cut) == "\U0001f600".encode()[:-1]


def test_bytes_reads_back_equal(any_text):
    again = tokenizer.from_bytes(any_text.to_bytes())
    assert again.fingerprint == any_text.fingerprint
    assert again.encode("def f():\n\treturn 1") == any_text.encode("def f():\n\treturn 1")
    assert pickle.loads(pickle.dumps(any_text)).fingerprint == any_text.fingerprint


def test_training_twice_gives_the_same_tokenizer(code):
    one, two = (tokenizer.train_bpe(code[:10], 400) for _ in range(2))
    assert one.fingerprint == two.fingerprint


def test_save_and_load_from_file_or_directory(tmp_path, bpe):
    tokenizer.save(bpe, tmp_path / tokenizer.FILE_NAME)
    assert tokenizer.load(tmp_path).fingerprint == bpe.fingerprint
    assert tokenizer.load(tmp_path / tokenizer.FILE_NAME).fingerprint == bpe.fingerprint
    tokenizer.save(bpe, tmp_path / tokenizer.FILE_NAME)
    with pytest.raises(ValueError, match="another tokenizer is already there"):
        tokenizer.save(tokenizer.byte_level(), tmp_path / tokenizer.FILE_NAME)


def test_a_tokenizer_is_read_from_a_bucket(bucket):
    epath.Path(bucket).mkdir(parents=True)
    epath.Path(f"{bucket}/{tokenizer.FILE_NAME}").write_bytes(tokenizer.byte_level().to_bytes())
    for path in (bucket, f"{bucket}/{tokenizer.FILE_NAME}"):
        assert tokenizer.load(path).kind == "bytes"
    with pytest.raises(ValueError, match="gs://bucket/other: no tokenizer there"):
        tokenizer.load(f"{bucket}/other")


def test_characters(tmp_path):
    text = string.printable + "é\u2581"
    chars = tokenizer.characters(text)
    assert chars.vocab_size == len(text)
    assert chars.decode(chars.encode(text)) == text
    assert chars.encode("\t\n") == [0, 1]  # by code point
    assert chars.bos_id is chars.eos_id is None
    assert tokenizer.load(tokenizer_file(tmp_path, chars)).encode(text) == chars.encode(text)
    for missing in ("\0", "中", "ab\U0010ffff"):
        with pytest.raises(ValueError, match="is not among the 102 of this tokenizer"):
            chars.encode(missing)
    with pytest.raises(ValueError, match="empty"):
        tokenizer.characters("")


def tokenizer_file(directory, value):
    tokenizer.save(value, directory / "chars")
    return directory / "chars"


def test_lone_surrogates_are_refused(any_text):
    with pytest.raises(ValueError, match="lone surrogate"):
        any_text.encode("ab\ud800")


@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", b'{"kind": "word"}', b"{", b"\n\x05abcde"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken: not a "):
        tokenizer.load(path)


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.model: no tokenizer there"):
        tokenizer.load(tmp_path / "none.model")
    with pytest.raises(ValueError, match="tokenizer.model: no tokenizer there"):
        tokenizer.load(tmp_path)


def test_a_vocabulary_that_cannot_be_is_refused(code):
    with pytest.raises(ValueError, match="vocab_size=100: expected over 261"):
        tokenizer.train_bpe(code[:3], 100)
    with pytest.raises(ValueError, match="vocab_size=9000: .*too high"):
        tokenizer.train_bpe(["a little text"], 9000)
    with pytest.raises(ValueError, match="vocab_size=261: expected over 261, the 5 special ids and 256 bytes"):
        tokenizer.train_bpe(["some text"], 261)
    with pytest.raises(ValueError, match="no text to learn from"):
        tokenizer.train_bpe([], 500)


def test_training_reads_no_more_than_it_was_told(code):
    def texts():
        yield from code[:10]
        raise AssertionError("read on")

    limit = sum(len(text.encode()) for text in code[:9])
    assert tokenizer.train_bpe(texts(), 400, max_bytes=limit).vocab_size == 400


def test_models_of_others_load(shared_data, monkeypatch):
    mistral = tokenizer.load(shared_data / "tokenizers" / "mistral_v1" / "tokenizer.model.v1")
    assert (mistral.vocab_size, mistral.bos_id, mistral.pad_id) == (32000, 1, None)
    assert mistral.has_dummy_prefix
    for text in ("Hello  world\n\tx", " x", "\u2581", ""):
        assert mistral.decode(mistral.encode(text)) == text
    # A space before the whole text, none before its parts: around that character, and where a long text is cut.
    text = "a\u2581b\u2581\u2581 c"
    assert mistral.decode(mistral.encode(text)) == text
    text = "one line\nand another\n" * 20
    at_once = mistral.encode(text)
    monkeypatch.setattr(tokenizer, "_ENCODE_CHUNK_CHARACTERS", 30)
    assert mistral.encode_batch([text, "x"])[0].tolist() == at_once
    assert mistral.encode_batch(["a", "bc"])[1].dtype == np.int32
