"""Tokenizers in GGUF files have the ids that llama.cpp gives."""

import json

import numpy as np
import pytest

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.interop import certificate, sentencepiece_model
from gptjax.interop.gguf import file as gguf_file
from gptjax.interop.gguf import tokenizer as gguf_tokenizer
from gptjax.interop.gguf import write as gguf_write
from gptjax.interop.gguf.file import GgufFile
from tests.interop.gguf import models as gguf_models

pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers", reason="byte-level BPE is run by the tokenizers package")
huggingface = pytest.importorskip("gptjax.data.huggingface")

_WHOLE = "qzjq"  # a token that no merges lead to
TEXTS = (
    *certificate.STRINGS,
    "HTTPServer2Go's  3rd   call—it'LL cost $1,234.50!!\n\n\t  done  ",
    "ÀÉÎ Ǆaba ǅ straße İstanbul ΑΒΓ ά",
    "中文字符、ひらがな カタカナ한국어 2024年12月",
    "x=1;y+=2\r\n\r\nif(a&&b){c/=d;}//e\u2028f\u00a0g",
    "१२३ ٤٥٦ Ⅷ ½ ² 𝟙𝟚",
    "e\u0301\u0323 n\u0303o \u200d",
    "  \n  \n\n   \t\t a",
)


@pytest.fixture(scope="module")
def merged():
    """Tokens and merges of a BPE that joins whatever a split does not keep apart."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 4, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].__getitem__), _WHOLE]
    return tokens, [" ".join(merge) for merge in model["merges"]]


def metadata_of(merged, pre: str) -> dict:
    """With an end of text and three more tokens."""
    tokens = [*merged[0], "<|endoftext|>", "<|user|>", "<|stop|>", "<tool>"]
    end = len(merged[0])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * (end + 1) + [3, 3, 4], np.int32),
        "tokenizer.ggml.merges": merged[1],
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.eot_token_id": end + 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


def written(tokenizer, tmp_path, *, vocab_size: int):
    """A GGUF file of a tiny model with a tokenizer."""
    config = gguf_models.CONFIGS["llama"] | {"vocab_size": vocab_size}
    source = gguf_models.source(config, tokenizer=tokenizer)
    gguf_write.write_source(source, tmp_path / "model.gguf", quantization="f16")
    return tmp_path / "model.gguf"


def llama_cpp(file, **options):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    from gptjax.interop.referees.llama_cpp import LlamaCppRunner

    return LlamaCppRunner(file, **options)


@pytest.mark.parametrize("pre", gguf_tokenizer._SPLITS)
def test_byte_level_bpe_splits_as_llama_cpp_does(merged, tmp_path, pre):
    tokenizer = gguf_tokenizer.read(GgufFile(tmp_path, metadata_of(merged, pre), {}))
    assert tokenizer.kind == "huggingface" and tokenizer.start_id is None
    end = len(merged[0])
    assert tokenizer.eos_ids == (end, end + 2) and tokenizer.vocab_size == end + 4
    file = written(tokenizer, tmp_path, vocab_size=tokenizer.vocab_size + 5)
    found = gguf_file.read_header(file).metadata
    assert found["tokenizer.ggml.pre"] == pre and found["tokenizer.ggml.tokens"][-1] == f"[PAD{end + 8}]"
    theirs = llama_cpp(file)
    from gptjax.interop.referees.llama_cpp import known_difference

    texts = [text for text in (*TEXTS, "a<|user|>b <tool>c", _WHOLE) if known_difference(tokenizer, text) is None]
    assert len(tokenizer.encode(_WHOLE)) == (1 if pre in ("llama-bpe", "tekken") else 4)
    assert len(texts) == len(TEXTS) + 2 or pre in ("gpt-4o", "tekken")
    different = {text: (tokenizer.encode(text), theirs.encode(text)) for text in texts}
    assert {text: ids for text, ids in different.items() if ids[0] != ids[1]} == {}
    again = gguf_tokenizer.read(gguf_file.read_header(file))
    assert again.fingerprint == tokenizer.fingerprint


def test_the_splits_differ(merged, tmp_path):
    ids = {
        pre: str([
            gguf_tokenizer.read(GgufFile(tmp_path, metadata_of(merged, pre), {})).encode(text) for text in TEXTS
        ])
        for pre in gguf_tokenizer._SPLITS
    }  # fmt: skip
    assert len(set(ids.values())) == len(ids)


def test_a_32000_piece_sentencepiece_model(shared_data, tmp_path):
    from gptjax.interop.referees.llama_cpp import known_difference

    tokenizer = tokenizer_lib.load(shared_data / "tokenizers" / "mistral_v1" / "tokenizer.model.v1")
    file = written(tokenizer, tmp_path, vocab_size=32_000)
    theirs = llama_cpp(file, tokenizer=tokenizer)
    again = gguf_tokenizer.read(gguf_file.read_header(file))
    assert again.kind == "sentencepiece" and again.pieces == tokenizer.pieces
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert (theirs.encode(text) == ids) == (known_difference(tokenizer, text) is None), text


def test_our_own_tokenizer(tmp_path):
    texts = ["The quick brown fox jumps over the lazy dog.\n\n    def f(x):\n        return x + 1\n" * 40]
    tokenizer = tokenizer_lib.train_bpe(texts, 300)
    theirs = llama_cpp(written(tokenizer, tmp_path, vocab_size=320), tokenizer=tokenizer)
    again = gguf_tokenizer.read(gguf_file.read_header(tmp_path / "model.gguf"))
    for text in ("def quick(x):\n        return brown", " fox  ", "日本", "", "lazy\tdog\n"):
        assert again.encode(text) == tokenizer.encode(text) == theirs.encode(text)
    assert again.start_id == tokenizer.start_id and again.vocab_size == tokenizer.vocab_size


def test_a_tokenizer_json_with_sentencepiece_s_pieces(shared_data, tmp_path):
    original = tokenizer_lib.load(shared_data / "tokenizers" / "mistral_v1" / "tokenizer.model.v1")
    from gptjax.interop import tokenizer_json

    content, special = tokenizer_json.of(original)
    template = "{{ messages[0]['content'] }}"
    description = huggingface.Description(tokenizer=content, special_tokens=special, chat_template=template)
    tokenizer = huggingface.make(description)
    file = written(tokenizer, tmp_path, vocab_size=32_000)
    theirs, again = llama_cpp(file), gguf_tokenizer.read(gguf_file.read_header(file))
    assert again.kind == "huggingface" and again.chat_template == template and again.start_id == original.bos_id
    for text in ("Once upon a time", "été 天 \U0001f600", "a  b\n\tc", "don't", "x" * 50):
        assert tokenizer.encode(text) == again.encode(text) == theirs.encode(text)


def test_what_llama_cpp_cannot_split_is_refused(merged, tmp_path):
    tokenizer = gguf_tokenizer.read(GgufFile(tmp_path, metadata_of(merged, "gpt-2"), {}))
    values = json.loads(tokenizer.serialized)
    values["tokenizer"]["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": False}, values["tokenizer"]["pre_tokenizer"]],
    }
    other = tokenizer_lib.from_bytes(json.dumps(values).encode())
    with pytest.raises(ValueError, match="splits text in a way that is none of gpt-2, smollm"):
        gguf_tokenizer.write(other, vocab_size=60_000)
    with pytest.raises(ValueError, match="has .* tokens, expected at most the model's 100"):
        gguf_tokenizer.write(tokenizer, vocab_size=100)


def test_a_model_without_a_tokenizer_llama_cpp_knows(tmp_path):
    file = written(tokenizer_lib.byte_level(), tmp_path, vocab_size=300)
    assert llama_cpp(file).encode("a") is None
    assert gguf_tokenizer.read(gguf_file.read_header(file)) is None


def test_pieces_are_taken_apart_and_put_together(shared_data):
    tokenizer = tokenizer_lib.load(shared_data / "models" / "stories260K" / "tok512.model")
    again = sentencepiece_model.build(sentencepiece_model.take_apart(tokenizer))
    assert again.pieces == tokenizer.pieces
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)
    with pytest.raises(ValueError, match="1 unknown piece, got 0"):
        sentencepiece_model.build(sentencepiece_model.Pieces(texts=["a", "b"], scores=[0, 1], types=[1, 1]))


def test_where_llama_cpp_is_known_to_differ_it_does(shared_data, tmp_path):
    from gptjax.interop.referees.llama_cpp import known_difference

    tokenizer = tokenizer_lib.load(shared_data / "models" / "stories260K" / "tok512.model")
    theirs = llama_cpp(written(tokenizer, tmp_path, vocab_size=512), tokenizer=tokenizer)
    differs = {text for text in TEXTS if theirs.encode(text) != tokenizer.encode(text)}
    known = {text for text in TEXTS if known_difference(tokenizer, text) is not None}
    assert differs == known and 0 < len(known) < len(TEXTS) / 2
