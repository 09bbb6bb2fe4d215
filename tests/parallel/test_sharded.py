"""The same step on one device and on eight, under every kind of split."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.nn import transformer
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh
from tests.nn.zoo import CAPACITY_MOE, GROUPED_MOE, MOE, TINY, ZOO

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
    "data_context_tensor": {"data": 2, "context": 2, "tensor": 2},
    "expert": {"data": 2, "expert": 4},
    "fsdp_expert_tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
    "expert_context": {"expert": 2, "context": 4},
    "sequence": {"fsdp": 2, "context": 2, "tensor": 2, "rules": "sequence"},
    "expert_wide": {"data": 2, "expert": 2, "tensor": 2, "rules": "expert_wide"},
}
MODELS = {
    "dense": TINY,
    "moe": dataclasses.replace(TINY, moe=MOE, first_k_dense=1),
    "moe_grouped": dataclasses.replace(TINY, moe=GROUPED_MOE),
    "moe_capacity": dataclasses.replace(TINY, moe=CAPACITY_MOE),
    # Three experts of 15 hidden units split over no axis of two.
    "moe_odd": dataclasses.replace(TINY, moe=dataclasses.replace(MOE, num_experts=3, d_ff=15, bias=True)),
    "capacity_odd": dataclasses.replace(TINY, moe=dataclasses.replace(CAPACITY_MOE, num_experts=3, d_ff=15)),
    **{name: dataclasses.replace(TINY, **ZOO[name]) for name in ("mla", "window", "sandwich")},
}
BATCH, LENGTH = 8, 16
# Every split for the two main kinds; the other routers and the capacity way where experts are split.
EXPERT_MESHES = ["data_context_tensor", "expert", "fsdp_expert_tensor", "expert_wide"]
CASES = [(model, mesh) for model in ("dense", "moe") for mesh in MESHES]
CASES += [(model, mesh) for model in ("moe_grouped", "moe_capacity") for mesh in EXPERT_MESHES]
CASES += [(model, mesh) for model in ("moe_odd", "capacity_odd") for mesh in ("fsdp_expert_tensor", "expert_wide")]
CASES += [(model, "data_context_tensor") for model in ("mla", "window", "sandwich")]


def mesh_of(name):
    sizes = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1, **MESHES[name]}
    config = MeshConfig(**sizes)
    return config, make_mesh(config)


def loss(cfg, params, tokens_BT, segment_ids_BT):
    out = transformer.forward(cfg, params, tokens_BT, segment_ids_BT=segment_ids_BT)
    logits = transformer.logits(cfg, params, out.hidden_BTD)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(tokens_BT, -1, 1)[..., None], axis=-1)
    aux = out.aux["loss"] if out.aux else 0.0
    return (nll.sum() + aux) / tokens_BT.size, out.aux


@functools.cache
def reference(name):
    cfg = MODELS[name].build()
    rng = np.random.default_rng(0)
    noise = jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.1).astype(np.float32), transformer.abstract_params(cfg)
    )
    params = jax.tree.map(jnp.add, transformer.init(cfg, jax.random.key(0)), noise)
    tokens = rng.integers(0, cfg.vocab_size, (BATCH, LENGTH)).astype(np.int32)
    segments = np.where(np.arange(LENGTH) < 10, 1, np.where(np.arange(LENGTH) < 15, 2, 0)) * np.ones(
        (BATCH, 1), np.int32
    )
    segments = segments.astype(np.int32)
    value = jax.jit(jax.value_and_grad(functools.partial(loss, cfg), has_aux=True))(params, tokens, segments)
    return cfg, params, tokens, segments, jax.device_get(value)


@pytest.mark.parametrize(("model", "mesh_name"), CASES)
def test_loss_and_gradients_do_not_depend_on_the_mesh(model, mesh_name):
    cfg, params, tokens, segments, ((value, aux), gradient) = reference(model)
    config, mesh = mesh_of(mesh_name)
    with jax.set_mesh(mesh), rules.use(config.rules):
        layouts = rules.tree_shardings(mesh, transformer.param_axes(cfg), params)
        sharded = jax.device_put(params, layouts)
        batch = jax.device_put((tokens, segments), rules.batch_sharding(mesh))
        step = jax.jit(jax.value_and_grad(functools.partial(loss, cfg), has_aux=True), out_shardings=(None, layouts))
        (got_value, got_aux), got = step(sharded, *batch)
    np.testing.assert_allclose(got_value, value, atol=1e-5)
    for key in aux:
        for expected, found in zip(*map(jax.tree.leaves, (aux[key], got_aux[key])), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4)
    for (path, expected), found in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(got), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("mesh_name", EXPERT_MESHES)
@pytest.mark.parametrize("model", ["moe", "moe_capacity"])
def test_rows_that_do_not_divide_the_mesh_are_computed_all_the_same(model, mesh_name):
    """As when a few prompts are completed on many devices."""
    cfg, params, tokens, segments, _ = reference(model)
    step = jax.jit(jax.value_and_grad(lambda params, *batch: loss(cfg, params, *batch)[0]))
    config, mesh = mesh_of(mesh_name)
    expected = step(params, tokens[:3], segments[:3])
    with jax.set_mesh(mesh), rules.use(config.rules):
        sharded = jax.device_put(params, rules.tree_shardings(mesh, transformer.param_axes(cfg), params))
        got = step(sharded, tokens[:3], segments[:3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_parameters_and_activations_are_really_split():
    cfg = MODELS["moe"].build()
    config, mesh = mesh_of("fsdp_expert_tensor")
    shapes = transformer.abstract_params(cfg)
    with jax.set_mesh(mesh), rules.use(config.rules):
        layouts = rules.tree_shardings(mesh, transformer.param_axes(cfg), shapes)
        up = layouts["group_1"]["block_0"]["moe"]["experts_up"]["kernel"]
        kernel = shapes["group_1"]["block_0"]["moe"]["experts_up"]["kernel"]
        assert up.shard_shape(kernel.shape) == (1, 4 // 2, 16 // 2, 16 // 2)
        tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=rules.batch_sharding(mesh))
        params = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, layouts)
        text = jax.jit(lambda p, t: transformer.forward(cfg, p, t).hidden_BTD).lower(params, tokens).as_text()
    # Constraints are dropped without a word where no mesh is set in the right way.
    assert text.count("sdy.sharding_constraint") >= 10
