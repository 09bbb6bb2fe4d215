"""What the report calls a model's perplexity is what llama.cpp finds for the exported file, on the same tokens."""

import dataclasses
import json

import numpy as np
import pytest

from gptjax.checkpoint import reading
from gptjax.compress import measure, saving
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.eval import heldout, perplexity
from gptjax.interop import certificate, checkpoint, llama2c, perplexities
from gptjax.interop.gguf import write as gguf_write
from gptjax.interop.runner import GptjaxRunner
from gptjax.nn import transformer
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat
from tests.tiny import TINY, random_params

LEFT = KernelRule(pattern="mlp/down")  # its rows are no blocks
FORMATS = {"q8_0": WeightFormat(dtype="int8"), "q4_0": WeightFormat(dtype="int4", group_size=32)}


@pytest.fixture(scope="module")
def stories(shared_data, tmp_path_factory):
    """The imported story teller, and text of its kind."""
    folder = tmp_path_factory.mktemp("stories")
    checkpoint.write(llama2c.open_source(shared_data / "models" / "stories260K" / "stories260K.bin"), folder / "ckpt")
    found = json.loads((shared_data / "text" / "tinystories" / "tinystories_1000.json").read_text())
    (folder / "text.txt").write_text("\n".join(found[:24]))
    return folder / "ckpt", str(folder / "text.txt")


@pytest.mark.parametrize("name", ["original", *FORMATS])
def test_llama_cpp_finds_the_perplexity_that_the_report_says(stories, tmp_path, name):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    from gptjax.interop.referees.llama_cpp import LlamaCppRunner

    path, text = stories
    original = GptjaxRunner.load(path)
    ours = original
    if name != "original":
        meta, params = reading.restore_params(path)
        rules = QuantConfig(rules=(LEFT, KernelRule(pattern="^group_.*kernel", weights=FORMATS[name])))
        model = dataclasses.replace(meta.model, quant=rules)
        stored = transformer.store(model, params)
        saving.write(tmp_path / "few", model, stored, entry={"stage": "q"}, source=meta, tokenizer=original.tokenizer)
        path, ours = tmp_path / "few", GptjaxRunner.load(tmp_path / "few")
    gguf_write.write(path, tmp_path / "model.gguf", quantization="f32")
    peer = LlamaCppRunner(tmp_path / "model.gguf", tokenizer=ours.tokenizer)
    rows = heldout.read(text, ours.tokenizer, seq_len=256, num_tokens=2048)
    reference = measure.reference(original.model, original.params, rows.batches, num_bytes=rows.num_bytes)
    reported = measure.quality(reference, ours.model, ours.params)
    found = perplexity.evaluate_logits(peer.logits, rows.batches)
    assert found.tokens == rows.num_targets >= 1800
    ratio = perplexity.perplexity(found.nats, found.tokens) / reported.perplexity
    assert abs(ratio - 1) < (1e-4 if name == "original" else 0.01)
    peer.close()


def test_logits_of_any_implementation_give_the_same_sums(tmp_path):
    model = dataclasses.replace(TINY, vocab_size=260).build()
    params = random_params(model)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 9)
    rows = heldout.read(str(tmp_path / "text.txt"), tokenizer_lib.byte_level(), seq_len=32, num_tokens=128)
    ours = GptjaxRunner(model, params, tokenizer_lib.byte_level())
    found = perplexity.evaluate_logits(ours.logits, rows.batches)
    wanted = perplexity.evaluate(model, params, rows.batches)
    assert found.tokens == wanted.tokens == rows.num_targets and found.correct == wanted.correct
    assert found.nats == pytest.approx(wanted.nats, rel=1e-5)


def test_a_peer_that_computes_something_else_is_rejected(tmp_path):
    model = dataclasses.replace(TINY, vocab_size=260).build()
    ours = GptjaxRunner(model, random_params(model), tokenizer_lib.byte_level())
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 9)

    class Peer:
        name = "another"

        def __init__(self, factor):
            self.factor = factor

        def logits(self, tokens):
            return np.pad(self.factor * ours.logits(tokens), ((0, 0), (0, 4)))  # some have a larger vocabulary

    found = certificate.Certificate(
        accepted=True, kind="", source={}, target={}, num_params=1, dtype="", referees={},
        tolerance=certificate.TOLERANCES["float32"],
    )  # fmt: skip
    text = str(tmp_path / "text.txt")
    same = perplexities.judge(found, text, ours, Peer(1.0), written=ours)
    assert same.accepted and same.perplexities.peer == pytest.approx(same.perplexities.checkpoint, rel=1e-5)
    other = perplexities.judge(found, text, ours, Peer(0.5), written=ours)
    assert not other.accepted and "by another" in other.problems[0] and "expected within 1%" in other.problems[0]
    without = GptjaxRunner(model, ours.params, None)
    with pytest.raises(ValueError, match="has no tokenizer to read text with"):
        perplexities.judge(found, text, without, Peer(1.0), written=without)
