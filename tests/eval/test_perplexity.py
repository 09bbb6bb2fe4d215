"""Evaluation sums against forward passes by hand, over windows, packing and meshes."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from gptjax.data import loader, source, tokenizer, writer
from gptjax.eval import perplexity
from gptjax.nn import transformer
from gptjax.nn.spec import ModelSpec
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.types import Batch

SPEC = ModelSpec(
    vocab_size=260, seq_len=32, d_model=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32,
    activation="swiglu", position="rope", rope_theta=100.0, tie_embeddings=True, dtype="float32", remat="none",
)  # fmt: skip
TEXTS = ["short", "a document of more than one window, with some é and 日本語 in it", "x" * 90, "", "end"]


@pytest.fixture(scope="module")
def model():
    cfg = SPEC.build()
    rng = np.random.default_rng(0)
    shapes = transformer.abstract_params(cfg)
    return cfg, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.4).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    documents = [source.Document(str(i), text) for i, text in enumerate(TEXTS) if text]
    return writer.write_store(
        tmp_path_factory.mktemp("store") / "eval", documents, tokenizer.byte_level(), description="test"
    )


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, params, tokens_BT):
    return transformer.logits(cfg, params, transformer.forward(cfg, params, tokens_BT).hidden_BTD)


def by_hand(cfg, params, store):
    """Nats, targets and hits of every document in one forward pass each."""
    nats = tokens = correct = 0.0
    for index in range(store.num_documents):
        ids = np.asarray(store.document(index), np.int32)
        padded = np.pad(ids[:-1], (0, 128 - len(ids) + 1))[None]
        logits = np.asarray(forward(cfg, params, padded)[0, : len(ids) - 1], np.float64)
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nats += float((log_z - logits[np.arange(len(ids) - 1), ids[1:]]).sum())
        correct += float((logits.argmax(-1) == ids[1:]).sum())
        tokens += len(ids) - 1
    return nats, tokens, correct


def test_packed_documents_equal_each_document_forward_by_hand(model, store):
    cfg, params = model
    batches = loader.eval_batches(store, batch_size=2, seq_len=128)
    got = perplexity.evaluate(cfg, params, batches)
    nats, tokens, correct = by_hand(cfg, params, store)
    assert got.tokens == tokens == batches.num_targets
    assert got.correct == correct
    assert got.nats == pytest.approx(nats, rel=1e-6)
    assert got.loss == pytest.approx(nats / tokens)
    assert perplexity.bits_per_byte(got.nats, batches.num_bytes) == pytest.approx(
        nats / math.log(2) / len("".join(TEXTS).encode())
    )


@pytest.mark.parametrize("batch_size,stride", [(1, 32), (3, 16), (8, 5)])
def test_sliding_windows_count_every_target_once(model, store, batch_size, stride):
    got = perplexity.evaluate(*model, loader.eval_batches(store, batch_size=batch_size, seq_len=32, stride=stride))
    assert got.tokens == store.num_tokens - store.num_documents


def test_batch_size_and_last_partial_batch_do_not_matter(model, store):
    one, other = (
        perplexity.evaluate(*model, loader.eval_batches(store, batch_size=size, seq_len=32)) for size in (1, 5)
    )
    assert one.nats == pytest.approx(other.nats, rel=1e-6) and one[1:] == other[1:]


def test_chunked_logits_equal_whole_ones(model, store, monkeypatch):
    cfg, params = model
    (batch, *_) = loader.eval_batches(store, batch_size=2, seq_len=32)
    whole = perplexity.token_nll(cfg, params, batch)
    monkeypatch.setattr(perplexity.cross_entropy, "pick_num_chunks", lambda **_: 8)
    chunked = jax.jit(perplexity.token_nll.__wrapped__, static_argnums=0)
    for a, b in zip(whole, chunked(cfg, params, batch), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", [{"data": 4, "tensor": 2}, {"fsdp": 2, "context": 4}])
def test_sharded_equals_single_device(model, store, mesh):
    want = perplexity.evaluate(*model, loader.eval_batches(store, batch_size=8, seq_len=32))
    sizes = dict.fromkeys(("data", "fsdp", "expert", "context", "tensor"), 1) | mesh
    with jax.set_mesh(make_mesh(MeshConfig(**sizes, rules="standard"))):
        got = perplexity.evaluate(*model, loader.eval_batches(store, batch_size=8, seq_len=32))
    assert got.nats == pytest.approx(want.nats, rel=1e-6) and got[1:] == want[1:]


def test_masked_targets_do_not_count(model):
    cfg, params = model
    tokens = np.array([[1, 2, 3, 4]], np.int32)
    batch = Batch(
        tokens=tokens, targets=tokens + 1, loss_mask=np.array([[1, 0, 1, 0]], np.float32),
        segment_ids=np.ones_like(tokens), positions=np.arange(4, dtype=np.int32)[None],
    )  # fmt: skip
    nll, _ = perplexity.token_nll(cfg, params, batch)
    got = perplexity.evaluate(cfg, params, [batch, batch])
    assert got.tokens == 4 and got.nats == pytest.approx(2 * float(nll[0, 0] + nll[0, 2]), rel=1e-6)


def test_nothing_to_score_is_an_error(model):
    with pytest.raises(ValueError, match="at least one target"):
        perplexity.evaluate(*model, [])


def test_a_model_that_sees_its_targets_is_refused(model):
    cfg, params = model
    with pytest.raises(ValueError, match="causal=False"):
        perplexity.evaluate(dataclasses.replace(cfg, causal=False), params, [])


def test_formulas():
    assert perplexity.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert perplexity.perplexity(1e6, 1) == math.inf
    assert perplexity.bits_per_byte(80 * math.log(2), 10) == pytest.approx(8)
