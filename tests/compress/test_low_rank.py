"""Factors that keep a kernel's outputs: how well, and of what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import calibrate, low_rank, prune, quantize
from gptjax.compress.calibrate import Inputs
from gptjax.nn import quant_spec, quantized, transformer
from gptjax.nn.formats import WeightFormat
from gptjax.optim.sparsity import Sparsity
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh
from tests.nn import zoo
from tests.tiny import random_params

NUM_IN, NUM_OUT, ROWS = 12, 20, 50


def batches(cfg):
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 2, 12)).astype(np.int32)
    return [jnp.asarray(batch) for batch in tokens]


def problem(seed=0):
    """A kernel's rows and the inputs of very unequal directions that it gets."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(NUM_IN, NUM_IN)) * np.geomspace(10, 0.05, NUM_IN)
    return rng.normal(size=(NUM_OUT, NUM_IN)).astype(np.float32), rng.normal(size=(ROWS, NUM_IN)) @ mix


def factored(rows, hessian, rank):
    (reduce, expand), lost = low_rank._factors(jnp.asarray(rows), jnp.asarray(hessian, jnp.float32), rank)
    return np.asarray(expand) @ np.asarray(reduce), float(lost)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_error_is_the_tail_of_the_whitened_kernel_s_singular_values(rank):
    """The published way, through the Cholesky factor of the Hessian and its inverse, written in numpy."""
    rows, x = problem()
    hessian = x.T @ x
    root = np.linalg.cholesky(hessian)
    u, s, vt = np.linalg.svd(rows @ root, full_matrices=False)
    published = (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)
    got, lost = factored(rows, hessian, rank)
    np.testing.assert_allclose(got, published, atol=2e-3)
    error = np.square((rows - got) @ x.T).sum()
    np.testing.assert_allclose(error, np.square(s[rank:]).sum(), rtol=1e-3)
    # A float32 eigenvalue is exact to 1e-7 of the largest.
    np.testing.assert_allclose(lost, np.square(s[rank:]).sum() / np.square(s).sum(), rtol=1e-3, atol=1e-6)


def test_activations_never_make_it_worse_than_the_kernel_alone():
    for seed in range(5):
        rows, x = problem(seed)
        for rank in (1, 3, 6, 10):
            aware, plain = factored(rows, x.T @ x, rank)[0], factored(rows, np.eye(NUM_IN), rank)[0]
            errors = [np.square((rows - kernel) @ x.T).sum() for kernel in (aware, plain)]
            assert errors[0] <= errors[1] * (1 + 1e-5)
            u, s, vt = np.linalg.svd(rows, full_matrices=False)
            np.testing.assert_allclose(plain, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-4)


def test_a_full_rank_is_the_kernel_and_a_singular_hessian_needs_no_damping():
    rows, x = problem()
    got, lost = factored(rows, x.T @ x, NUM_IN)
    np.testing.assert_allclose(got, rows, atol=1e-4)
    assert abs(lost) < 1e-5
    few = x[:4]
    got, lost = factored(rows, few.T @ few, 4)  # as many directions as rows of text
    np.testing.assert_allclose(got @ few.T, rows @ few.T, atol=1e-3 * np.abs(rows @ few.T).max())


@pytest.mark.parametrize("name", ["dense", "kv_shared", "mla", "moe"])
def test_a_model_s_kernels_become_factors(name):
    cfg = zoo.build(name)
    params, text = random_params(cfg), batches(cfg)
    before = jax.tree.map(np.copy, params)
    found = low_rank.factorise(cfg, params, text, low_rank.ranks_of_size(cfg, 0.6))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, params))
    wanted = transformer.abstract_params(found.model)
    assert jax.tree.map(np.shape, found.params) == jax.tree.map(np.shape, wanted)
    plain = low_rank.factorise(cfg, params, [], low_rank.ranks_of_size(cfg, 0.6))
    assert plain.model == found.model
    states = [transformer.forward(c, p, text[0]).hidden_BTD for c, p in ((cfg, params), found[:2], plain[:2])]
    errors = [float(jnp.square(state - states[0]).mean()) for state in states[1:]]
    assert errors[0] < errors[1]
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, found.params)]
    assert counts == [sum(line.before for line in found.lines), sum(line.after for line in found.lines)]
    left = {line.part for line in found.lines if line.how.startswith("left")}
    kernels = {path for path in transformer.layouts(cfg) if path.startswith("group_")}
    assert all("router" in path or "key_up" in path or "value_up" in path for path in kernels & left)


def test_enough_of_the_outputs_stays():
    cfg = zoo.build("dense")
    params, text = random_params(cfg), batches(cfg)
    ranks = low_rank.ranks_of_energy(cfg, params, text, 0.8)
    assert len(set(ranks.values())) > 1
    found = low_rank.factorise(cfg, params, text, ranks, sequence="none")
    assert all(error <= 0.2 + 1e-4 for error in found.errors.values())
    fewer = {path: rank - 1 for path, rank in ranks.items() if rank > 1}
    less = low_rank.factorise(cfg, params, text, fewer, sequence="none")
    assert all(error > 0.2 for error in less.errors.values())


def test_factors_are_quantised_and_pruned_by_what_they_are_multiplied_with():
    cfg = zoo.build("dense")
    params, text = random_params(cfg), batches(cfg)
    thin = low_rank.factorise(cfg, params, text, low_rank.ranks_of_size(cfg, 0.6))
    seen = {}

    def treat(site, kernel, inputs):
        assert isinstance(inputs, Inputs) and inputs.hessian.shape[-1] == site.layout.num_inputs
        seen[site.path] = kernel
        return kernel

    calibrate.walk(thin.model, thin.params, text, treat)
    assert seen.keys() == {path for path in transformer.layouts(thin.model) if path.startswith("group_")}
    quant = quant_spec.rules(WeightFormat(dtype="int8"))
    done = quantize.quantize(thin.model, thin.params, quant, method=quantize.METHODS["gptq"], batches=text)
    assert quantized.is_quantized(done.params["group_0"]["block_0"]["mlp"]["up"]["kernel"]["expand"])
    states = [transformer.forward(*model, text[0]).hidden_BTD for model in (thin[:2], done[:2])]
    assert float(jnp.abs(states[1] - states[0]).mean()) < 0.05
    _, sparse = prune.prune(thin.model, thin.params, text, method="wanda", sparsity=Sparsity(fraction=0.5))
    assert (
        abs(
            prune.num_zeros(sparse["group_0"]["block_0"]["mlp"]["up"]["kernel"]["reduce"])
            / seen["group_0/block_0/mlp/up/kernel/reduce"].size
            / 2
            - 0.5
        )
        < 0.1
    )
    with pytest.raises(ValueError, match="kernels in two factors cannot be scaled"):
        quantize.check(thin.model, quant, method=quantize.METHODS["awq"])


def test_over_eight_devices_it_is_the_same():
    cfg = zoo.build("dense")
    params, text = random_params(cfg), batches(cfg)
    ranks = low_rank.ranks_of_size(cfg, 0.6)
    wanted = low_rank.factorise(cfg, params, text, ranks)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=1, context=1, tensor=2, rules="standard"))
    with jax.set_mesh(mesh):
        shardings = rules.tree_shardings(mesh, transformer.param_axes(cfg), transformer.abstract_params(cfg))
        got = low_rank.factorise(cfg, jax.device_put(params, shardings), text, ranks)
    for path, error in wanted.errors.items():
        np.testing.assert_allclose(got.errors[path], error, rtol=1e-3)
    states = [
        np.asarray(transformer.forward(*model[:2], text[0]).hidden_BTD) for model in (wanted, jax.device_get(got))
    ]
    np.testing.assert_allclose(states[1], states[0], atol=1e-3)


@pytest.mark.parametrize(
    ("size", "message"), [(0.0, "rank=0: expected above 0"), (1.0, "rank=1: expected"), (-2, "rank=-2")]
)
def test_sizes_that_are_no_part_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        low_rank.ranks_of_size(zoo.build("dense"), size)


def test_groups_divide_the_ranks_of_a_size():
    cfg = zoo.build("dense", d_model=256, d_ff=1024)
    ranks = low_rank.ranks_of_size(cfg, 0.5)
    up = ranks["group_0/block_0/mlp/up/kernel"]
    assert up == 96 and up <= 0.5 * 256 * 1024 / 1280 < up + 16
    assert all(rank % 8 == 0 or rank < 64 for rank in ranks.values())


def test_what_is_factored_or_in_few_bits_is_refused():
    cfg = zoo.build("dense")
    params = random_params(cfg)
    ranks = low_rank.ranks_of_size(cfg, 0.5)
    thin = low_rank.factorise(cfg, params, [], ranks)
    with pytest.raises(ValueError, match="in two factors already"):
        low_rank.factorise(*thin[:2], [], ranks)
    quant = quant_spec.rules(WeightFormat(dtype="int8"))
    with pytest.raises(ValueError, match="in few bits already: factorise the model"):
        low_rank.ranks_of_size(dataclasses.replace(cfg, quant=quant), 0.5)
    with pytest.raises(ValueError, match="rank=16 of a kernel of 16 inputs"):
        low_rank.factorise(cfg, params, [], {"group_0/block_0/mlp/up/kernel": 16})
    with pytest.raises(ValueError, match="no kernel is left"):
        low_rank.factorise(cfg, params, [], {})
