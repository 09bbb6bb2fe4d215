"""Pruned models: exactly as many zeros as asked for, in the right places, and what the originals' algorithms give."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import prune, sparsegpt
from gptjax.compress.sparsegpt import SparseGPT
from gptjax.nn import quantized, transformer
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat
from gptjax.optim import sparsity as sparsity_lib
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh
from tests.nn import zoo
from tests.tiny import random_params

METHODS = ["magnitude", "wanda", "sparsegpt"]
NAMES = [name for name in zoo.ZOO if name not in ("moe_capacity", "mla_window")]


def batches(cfg, *, num=2, rows=2, length=12):
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (num, rows, length)).astype(np.int32)
    return [jnp.asarray(batch) for batch in tokens]


def pruned(cfg, params, method, sparsity):
    return prune.prune(cfg, params, batches(cfg), method=method, sparsity=sparsity_lib.parse(sparsity))[1]


def flat(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def correlated(rng, rows, size):
    x = rng.normal(size=(rows, size)) @ (np.eye(size) + 0.5 * rng.normal(size=(size, size)) / np.sqrt(size))
    x = x * rng.lognormal(sigma=1.0, size=size)
    return (x.T @ x).astype(np.float32)


def reference(weights, hessian, sparsity, block_size):
    """SparseGPT in float64 a column at a time, the whole matrix updated at once and no blocks of updates."""
    w, h = weights.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    size = w.shape[1]
    removed = np.zeros(w.shape, bool)
    for j in range(size):
        if sparsity.group is None and j % block_size == 0:
            cost = w[:, j : j + block_size] ** 2 / np.diag(upper)[j : j + block_size] ** 2
            order = np.argsort(cost, axis=None, kind="stable")[: int(cost.size * sparsity.fraction)]
            chosen = np.zeros(cost.size, bool)
            chosen[order] = True
            removed[:, j : j + block_size] = chosen.reshape(cost.shape)
        if sparsity.group is not None and j % sparsity.group == 0:
            cost = w[:, j : j + sparsity.group] ** 2 / np.diag(upper)[j : j + sparsity.group] ** 2
            order = np.argsort(cost, axis=1, kind="stable")[:, : sparsity.num_pruned]
            np.put_along_axis(removed[:, j : j + sparsity.group], order, True, axis=1)
        error = np.where(removed[:, j], w[:, j], 0) / upper[j, j]
        w[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
        w[removed[:, j], j] = 0
    return w


def output_error(w, original, hessian):
    change = np.asarray(w, np.float64) - original
    return np.einsum("ri,ij,rj->", change, hessian.astype(np.float64), change)


@pytest.mark.parametrize("sparsity", ["0.5", "0.7", "2:4", "4:8", "1:4"])
@pytest.mark.parametrize("size", [64, 80])
def test_sparsegpt_is_the_published_algorithm(sparsity, size):
    rng, wanted = np.random.default_rng(size), sparsity_lib.parse(sparsity)
    weights, hessian = rng.normal(size=(48, size)).astype(np.float32), correlated(rng, 200, size)
    hessian[5], hessian[:, 5] = 0, 0  # an input that the text never had
    config = dataclasses.replace(sparsegpt.PUBLISHED, block_size=32)
    ours = np.asarray(sparsegpt.prune(jnp.asarray(weights), jnp.asarray(hessian), wanted, config=config))
    theirs = reference(weights, hessian, wanted, 32)
    assert np.mean((ours == 0) == (theirs == 0)) > 0.998
    errors = [output_error(w, weights, hessian) for w in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    by_magnitude = np.where(sparsity_lib.kept(np.abs(weights), wanted, scope="kernel"), weights, 0)
    assert errors[0] < 0.7 * output_error(by_magnitude, weights, hessian)


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_what_is_left_is_fitted_to_what_the_whole_gave(sparsity):
    rng, wanted = np.random.default_rng(1), sparsity_lib.parse(sparsity)
    weights, hessian = rng.normal(size=(24, 64)).astype(np.float32), correlated(rng, 200, 64)
    plain, fitted = (
        np.asarray(
            sparsegpt.prune(jnp.asarray(weights), jnp.asarray(hessian), wanted, config=SparseGPT(refit_steps=steps))
        )
        for steps in (0, 60)
    )
    assert np.array_equal(plain == 0, fitted == 0)
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(64)
    for row, before, after in zip(weights, plain, fitted, strict=True):
        (stay,) = np.nonzero(before)
        best = np.linalg.solve(damped[np.ix_(stay, stay)], damped[stay] @ row)
        np.testing.assert_allclose(after[stay], best, atol=2e-3)
    assert output_error(fitted, weights, hessian) < output_error(plain, weights, hessian)


def test_experts_are_pruned_each_by_its_own_hessian_and_one_without_text_by_magnitude():
    rng, half = np.random.default_rng(0), sparsity_lib.parse(0.5)
    weights = rng.normal(size=(3, 8, 16)).astype(np.float32)
    hessian = np.stack([correlated(rng, 50, 16), correlated(rng, 50, 16), np.zeros((16, 16), np.float32)])
    together = np.asarray(sparsegpt.prune(jnp.asarray(weights), jnp.asarray(hessian), half, config=SparseGPT()))
    for expert in range(2):
        alone = sparsegpt.prune(jnp.asarray(weights[expert]), jnp.asarray(hessian[expert]), half, config=SparseGPT())
        np.testing.assert_allclose(together[expert], alone, atol=1e-4)
    stay = np.asarray(sparsity_lib.kept(np.abs(weights[2]), half, scope="kernel"))
    np.testing.assert_array_equal(together[2], np.where(stay, weights[2], 0))


def test_a_singular_hessian_is_damped_until_it_is_none(caplog):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 64)).astype(np.float32)
    hessian = x.T @ x - 0.5 * np.eye(64, dtype=np.float32)  # not positive with the usual damping
    rows = jnp.asarray(rng.normal(size=(8, 64)), jnp.float32)
    found = sparsegpt.prune(rows, hessian, sparsity_lib.parse(0.5), config=SparseGPT())
    assert np.isfinite(found).all() and "singular" in caplog.text


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_of_the_layers_has_its_zeros_and_nothing_else_moves(name, method):
    cfg = zoo.build(name)
    params = random_params(cfg)
    before, after = flat(params), flat(pruned(cfg, params, method, 0.5))
    layouts = prune.pruned_layouts(cfg)
    assert len(layouts) > 3
    zeros, size = (sum(of(after[path]) for path in layouts) for of in (lambda leaf: np.sum(leaf == 0), np.size))
    assert 0.49 <= zeros / size <= 0.5
    for path, leaf in after.items():
        if path not in layouts:
            assert np.array_equal(leaf, before[path]), path
        else:
            if method != "sparsegpt":
                assert np.array_equal(leaf[leaf != 0], before[path][leaf != 0]), path


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("sparsity, n, m", [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_n_of_every_m_inputs_stay(name, method, sparsity, n, m):
    cfg = zoo.build(name)
    after = flat(pruned(cfg, random_params(cfg), method, sparsity))
    for path, layout in prune.pruned_layouts(cfg).items():
        rows = np.asarray(layout.to_rows(jnp.asarray(after[path])))
        assert np.all((rows.reshape(-1, m) != 0).sum(-1) == n), path


def test_wanda_compares_weights_times_norms_within_each_output():
    cfg = zoo.build("dense")
    params = random_params(cfg)
    after = flat(pruned(cfg, params, "wanda", 0.5))["group_0/block_0/attention/query/kernel"][0]
    x = np.concatenate([np.asarray(transformer.residuals(cfg, params, batch)[0]) for batch in batches(cfg)])
    layer = jax.tree.map(lambda leaf: leaf[0], params["group_0"]["block_0"])
    x = (x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * layer["attention_norm"]["scale"]).reshape(
        -1, 16
    )
    kernel = layer["attention"]["query"]["kernel"].reshape(16, -1)
    score = np.abs(kernel) * np.linalg.norm(x, axis=0)[:, None]
    lowest = np.argsort(score, axis=0)[:8]
    wanted = kernel.copy()
    np.put_along_axis(wanted, lowest, 0, axis=0)
    np.testing.assert_array_equal(after.reshape(16, -1), wanted)


def test_magnitude_compares_within_a_whole_kernel():
    cfg = zoo.build("dense")
    params = random_params(cfg)
    up = params["group_0"]["block_0"]["mlp"]["up"]["kernel"]
    up[:, :, :8] *= 10
    after = flat(pruned(cfg, params, "magnitude", 0.5))["group_0/block_0/mlp/up/kernel"]
    assert np.mean(after[:, :, :8] == 0) < 0.2
    for layer in range(2):
        assert np.abs(up[layer])[after[layer] == 0].max() <= np.abs(after[layer][after[layer] != 0]).min()


@pytest.mark.parametrize("text", ["1", "0", "1.5", "nan", "half", "4:4", "0:4", "5:4", 1.0])
def test_a_sparsity_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"sparsity=.*expected"):
        sparsity_lib.parse(text)


def test_what_cannot_be_pruned_so_is_refused_before_the_work():
    cfg = zoo.build("dense", d_model=12)
    with pytest.raises(ValueError, match=r"group_0/.*: sparsity=4:8: its 12 inputs are not a multiple of 8"):
        prune.prune(cfg, {}, [], method="wanda", sparsity=sparsity_lib.parse("4:8"))
    rules = (KernelRule(pattern="mlp", weights=WeightFormat(dtype="int8")),)
    stored = dataclasses.replace(zoo.build("dense"), quant=QuantConfig(rules=rules))
    with pytest.raises(ValueError, match="few bits already"):
        prune.prune(stored, {}, [], method="wanda", sparsity=sparsity_lib.parse(0.5))
    with pytest.raises(ValueError, match="needs calibration text"):
        prune.prune(zoo.build("dense"), {}, [], method="wanda", sparsity=sparsity_lib.parse(0.5))


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize(
    "method, config",
    [
        ("magnitude", None),
        ("wanda", None),
        ("sparsegpt", sparsegpt.PUBLISHED),
    ],
)
def test_eight_devices_prune_as_one_does(name, method, config):
    cfg = zoo.build(name)
    alone, spread = (flat(params) for params in alone_and_spread(cfg, method, config))
    for path, leaf in spread.items():
        # Sums in another order decide between weights that cost nearly the same, and the inverse of the Hessian of
        # these few rows makes them count in the third digit.
        assert np.mean((leaf == 0) == (alone[path] == 0)) > 0.98, path
        assert np.mean(np.abs(leaf - alone[path]) < 0.02) > 0.98, path


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_what_is_fitted_is_as_good_on_eight_devices(name):
    # Conjugate gradients that have not converged differ by far more than their sums do, on one device too where the
    # rows come in another order. How far the outputs are from the original's does not.
    cfg = zoo.build(name)
    tokens = batches(cfg, num=1, rows=8, length=32)[0]
    original = transformer.forward(cfg, random_params(cfg), tokens).hidden_BTD
    off = [
        float(jnp.linalg.norm(transformer.forward(cfg, jax.device_get(params), tokens).hidden_BTD - original))
        for params in alone_and_spread(cfg, "sparsegpt", SparseGPT())
    ]
    assert off[1] == pytest.approx(off[0], rel=0.02)


def alone_and_spread(cfg, method, config):
    """A model pruned on one device, and on eight."""
    params = random_params(cfg)
    text, sparsity = batches(cfg, rows=4, length=32), sparsity_lib.parse("2:4")
    prune_it = functools.partial(prune.prune, cfg, batches=text, method=method, sparsity=sparsity, config=config)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, context=1, tensor=2, rules="standard"))
    with jax.set_mesh(mesh):
        places = rules.tree_shardings(mesh, transformer.param_axes(cfg), transformer.abstract_params(cfg))
        spread = prune_it(jax.tree.map(jax.device_put, params, places))[1]
    return prune_it(params)[1], spread


def test_a_model_that_is_trained_rounded_is_pruned_as_its_floats():
    rules = (KernelRule(pattern="mlp", weights=WeightFormat(dtype="int8")),)
    cfg = zoo.build("dense")
    training = dataclasses.replace(cfg, quant=QuantConfig(rules=rules, stage="train"))
    params = random_params(cfg)
    found = flat(pruned(training, params, "wanda", "2:4"))
    assert all(np.array_equal(leaf, found[path]) for path, leaf in flat(pruned(cfg, params, "wanda", "2:4")).items())


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_are_zeros_in_few_bits(symmetric):
    cfg = zoo.build("dense")
    params = pruned(cfg, random_params(cfg), "magnitude", "2:4")
    rules = (KernelRule(pattern="group_", weights=WeightFormat(dtype="int4", group_size=8, symmetric=symmetric)),)
    stored = transformer.store(dataclasses.replace(cfg, quant=QuantConfig(rules=rules)), params)
    for path, layout in prune.pruned_layouts(cfg).items():
        leaf = functools.reduce(lambda tree, name: tree[name], path.split("/"), stored)
        rows = np.asarray(layout.to_rows(jnp.asarray(flat(params)[path])))
        assert np.all(np.asarray(quantized.dequantize_rows(leaf))[rows == 0] == 0)
