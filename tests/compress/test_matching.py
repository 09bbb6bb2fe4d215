"""Attention by relations, against the formula in numpy, for models whose heads have nothing in common."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import matching
from gptjax.compress.distill import DistillConfig, Layers, compared_layers
from gptjax.kernels import cross_entropy
from gptjax.nn import transformer
from gptjax.parallel import mesh as mesh_lib
from gptjax.parallel import rules
from tests.compress.test_distill import BATCH, LEARNING, LENGTH, ROWS, STUDENT, close, log_softmax, run
from tests.nn import zoo
from tests.tiny import TINY, random_params

TEACHER = dataclasses.replace(TINY, num_layers=3, d_model=24, num_heads=6, num_kv_heads=3, head_dim=4).build()
TEACHING = random_params(TEACHER, seed=1)
PAIRS = Layers(attention=((1, 2), (2, 3)))
CONFIG = DistillConfig(attention_weight=0.5)


def values_of(cfg, params):
    given = dict(positions_BT=BATCH.positions, segment_ids_BT=BATCH.segment_ids)
    return transformer.forward_with_layers(cfg, params, BATCH.tokens, **given)[1]


def relations(x, num_parts):
    """Log-probabilities `[B, A, T, T]` in float64, and what may be attended."""
    x = np.float64(x).reshape(ROWS, LENGTH, num_parts, -1)
    scores = np.einsum("btad,bsad->bats", x, x) / math.sqrt(x.shape[-1])
    segments = np.asarray(BATCH.segment_ids)
    seen = np.tril(segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
    return log_softmax(np.where(seen[:, None], scores, -1e30)), seen[:, None]


def test_what_is_compared_is_what_was_attended_with():
    x = transformer.residuals(STUDENT, LEARNING, BATCH.tokens)[0]
    values = transformer.forward_with_layers(STUDENT, LEARNING, BATCH.tokens)[1][0]
    weights = jax.tree.map(lambda leaf: np.float64(leaf[0]), LEARNING["group_0"]["block_0"])
    normed = np.float64(x) / np.sqrt((np.float64(x) ** 2).mean(-1, keepdims=True) + STUDENT.blocks[0].norm.eps)
    normed = normed * weights["attention_norm"]["scale"]
    for name, found in (("query", values.queries), ("key", values.keys), ("value", values.values)):
        made = np.einsum("btd,dnh->btnh", normed, weights["attention"][name]["kernel"])
        if name == "value":
            np.testing.assert_allclose(found, made, atol=1e-4)
        # Rotated, so only the norms are those of the product.
        np.testing.assert_allclose((np.float64(found) ** 2).sum(-1), (made**2).sum(-1), rtol=1e-4)


def test_the_loss_is_the_mean_divergence_of_the_three_relations():
    mine, theirs = values_of(STUDENT, LEARNING), values_of(TEACHER, TEACHING)
    assert matching.num_relations(mine[0], theirs[0]) == 4  # 6 heads, but sizes of 16, 32, 12 and 24
    expected = 0.0
    for s, t in PAIRS.attention:
        for name in ("queries", "keys", "values"):
            log_p, seen = relations(getattr(theirs[t - 1], name), 4)
            log_q, _ = relations(getattr(mine[s - 1], name), 4)
            kl = np.where(seen, np.exp(log_p) * (log_p - log_q), 0.0).sum(-1).mean(1)
            expected += (BATCH.loss_mask * kl).sum() / 6
    kwargs = dict(frozen=TEACHING, teacher=TEACHER)
    loss, grads = run(CONFIG, layers=PAIRS, **kwargs)
    plain, _ = run(dataclasses.replace(CONFIG, attention_weight=0.0), **kwargs)
    np.testing.assert_allclose(loss.metrics["attention_loss"].total, expected, rtol=1e-4)
    np.testing.assert_allclose(loss.total, plain.total + 0.5 * expected, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    same, _ = run(CONFIG, frozen=LEARNING, teacher=STUDENT, layers=PAIRS._replace(attention=((2, 2),)))
    assert abs(same.metrics["attention_loss"].total) < 1e-4


def test_gradients_are_those_of_finite_differences():
    theirs = values_of(TEACHER, TEACHING)

    def total(values):
        mine = values_of(STUDENT, LEARNING)
        return matching.attention_loss(((1, 2),), [mine[0]._replace(values=values), mine[1]], theirs, BATCH)

    at = jnp.asarray(values_of(STUDENT, LEARNING)[0].values)
    direction = np.random.default_rng(0).normal(size=at.shape).astype(np.float32)
    slope = jax.jit(jax.grad(total))(at)
    step = 1e-2
    measured = (total(at + step * direction) - total(at - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(slope * direction), measured, rtol=1e-2)


def test_chunks_and_devices_change_nothing_and_no_whole_relations_are_in_the_program(monkeypatch):
    kwargs = dict(teacher=TEACHER, layers=PAIRS)
    whole, grads = run(CONFIG, frozen=TEACHING, **kwargs)
    with mesh_lib.use(mesh_lib.MeshConfig(data=2, fsdp=2, expert=1, context=1, tensor=2)) as mesh:
        student, teacher = (
            jax.device_put(params, rules.tree_shardings(mesh, transformer.param_axes(cfg), params))
            for cfg, params in ((STUDENT, LEARNING), (TEACHER, TEACHING))
        )
        batch = jax.device_put(BATCH, rules.batch_sharding(mesh))
        sharded, sharded_grads = run(CONFIG, params=student, frozen=teacher, batch=batch, **kwargs)
    np.testing.assert_allclose(sharded.total, whole.total, rtol=1e-5)
    close(sharded_grads, grads, atol=5e-5)
    monkeypatch.setattr(cross_entropy, "pick_num_chunks", lambda **_: 4)
    parts, parts_grads = run(CONFIG, frozen=TEACHING, **kwargs)
    np.testing.assert_allclose(parts.total, whole.total, rtol=1e-6)
    close(parts_grads, grads, atol=5e-5)
    mine, theirs = values_of(STUDENT, LEARNING), values_of(TEACHER, TEACHING)

    def total(mine, theirs):
        return matching.attention_loss(PAIRS.attention, mine, theirs, BATCH)

    text = jax.jit(jax.grad(total)).lower(mine, theirs).as_text()
    assert f"{ROWS}x4x{LENGTH // 4}x{LENGTH}xf32" in text
    assert f"{ROWS}x4x{LENGTH}x{LENGTH}xf32" not in text and f"4x{ROWS}x4x{LENGTH // 4}x{LENGTH}xf32" not in text


@pytest.mark.parametrize("name", ["mla", "sandwich"])
def test_every_kind_of_attention_teaches_every_other(name):
    teacher = zoo.build(name)
    params = random_params(teacher, seed=3)
    layers = compared_layers(STUDENT, teacher, CONFIG)
    assert layers == Layers(attention=((2, teacher.num_layers),))
    loss, grads = run(CONFIG, frozen=params, teacher=teacher, layers=layers)
    assert loss.metrics["attention_loss"].value > 0 and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_layers_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match=r"attention_layers: \(1, 4\): expected a layer of the student, 1 to 2"):
        compared_layers(STUDENT, TEACHER, DistillConfig(attention_weight=0.1, attention_layers=((1, 4),)))
    with pytest.raises(ValueError, match="attention_layers are given, but attention_weight=0"):
        DistillConfig(attention_layers=((1, 1),))
