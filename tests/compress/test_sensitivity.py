"""What an output's error costs, and how many weights each kernel spares, against the loss itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import prune, sensitivity
from gptjax.nn import transformer
from gptjax.optim import sparsity as sparsity_lib
from tests.nn import zoo
from tests.tiny import random_params

PATH = "group_0/block_0/mlp/up/kernel"


def batches(cfg, *, rows=2, length=12):
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, rows, length)).astype(np.int32)
    return [jnp.asarray(batch) for batch in tokens]


def measured(cfg, params, text, fraction=0.5):
    return sensitivity.measure(cfg, params, text, prune.pruned_layouts(cfg), fraction=fraction)


def changed(params, kernel):
    layer = {**params["group_0"]["block_0"]["mlp"], "up": {"kernel": kernel}}
    block = {**params["group_0"]["block_0"], "mlp": layer}
    return {**params, "group_0": {**params["group_0"], "block_0": block}}


def row_loss(cfg, params, row):
    logits = transformer.logits(cfg, params, transformer.forward(cfg, params, row[None]).hidden_BTD)[0]
    return -jax.nn.log_softmax(logits)[jnp.arange(len(row) - 1), row[1:]].sum()


def test_an_output_costs_its_rows_squared_gradients():
    cfg = zoo.build("dense")
    params, text = random_params(cfg), batches(cfg)
    outputs = measured(cfg, params, text).outputs[PATH, 1]
    kernel = params["group_0"]["block_0"]["mlp"]["up"]["kernel"]
    slope = jax.grad(lambda w, row: row_loss(cfg, changed(params, w), row))
    rows = [row for batch in text for row in batch]
    wanted = sum(np.square(slope(jnp.asarray(kernel), row)[1]).sum(0) for row in rows)
    np.testing.assert_allclose(outputs, wanted, rtol=1e-3)
    step = np.zeros(kernel.shape, np.float32)
    step[1, 2, 3] = 1e-2
    by_difference = (
        row_loss(cfg, changed(params, kernel + step), rows[0]) - row_loss(cfg, changed(params, kernel - step), rows[0])
    ) / 2e-2
    assert by_difference == pytest.approx(float(slope(jnp.asarray(kernel), rows[0])[1, 2, 3]), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("name", ["dense", "moe", "mla", "window"])
def test_every_kernel_of_every_layer_has_a_share_and_all_together_what_was_asked_for(name):
    cfg = zoo.build(name)
    params = random_params(cfg)
    found = measured(cfg, params, batches(cfg), fraction=0.6)
    assert found.outputs.keys() == found.fractions.keys()
    total, pruned = 0, 0.0
    for (path, _), fraction in found.fractions.items():
        assert 0.3 <= fraction <= 0.8, path
        leaf = jax.tree.leaves(prune.table(params), is_leaf=lambda row: isinstance(row, prune.Row))
        shape = next(row.shape for row in leaf if row.path == path)
        total, pruned = total + np.prod(shape[1:]), pruned + fraction * np.prod(shape[1:])
    assert pruned / total == pytest.approx(0.6, abs=1e-6)


def test_a_kernel_without_an_effect_spares_more():
    cfg = zoo.build("dense")
    params = random_params(cfg)
    params["group_0"]["block_0"]["mlp"]["up"]["kernel"][0] *= 1e-3
    found = measured(cfg, params, batches(cfg)).fractions
    assert found[PATH, 0] > found[PATH, 1] + 0.1


def test_it_loses_as_many_weights_as_asked_for_and_keeps_those_that_matter():
    cfg = zoo.build("dense")
    params, half = random_params(cfg), sparsity_lib.parse(0.5)
    params["group_0"]["block_0"]["mlp"]["down"]["kernel"][:, :16] = 0  # half of the hidden units do nothing
    _, done = prune.prune(cfg, params, batches(cfg), method="sparsegpt", sparsity=half)
    rows = [row for row in prune.table(done) if row.left is None]
    sizes = np.array([np.prod(row.shape) for row in rows])
    assert 0.49 < np.sum(sizes * [row.zeros for row in rows]) / sizes.sum() <= 0.5
    up = np.asarray(done["group_0"]["block_0"]["mlp"]["up"]["kernel"])
    assert np.mean(up[:, :, :16] == 0) > 0.9 > 0.5 > np.mean(up[:, :, 16:] == 0)


def test_gradients_of_all_layers_never_exist_together():
    def taken(num_layers):
        cfg = zoo.build("dense", num_layers=num_layers, d_ff=2048)
        params, row = random_params(cfg), batches(cfg)[0][:1]
        layouts = tuple(prune.pruned_layouts(cfg).items())
        cfg = dataclasses.replace(cfg, remat="full")
        memory = sensitivity._of_row.lower(cfg, layouts, params, row).compile().memory_analysis()
        return memory.temp_size_in_bytes, sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    # Up to 16 layers are unrolled on CPU, which undoes rematerialisation.
    (temporary, size), (deeper_temporary, deeper_size) = taken(20), taken(40)
    assert deeper_temporary - temporary < 0.05 * (deeper_size - size)
