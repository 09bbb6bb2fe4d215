"""SentencePiece models of others as `tokenizer.json`: with the same ids, or refused."""

import io
import logging
import pathlib

import pytest
import sentencepiece

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.interop import tokenizer_json, tokenizers
from tests.interop.test_tokenizers import auto, different

pytest.importorskip("tokenizers")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_foreign_sentencepiece_models_with_normalisation(model_type, shared_data, tmp_path):
    """NFKC, user-defined pieces, no byte fallback: what `tokenizer_json` lists aside, ids are the same."""
    text = (shared_data / "text" / "tinyshakespeare.txt").read_text().split("\n")[:4000]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type=model_type,
        vocab_size=600,
        user_defined_symbols=["<turn>", "ROMEO"],
        minloglevel=2,
    )
    ours = tokenizer_lib.from_bytes(model.getvalue())
    assert ours.has_dummy_prefix
    tokenizers.write(ours, tmp_path)
    texts = [*text, "ﬁ ① ｆｕｌｌ", "a<turn>ROMEO b", "  two  spaces  ", "天 unknown 天天", "a\u2581b"]
    assert not different(ours, auto(tmp_path), texts)
    assert tokenizers.read(tmp_path).fingerprint == ours.fingerprint


def test_a_sentencepiece_model_that_cannot_be_expressed_is_written_as_it_is(tmp_path, caplog):
    from sentencepiece import sentencepiece_model_pb2

    trained = tokenizer_lib.train_bpe([pathlib.Path(tokenizer_lib.__file__).read_text()], 400)
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained.serialized)
    proto.pieces[-1].type = proto.pieces[-1].UNUSED
    ours = tokenizer_lib.from_bytes(proto.SerializeToString())
    with caplog.at_level(logging.WARNING):
        tokenizers.write(ours, tmp_path)
    assert "only tokenizer.model is written: SentencePiece model: it has unused pieces" in caplog.text
    assert sorted(path.name for path in tokenizers.files_of(tmp_path)) == ["generation_config.json", "tokenizer.model"]
    assert tokenizers.read(tmp_path).fingerprint == ours.fingerprint


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("unigram", {"user_defined_symbols": ["ab", "bc"]}, "user-defined pieces of a unigram model can overlap"),
        ("bpe", {"user_defined_symbols": ["a  b"]}, "a user-defined piece has a space"),
        (
            "bpe",
            {"user_defined_symbols": ["ROMEO"], "normalization_rule_name": "nmt_nfkc_cf"},
            "user-defined pieces are kept from its normalisation",
        ),
    ],
)
def test_user_defined_pieces_that_would_get_other_ids_are_refused(model_type, options, message):
    model = io.BytesIO()
    corpus = pathlib.Path(tokenizer_lib.__file__).read_text().split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type=model_type,
        vocab_size=300,
        minloglevel=2,
        **options,
    )
    with pytest.raises(ValueError, match=message):
        tokenizer_json.of(tokenizer_lib.from_bytes(model.getvalue()))
