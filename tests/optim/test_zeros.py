"""Zeros that stay zeros, whatever the optimizer does, and weights removed on the way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.optim import groups, sparsity
from gptjax.optim.build import OptimConfig, build
from gptjax.optim.zeros import GradualConfig
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh

BASE = dict(
    name="adamw", learning_rate=0.01, schedule="constant", warmup_steps=0, final_lr_scale=0.0,
    weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.95,
)  # fmt: skip
QUERY = "group_0/block_0/attention/query/kernel"
EXPERTS = "group_0/block_0/moe/experts_up/kernel"
PRUNED = {QUERY, "group_0/block_0/attention/out/kernel", EXPERTS}


def flat(tree):
    return {groups.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def train(model, params, num_steps, *, bad=(), **changes):
    tx = build(OptimConfig(**(BASE | changes)), params, model.axes, num_steps=num_steps, balance_rate=1e-3).tx
    step = jax.jit(tx.update)
    state, history = jax.jit(tx.init)(params), []
    for index in range(num_steps):
        grads = jax.tree.map(lambda g, p, i=index: g * (i + 1) + 0.1 * p, model.grads, params)
        if index in bad:
            grads = jax.tree.map(lambda g: g * jnp.nan, grads)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return params, state, history


def with_zeros(params, fraction=0.5):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda p: jnp.where(rng.random(p.shape) < fraction, 0.0, p), params)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_zeros_of_kernels_stay_and_everything_else_moves(model, name):
    before = with_zeros(model.params)
    after, _, _ = train(model, before, 4, name=name, zeros="kept")
    for path, leaf in flat(after).items():
        zero = np.asarray(flat(before)[path] == 0)
        if path in PRUNED:
            assert np.all(np.asarray(leaf)[zero] == 0), path
            assert np.mean(np.asarray(leaf)[~zero] != np.asarray(flat(before)[path])[~zero]) > 0.99, path
        elif not path.endswith("balance_bias"):
            assert np.mean(np.asarray(leaf)[zero] != 0) > 0.9, path


def test_the_weights_that_are_left_move_as_those_of_a_model_without_the_others(model):
    """Neither the clipping norm nor the moments see gradients of weights that are gone."""
    before = with_zeros(model.params)
    ours, _, _ = train(model, before, 3, zeros="kept")
    for path in PRUNED:  # the same gradients where weights are, none where they are not
        model.grads.update(
            _replaced(model.grads, path, jnp.where(flat(before)[path] == 0, 0.0, flat(model.grads)[path]))
        )
    theirs, _, _ = train(model, before, 3)
    for path, leaf in flat(ours).items():
        np.testing.assert_allclose(leaf, flat(theirs)[path], rtol=1e-6, atol=1e-7, err_msg=path)


def _replaced(tree, path, value):
    name, _, rest = path.partition("/")
    return {**tree, name: _replaced(tree[name], rest, value) if rest else value}


def test_the_average_has_the_same_zeros(model):
    before = with_zeros(model.params)
    _, state, _ = train(model, before, 3, zeros="kept", ema_decay=0.9)
    for path in PRUNED:
        assert np.array_equal(flat(state.average)[path] == 0, flat(before)[path] == 0)


@pytest.mark.parametrize("text", [0.75, "2:8"])
def test_weights_go_along_the_cubic_and_stay_away(model, text):
    cfg = GradualConfig(sparsity=text, first_step=2, last_step=10, every_steps=2)
    _, _, history = train(model, model.params, 14, prune=cfg)
    for path in PRUNED:
        leaves = [np.asarray(flat(params)[path]) for params in history]
        layers = [[leaf.reshape(-1, *leaf.shape[2 if path == EXPERTS else 1 :])[0] for leaf in leaves]]
        for own in layers:
            for step, leaf in enumerate(own):
                reached = min(max((step - step % 2 - 2) / 8, 0), 1)
                wanted = 0.75 * (1 - (1 - reached) ** 3)
                wanted = np.floor(wanted * 8 + 1e-4) / 8 if text == "2:8" else wanted
                assert np.mean(leaf == 0) == pytest.approx(wanted, abs=1.5 / leaf.size), (path, step)
        for earlier, later in zip(leaves, leaves[1:], strict=False):
            assert np.all(later[earlier == 0] == 0)


def test_n_of_every_m_inputs_are_left_in_the_end(model):
    cfg = GradualConfig(sparsity="2:4", first_step=0, last_step=4, every_steps=2)
    params, _, _ = train(model, model.params, 6, prune=cfg)
    rows = np.asarray(flat(params)[EXPERTS]).swapaxes(-1, -2)
    assert np.all((rows.reshape(-1, 4) != 0).sum(-1) == 2)
    rows = np.asarray(flat(params)["group_0/block_0/attention/out/kernel"]).reshape(2, 32, 16).swapaxes(-1, -2)
    assert np.all((rows.reshape(-1, 4) != 0).sum(-1) == 2)


def test_a_skipped_step_removes_nothing_and_is_made_up_for(model):
    cfg = GradualConfig(sparsity=0.5, first_step=0, last_step=4, every_steps=2)
    _, _, history = train(model, model.params, 8, prune=cfg, bad=(4,))
    assert all(np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(history[i]) for i in (3, 4)), strict=True))
    assert np.mean(np.asarray(flat(history[4])[QUERY]) == 0) < 0.5
    assert np.mean(np.asarray(flat(history[6])[QUERY]) == 0) == 0.5


def test_eight_devices_prune_as_one_does(model):
    cfg = GradualConfig(sparsity=0.5, first_step=0, last_step=2, every_steps=1)
    alone, _, _ = train(model, model.params, 4, prune=cfg)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, context=1, tensor=2, rules="standard"))
    with jax.set_mesh(mesh):
        places = rules.tree_shardings(mesh, model.axes, model.params)
        params, grads = (jax.tree.map(jax.device_put, tree, places) for tree in (model.params, model.grads))
        spread, _, _ = train(model._replace(grads=grads), params, 4, prune=cfg)
    for path, leaf in flat(spread).items():
        np.testing.assert_allclose(leaf, flat(alone)[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sparsity=1.0, first_step=0, last_step=4), "sparsity=1.0"),
        (dict(sparsity="2:4", first_step=4, last_step=4), "first_step=4, last_step=4"),
        (dict(sparsity="2:4", first_step=0, last_step=4, every_steps=0), "every_steps=0"),
    ],
)
def test_schedules_that_are_none_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GradualConfig(**changes)


def test_what_does_not_fit_the_run_is_refused(model):
    cfg = GradualConfig(sparsity=0.5, first_step=0, last_step=9)
    with pytest.raises(ValueError, match="last_step=9: expected below num_steps=5"):
        train(model, model.params, 5, prune=cfg)
    with pytest.raises(ValueError, match="ema_decay=0.9"):
        OptimConfig(**BASE, prune=cfg, ema_decay=0.9)
    with pytest.raises(ValueError, match="32 inputs are not a multiple of 5"):
        train(model, model.params, 10, prune=GradualConfig(sparsity="2:5", first_step=0, last_step=3))


def test_of_equal_scores_the_first_go_and_their_number_is_exact():
    score = jnp.asarray([[1.0, 0.0, 1.0, 1.0, 1.0, 2.0]])
    for num in range(6):
        stay = np.asarray(sparsity.keep_highest(score, num))[0]
        assert (~stay).sum() == num
    assert np.asarray(sparsity.keep_highest(score, 3))[0].tolist() == [False, False, False, True, True, True]
