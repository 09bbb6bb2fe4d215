"""The objective: what it adds up, that it adds up the same in parts, and which models may meet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import distill, matching
from gptjax.compress.distill import DistillConfig, Layers
from gptjax.kernels import cross_entropy
from gptjax.nn import transformer
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat
from gptjax.parallel import mesh as mesh_lib
from gptjax.parallel import rules
from gptjax.train import objective as objectives
from gptjax.types import Batch
from tests.nn import zoo
from tests.tiny import TINY, random_params

TEACHER = dataclasses.replace(TINY, num_layers=3, d_model=24, d_ff=40).build()
STUDENT = TINY.build()
ROWS, LENGTH = 8, 16


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, TINY.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    segments = np.where(np.arange(LENGTH) < 10, 1, 2) * np.where(np.arange(ROWS)[:, None] == 3, 0, 1)
    positions = np.broadcast_to(
        np.where(np.arange(LENGTH) < 10, np.arange(LENGTH), np.arange(LENGTH) - 10), segments.shape
    )
    mask = (rng.random((ROWS, LENGTH)) < 0.7) * (segments > 0)
    return Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], loss_mask=mask.astype(np.float32),
        segment_ids=segments.astype(np.int32), positions=positions.astype(np.int32),
    )  # fmt: skip


BATCH = make_batch()
TEACHING = random_params(TEACHER, seed=1)
LEARNING = random_params(STUDENT, seed=2)


def run(config, *, params=LEARNING, frozen=TEACHING, batch=BATCH, student=STUDENT, teacher=TEACHER, **rest):
    objective = distill.objective(student, teacher, config, **rest)

    def total(params):
        loss = objective(params, frozen, batch, None, None)
        return loss.total, loss

    (_, loss), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return loss, grads


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def log_softmax(x):
    x = np.float64(x) - np.max(x, -1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logits_of(cfg, params):
    output = transformer.forward(
        cfg, params, BATCH.tokens, positions_BT=BATCH.positions, segment_ids_BT=BATCH.segment_ids
    )
    return transformer.logits(cfg, params, output.hidden_BTD)


def test_the_loss_is_the_weighted_sum_of_both():
    loss, _ = run(DistillConfig(weight=0.3, temperature=2.0), z_loss=0.01)
    teacher, student = logits_of(TEACHER, TEACHING), logits_of(STUDENT, LEARNING)
    log_p, log_q = log_softmax(teacher / 2), log_softmax(student / 2)
    kl = 4 * (np.exp(log_p) * (log_p - log_q)).sum(-1)
    nll = -np.take_along_axis(log_softmax(student), BATCH.targets[..., None], -1)[..., 0]
    log_z = np.log(np.exp(np.float64(student)).sum(-1))
    mask = BATCH.loss_mask
    expected = (mask * (0.7 * (nll + 0.01 * log_z**2) + 0.3 * kl)).sum()
    np.testing.assert_allclose(loss.total, expected, rtol=1e-5)
    np.testing.assert_allclose(loss.weight, mask.sum())
    np.testing.assert_allclose(loss.metrics["distill_loss"].value, (mask * kl).sum() / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["loss"].value, (mask * nll).sum() / mask.sum(), rtol=1e-5)


def test_weight_0_is_the_data_alone_and_a_student_that_is_its_teacher_learns_nothing():
    objective = objectives.next_token(STUDENT)
    expected = jax.jit(jax.grad(lambda p: objective(p, (), BATCH, None, None).total))(LEARNING)
    close(run(DistillConfig(weight=0.0))[1], expected, atol=1e-6)
    for loss in ("forward_kl", "reverse_kl"):
        for top_k in (0, 5):
            config = DistillConfig(weight=1.0, loss=loss, top_k=top_k)
            same, grads = run(config, frozen=LEARNING, teacher=STUDENT)
            # Not quite zero, as the compiler may order the sums of the two models differently.
            assert same.total == same.metrics["distill_loss"].total and abs(same.total) < 1e-4
            close(grads, jax.tree.map(jnp.zeros_like, grads), atol=2e-4)


@pytest.mark.parametrize("top_k", [0, 5])
def test_chunks_and_devices_change_nothing(top_k, monkeypatch):
    config = DistillConfig(weight=0.5, top_k=top_k, temperature=1.5, loss="jsd")
    whole, grads = run(config)
    monkeypatch.setattr(cross_entropy, "pick_num_chunks", lambda **_: 4)
    parts, parts_grads = run(config)
    np.testing.assert_allclose(parts.total, whole.total, rtol=1e-6)
    close(parts_grads, grads, atol=2e-5)
    with mesh_lib.use(mesh_lib.MeshConfig(data=2, fsdp=2, expert=1, context=1, tensor=2)) as mesh:
        student, teacher = (
            jax.device_put(params, rules.tree_shardings(mesh, transformer.param_axes(cfg), params))
            for cfg, params in ((STUDENT, LEARNING), (TEACHER, TEACHING))
        )
        batch = jax.device_put(BATCH, rules.batch_sharding(mesh))
        sharded, sharded_grads = run(config, params=student, frozen=teacher, batch=batch)
    np.testing.assert_allclose(sharded.total, whole.total, rtol=1e-5)
    close(sharded_grads, grads, atol=2e-5)


def test_no_logits_of_the_whole_sequence_are_in_the_program(monkeypatch):
    monkeypatch.setattr(cross_entropy, "pick_num_chunks", lambda **_: 4)
    objective = distill.objective(STUDENT, TEACHER, DistillConfig())

    def total(params, frozen):
        return objective(params, frozen, BATCH, None, None).total

    text = jax.jit(jax.grad(total)).lower(LEARNING, TEACHING).as_text()
    assert f"{ROWS}x{LENGTH // 4}x{TINY.vocab_size}xf32" in text
    assert f"{ROWS}x{LENGTH}x{TINY.vocab_size}xf32" not in text


def test_top_k_that_was_kept_is_as_good_as_the_teacher():
    config = DistillConfig(top_k=6, temperature=2.0)
    online, grads = run(config)
    kept = jax.jit(distill.top_k_fn(config, TEACHER, vocab_size=TINY.vocab_size))(TEACHING, BATCH)
    offline, offline_grads = run(config, frozen=(), batch=dataclasses.replace(BATCH, notes=kept))
    np.testing.assert_allclose(offline.total, online.total, rtol=1e-6)
    close(offline_grads, grads, atol=2e-5)


def test_residuals_are_those_of_the_layers_one_by_one():
    for name in ("dense", *[n for n in zoo.ZOO if "shared" in n or "moe" in n or "mixed" in n][:2]):
        cfg = zoo.build(name) if name in zoo.ZOO else STUDENT
        params = random_params(cfg)
        tokens = BATCH.tokens % cfg.vocab_size
        output, found = jax.jit(transformer.forward_with_layers, static_argnums=0)(cfg, params, tokens)
        expected = transformer.residuals(cfg, params, tokens)[1:]
        assert len(found) == cfg.num_layers
        close([values.x_BTD for values in found], expected, atol=2e-4)
        np.testing.assert_array_equal(
            output.hidden_BTD, jax.jit(transformer.forward, static_argnums=0)(cfg, params, tokens).hidden_BTD
        )


def test_hidden_states_are_compared_through_projections():
    layers = matching.layer_map(STUDENT, TEACHER, key="hidden_layers")
    assert layers == ((1, 2), (2, 3))
    companions = matching.projections(STUDENT, TEACHER, layers)
    projections = companions.init_fn(jax.random.key(0))
    assert jax.tree.map(jnp.shape, projections) == jax.tree.map(jnp.shape, companions.shapes)
    config = DistillConfig(hidden_weight=0.5)
    loss, grads = run(config, params={**LEARNING, **projections}, layers=Layers(hidden=layers))
    plain, _ = run(dataclasses.replace(config, hidden_weight=0.0))
    given = dict(positions_BT=BATCH.positions, segment_ids_BT=BATCH.segment_ids)
    mine, theirs = (
        transformer.forward_with_layers(cfg, params, BATCH.tokens, **given)[1]
        for cfg, params in ((STUDENT, LEARNING), (TEACHER, TEACHING))
    )
    expected = 0.0
    for s, t in layers:
        error = np.float64(mine[s - 1].x_BTD) @ projections[matching.NAME][f"layer_{s}"] - theirs[t - 1].x_BTD
        expected += (BATCH.loss_mask * (error**2).sum(-1) / (np.float64(theirs[t - 1].x_BTD) ** 2).sum(-1)).sum() / 2
    np.testing.assert_allclose(loss.metrics["hidden_loss"].total, expected, rtol=1e-4)
    np.testing.assert_allclose(loss.total, plain.total + 0.5 * expected, rtol=1e-5)
    assert all(np.abs(g).max() > 0 for g in grads[matching.NAME].values())
    same, _ = run(config, frozen=LEARNING, teacher=STUDENT, layers=Layers(hidden=((1, 1), (2, 2))))
    assert same.metrics["hidden_loss"].total < 1e-9
    assert not matching.projections(STUDENT, STUDENT, layers).shapes


def test_a_student_in_few_bits_learns_through_the_same_seam():
    rule = KernelRule(pattern="group_", weights=WeightFormat(dtype="int4", group_size=8))
    student = dataclasses.replace(STUDENT, quant=QuantConfig(rules=(rule,), stage="train"))
    loss, grads = run(DistillConfig(), student=student)
    assert np.isfinite(loss.total) and loss.total != run(DistillConfig())[0].total
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_a_teacher_in_few_bits_teaches():
    rule = KernelRule(pattern="group_", weights=WeightFormat(dtype="int8"))
    teacher = dataclasses.replace(TEACHER, quant=QuantConfig(rules=(rule,)))
    loss, _ = run(DistillConfig(), frozen=transformer.store(teacher, TEACHING), teacher=teacher)
    np.testing.assert_allclose(loss.total, run(DistillConfig())[0].total, rtol=0.02)


def test_contradictions_in_the_config_are_refused():
    for changes, message in (
        (dict(weight=1.5), "weight=1.5: expected 0 to 1"),
        (dict(temperature=-1.0), "temperature=-1.0: expected above 0"),
        (dict(top_k=-1), "top_k=-1: expected at least 0"),
        (dict(cache="gs://x", top_k=3), "cache=gs://x: expected a local directory"),
        (dict(cache="x"), "cache=x: whole vocabularies are not cached"),
        (dict(beta=0.25), "beta=0.25: loss='forward_kl' does not read it; set loss='jsd'"),
        (dict(cache="x", top_k=3, hidden_weight=1.0), "hidden states are not cached"),
        (dict(hidden_layers=((1, 1),)), "hidden_layers are given, but hidden_weight=0"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillConfig(**changes)
    for layers, message in (
        (((3, 1),), "expected a layer of the student, 1 to 2"),
        (((1, 1), (1, 2)), "expected each layer of the student once"),
    ):
        with pytest.raises(ValueError, match=message):
            matching.layer_map(STUDENT, TEACHER, layers, key="hidden_layers")
