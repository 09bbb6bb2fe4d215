from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from gptjax.optim import muon
from gptjax.optim.groups import MatrixLayout
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh

PLAIN = MatrixLayout(0, 1)


def updates(layout, grads, **settings):
    """The last update of a run over `grads`, one array a step."""
    tx = muon.scale_by_muon({"w": layout}, **settings)
    state = jax.eval_shape(tx.init, {"w": grads[0]})
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    step = jax.jit(lambda grads, state: tx.update(grads, state, keep=True))
    for grad in grads:
        update, state = step({"w": grad}, state)
    return update["w"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def steps(*shape):
    return [normal(*shape, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_stack_of_layers_and_experts_is_as_many_muons(nesterov):
    grads = steps(2, 3, 8, 12)
    stacked = updates(MatrixLayout(2, 1), grads, nesterov=nesterov)
    for layer in range(2):
        for expert in range(3):
            single = updates(PLAIN, [grad[layer, expert] for grad in grads], nesterov=nesterov)
            np.testing.assert_allclose(stacked[layer, expert], single, atol=2e-6)


def test_scaling_one_layer_of_a_stack_changes_no_other():
    grads = normal(2, 8, 8)
    scaled = grads * np.array([100.0, 1.0], np.float32)[:, None, None]
    np.testing.assert_allclose(updates(MatrixLayout(1, 1), [grads]), updates(MatrixLayout(1, 1), [scaled]), atol=1e-4)


@pytest.mark.parametrize(("shape", "num_inputs"), [((16, 4, 6), 1), ((4, 6, 16), 2)])
def test_heads_and_head_dim_are_one_side(shape, num_inputs):
    grads = steps(*shape)
    rows = 16 if num_inputs == 1 else 24
    flat = updates(PLAIN, [grad.reshape(rows, -1) for grad in grads])
    np.testing.assert_allclose(updates(MatrixLayout(0, num_inputs), grads), flat.reshape(shape), atol=2e-6)


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16)])
def test_updates_are_close_to_orthogonal(shape):
    singular = np.linalg.svd(np.asarray(jax.jit(muon.orthogonalize)(normal(1, *shape)))[0], compute_uv=False)
    # A random square matrix has a few singular values near 0, which five iterations do not lift to 1.
    assert np.all(singular < 1.3)
    assert np.mean(singular > 0.6) > 0.9


def test_keeps_the_singular_vectors():
    g = normal(12, 20)
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    ours = np.asarray(jax.jit(muon.orthogonalize)(g[None]))[0]
    cosine = np.sum(ours * (u @ vt)) / (np.linalg.norm(ours) * np.sqrt(12))
    assert cosine > 0.95


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_equals_optax_on_a_plain_matrix(shape):
    grads = steps(*shape)
    theirs = optax.contrib.muon(learning_rate=1.0, nesterov=False, consistent_rms=0.2)
    params = {"w": normal(*shape, seed=9)}
    state = theirs.init(params)
    step = jax.jit(theirs.update)
    for grad in grads:
        expected, state = step({"w": grad}, state, params)
    np.testing.assert_allclose(-updates(PLAIN, grads, nesterov=False), expected["w"], atol=5e-6)


def test_spectral_scale_equals_optax_first_nesterov_step():
    grads = [normal(12, 20)]
    theirs = optax.contrib.muon(learning_rate=1.0)
    params = {"w": normal(12, 20, seed=9)}
    expected, _ = jax.jit(theirs.update)({"w": grads[0]}, theirs.init(params), params)
    np.testing.assert_allclose(-updates(PLAIN, grads, scale="spectral"), expected["w"], atol=5e-6)


def test_nesterov_step_by_hand():
    first, second = (np.asarray(g, np.float64) for g in steps(4, 6)[:2])
    mu = 0.95 * (0.05 * first) + 0.05 * second
    x = 0.95 * mu + 0.05 * second
    x /= np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    np.testing.assert_allclose(updates(PLAIN, steps(4, 6)[:2]), 0.2 * np.sqrt(6) * x, atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (16, 128), (128, 16)])
def test_match_rms_has_the_rms_of_an_adam_update(shape):
    update = np.asarray(updates(PLAIN, [normal(*shape)]))
    assert 0.14 < np.sqrt(np.mean(update**2)) < 0.24


def test_zero_gradients_give_zero_updates():
    assert not np.any(updates(MatrixLayout(1, 1), [np.zeros((2, 8, 8), np.float32)]))


def test_bfloat16_products_are_near_enough():
    x = normal(3, 16, 32) / 20.0
    np.testing.assert_allclose(jax.jit(muon._newton_schulz_bf16)(x), jax.jit(muon._newton_schulz)(x), atol=0.05)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_iterating_on_the_gram_matrix_is_the_same(rank):
    x = normal(12, rank) @ normal(rank, 40, seed=1) + 1e-4 * normal(12, 40, seed=2)
    x /= np.linalg.norm(x)
    plain, gram = jax.jit(muon._newton_schulz)(x), jax.jit(muon._newton_schulz_gram)(x)
    np.testing.assert_allclose(gram, plain, atol=1e-3 * np.max(np.abs(plain)))


def test_experts_on_other_devices_are_not_gathered():
    layout = MatrixLayout(2, 1)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, expert=8, context=1, tensor=1))
    place = rules.sharding(mesh, ("layers", "experts", "embed", "mlp"), (2, 8, 16, 24))

    def on_accelerators(x):
        return muon._newton_schulz_bf16(muon.as_matrices(x, layout)).reshape(x.shape)

    x = jax.ShapeDtypeStruct((2, 8, 16, 24), np.float32, sharding=place)
    assert "all-gather" not in jax.jit(on_accelerators, out_shardings=place).lower(x).compile().as_text()


def test_momentum_is_like_the_parameters():
    params = {"w": normal(2, 8, 4, 2)}
    state = muon.scale_by_muon({"w": MatrixLayout(1, 1)}).init(params)
    assert state.mu["w"].shape == (2, 8, 4, 2)
