from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import config
from gptjax.optim import ema, groups, guard
from gptjax.optim.build import OptimConfig, build
from gptjax.optim.groups import GroupConfig
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh

BALANCE = "group_0/block_0/moe/balance_bias"
BASE = dict(
    name="adamw", learning_rate=0.01, schedule="constant", warmup_steps=0, final_lr_scale=0.0,
    weight_decay=0.0, clip_norm=None, b1=0.9, b2=0.95,
)  # fmt: skip


def optimizer(model, **changes):
    return build(OptimConfig(**(BASE | changes)), model.params, model.axes, num_steps=10, balance_rate=1e-3)


def flat(tree):
    return {groups.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def run(tx, model, num_steps=3, **extra):
    """Parameters and state after steps whose gradients all differ."""
    step = jax.jit(lambda grads, state, params: tx.update(grads, state, params, **extra))
    params, state = model.params, jax.jit(tx.init)(model.params)
    for index in range(num_steps):
        grads = jax.tree.map(lambda g, p, i=index: g * (i + 1) + 0.1 * p, model.grads, params)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def without_balance(tree):
    return {path: leaf for path, leaf in flat(tree).items() if path != BALANCE}


def assert_close(ours, theirs, **tolerance):
    theirs = without_balance(theirs)
    for path, leaf in without_balance(ours).items():
        np.testing.assert_allclose(leaf, theirs[path], err_msg=path, **tolerance)


def decayed(model):
    return jax.tree_util.tree_map_with_path(lambda path, _: groups.path_of(path).endswith("kernel"), model.params)


def test_adamw_equals_optax(model):
    theirs = optax.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.1, mask=decayed(model))
    ours, _ = run(optimizer(model, weight_decay=0.1).tx, model)
    assert_close(ours, run(theirs, model)[0], rtol=2e-6, atol=1e-7)


def test_adamw_by_hand(model):
    ours, _ = run(optimizer(model, weight_decay=0.1, schedule="linear").tx, model, num_steps=2)
    path = "head/kernel"
    p, g0 = (np.asarray(flat(tree)[path], np.float64) for tree in (model.params, model.grads))
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t in range(2):
        g = g0 * (t + 1) + 0.1 * p
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        m_hat, v_hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.95 ** (t + 1))
        p = p - 0.01 * (1 - t / 10) * (m_hat / (np.sqrt(v_hat) + 1e-8) + 0.1 * p)
    np.testing.assert_allclose(flat(ours)[path], p, rtol=1e-5, atol=1e-6)


def test_lion_equals_optax(model):
    theirs = optax.lion(0.01, b1=0.9, b2=0.95, weight_decay=0.1, mask=decayed(model))
    ours, _ = run(optimizer(model, name="lion", weight_decay=0.1).tx, model)
    assert_close(ours, run(theirs, model)[0], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_decay_takes_its_part_of_what_decays_at_the_rate(model, name):
    plain, _ = run(optimizer(model, name=name).tx, model, num_steps=1)
    shrunk, _ = run(optimizer(model, name=name, weight_decay=0.1).tx, model, num_steps=1)
    for path, before in without_balance(model.params).items():
        taken = 0.01 * 0.1 * before if path.endswith("kernel") else np.zeros_like(before)
        np.testing.assert_allclose(flat(plain)[path] - flat(shrunk)[path], taken, atol=1e-6, err_msg=path)


def test_adafactor_equals_optax_where_nothing_is_stacked(model):
    theirs = optax.adafactor(
        0.01, multiply_by_parameter_scale=False, momentum=0.9, clipping_threshold=1.0, decay_rate=0.8
    )
    ours, _ = run(optimizer(model, name="adafactor", b2=0.999).tx, model)
    for path in ("embed/tokens", "head/kernel", "final_norm/scale"):
        np.testing.assert_allclose(flat(ours)[path], flat(run(theirs, model)[0])[path], rtol=2e-5, atol=1e-6)


def test_muon_moves_matrices_and_adam_the_rest(model):
    muon, _ = run(optimizer(model, name="muon").tx, model)
    adam, _ = run(optimizer(model, name="adamw").tx, model)
    for path, leaf in without_balance(muon).items():
        same = np.array_equal(leaf, flat(adam)[path])
        assert same == (not path.endswith("kernel") or path.startswith("head")), path


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_updates_are_of_one_magnitude_whatever_the_optimizer(model, name):
    tx = optimizer(model, name=name, b1=0.0 if name == "adafactor" else 0.9).tx
    updates, _ = jax.jit(tx.update)(model.grads, tx.init(model.params), model.params)
    for path, leaf in without_balance(updates).items():
        assert 0.1 < np.sqrt(np.mean(np.square(leaf))) / 0.01 < 1.1, path


def test_clipping_scales_all_by_the_global_norm_of_what_is_clipped(model):
    model.grads["group_0"]["block_0"]["moe"]["balance_bias"] *= 1e6
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in without_balance(model.grads).values()))
    tx = optimizer(model, clip_norm=1.0).tx
    _, state = jax.jit(tx.update)(model.grads, tx.init(model.params), model.params)
    assert float(guard.stats(state).grad_norm) == pytest.approx(norm, rel=1e-5)
    # Adam's update hides a factor common to all steps; its first moment does not.
    mu = next(leaf for path, leaf in flat(state).items() if path.endswith("mu/head/kernel"))
    np.testing.assert_allclose(mu, 0.1 * flat(model.grads)["head/kernel"] / norm, rtol=1e-5)


def test_gradients_under_the_norm_are_not_scaled_up(model):
    tx = optimizer(model, clip_norm=1e6).tx
    _, state = jax.jit(tx.update)(model.grads, tx.init(model.params), model.params)
    mu = next(leaf for path, leaf in flat(state).items() if path.endswith("mu/head/kernel"))
    np.testing.assert_allclose(mu, 0.1 * flat(model.grads)["head/kernel"], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_balance_bias_moves_by_its_own_rate_against_the_sign(model, schedule):
    tx = optimizer(model, schedule=schedule, weight_decay=0.5, clip_norm=1e-3).tx
    updates, _ = jax.jit(tx.update)(model.grads, tx.init(model.params), model.params)
    np.testing.assert_allclose(flat(updates)[BALANCE], -1e-3 * np.sign(flat(model.grads)[BALANCE]), rtol=1e-6)


def test_a_balance_bias_without_a_rate_is_refused(model):
    with pytest.raises(ValueError, match=f"balance_rate: missing, but '{BALANCE}'"):
        build(OptimConfig(**BASE), model.params, model.axes, num_steps=10)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_frozen_parameters_stay_and_have_no_state(model, name):
    frozen = (GroupConfig(pattern="embed/.*|.*/(query|router)/.*", freeze=True), GroupConfig(pattern=".*"))
    tx = optimizer(model, name=name, groups=frozen, ema_decay=0.9, weight_decay=0.1).tx
    params, state = run(tx, model, num_steps=1)
    for path, leaf in flat(params).items():
        is_frozen = path.startswith("embed/") or "/query/" in path or "/router/" in path
        assert is_frozen == np.array_equal(leaf, flat(model.params)[path]), path
        assert is_frozen == (not any(where.endswith(f"/{path}") for where in flat(state))) or path == BALANCE, path
    assert jax.tree.structure(ema.averaged_params(state, params)) == jax.tree.structure(params)


def test_frozen_gradients_are_neither_judged_nor_counted(model):
    frozen = (GroupConfig(pattern="embed/.*", freeze=True), GroupConfig(pattern=".*"))
    tx = optimizer(model, groups=frozen, clip_norm=1.0).tx
    model.grads["embed"]["tokens"] *= np.nan
    updates, state = jax.jit(tx.update)(model.grads, tx.init(model.params), model.params)
    assert guard.stats(state).applied == 1
    assert not np.any(updates["embed"]["tokens"])


def test_a_group_scales_the_learning_rate(model):
    halved = (GroupConfig(pattern="head/.*", lr_scale=0.5), GroupConfig(pattern=".*"))
    update = jax.jit(optimizer(model).tx.update)
    full, _ = update(model.grads, optimizer(model).tx.init(model.params), model.params)
    tx = optimizer(model, groups=halved).tx
    half, _ = jax.jit(tx.update)(model.grads, tx.init(model.params), model.params)
    np.testing.assert_allclose(half["head"]["kernel"], 0.5 * full["head"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(half["embed"]["tokens"], full["embed"]["tokens"])


def test_a_skipped_step_keeps_the_schedule_and_the_balance_bias(model):
    tx = optimizer(model, schedule="linear", name="lion").tx
    step = jax.jit(tx.update)
    bad = jax.tree.map(lambda g: g * np.nan, model.grads)
    skipped, state = step(bad, tx.init(model.params), model.params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(skipped))
    updates, _ = step(model.grads, state, model.params)
    np.testing.assert_allclose(np.abs(updates["head"]["kernel"]), 0.009, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_a_skipped_step_leaves_the_optimizers_state_alone(model, name):
    tx = optimizer(model, name=name).tx
    step = jax.jit(tx.update)
    _, before = step(model.grads, tx.init(model.params), model.params)
    _, after = step(jax.tree.map(lambda g: g * np.nan, model.grads), before, model.params)
    jax.tree.map(np.testing.assert_array_equal, before.inner, after.inner)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_every_large_leaf_of_the_state_lies_under_a_parameters_path(model, name):
    tx = optimizer(model, name=name, ema_decay=0.9, skip_sigma=6.0).tx
    shapes = {path: leaf.shape for path, leaf in flat(model.params).items()}
    unmatched = {
        where: leaf.size
        for where, leaf in flat(jax.eval_shape(tx.init, model.params)).items()
        if not any(where.endswith(f"/{path}") and leaf.shape == shape for path, shape in shapes.items())
    }
    assert all(size <= guard.WINDOW for size in unmatched.values()), unmatched


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_sharded_step_equals_that_of_one_device(model, name):
    tx = optimizer(model, name=name, clip_norm=1.0, weight_decay=0.1).tx
    expected, _ = run(tx, model, num_steps=2)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, context=1, tensor=2, rules="standard"))
    with jax.set_mesh(mesh):
        places = rules.tree_shardings(mesh, model.axes, model.params)
        state_places = rules.state_shardings(mesh, jax.eval_shape(tx.init, model.params), model.axes, model.params)
        params, grads = jax.device_put((model.params, model.grads), (places, places))
        state = jax.jit(tx.init, out_shardings=state_places)(params)
        step = jax.jit(tx.update, out_shardings=(places, state_places))
        for index in range(2):
            scaled = jax.tree.map(lambda g, p, i=index: g * (i + 1) + 0.1 * p, grads, params)
            updates, state = step(scaled, state, params)
            params = optax.apply_updates(params, updates)
    sharded = [leaf for path, leaf in flat(state).items() if path.endswith("query/kernel")]
    assert all(len({str(s.index) for s in leaf.addressable_shards}) > 1 for leaf in sharded)
    assert_close(params, expected, rtol=1e-4, atol=1e-5)


def test_the_schedule_is_the_rate_that_is_applied(model):
    made = optimizer(model, name="lion", schedule="cosine", warmup_steps=2)
    updates, _ = jax.jit(made.tx.update)(model.grads, made.tx.init(model.params), model.params)
    np.testing.assert_allclose(np.max(np.abs(updates["head"]["kernel"])), made.schedule(0), rtol=1e-6)


def test_abstract_parameters_suffice(model, abstract):
    tx = build(OptimConfig(**BASE), abstract, model.axes, num_steps=10, balance_rate=1e-3).tx
    assert jax.eval_shape(tx.init, abstract) == jax.eval_shape(optimizer(model).tx.init, model.params)


def test_moments_are_float32_for_bfloat16_gradients(model):
    tx = optimizer(model, name="muon").tx
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), model.grads)
    updates, state = jax.jit(tx.update)(grads, tx.init(model.params), model.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32", "int32"}


def test_the_config_round_trips_and_stays_small():
    cfg = config.from_dict(OptimConfig, BASE | {"groups": [{"pattern": "embed/.*", "freeze": True}, {"pattern": ".*"}]})
    assert config.from_dict(OptimConfig, config.to_dict(cfg)) == cfg
    assert len(config.to_dict(cfg)) <= 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(b1=1.0), "b1=1.0"),
        (dict(ema_decay=-0.1), "ema_decay=-0.1"),
        (dict(learning_rate=0.0), "learning_rate=0.0"),
        (dict(learning_rate=float("nan")), "learning_rate=nan"),
        (dict(weight_decay=-1.0), "weight_decay=-1.0"),
        (dict(clip_norm=0.0), "clip_norm=0.0: expected above 0; None"),
        (dict(skip_sigma=0.0), "skip_sigma=0.0"),
    ],
)
def test_refuses_numbers_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**(BASE | changes))
