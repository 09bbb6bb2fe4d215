"""The partitioning table."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh


def mesh(**sizes):
    return make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1, **sizes}))


def test_an_unknown_logical_axis_is_an_error_even_without_a_mesh():
    with pytest.raises(ValueError, match="unknown logical axis 'act_bacth'"):
        rules.constrain(jnp.zeros((2, 2)), "act_bacth", None)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="standard"), rules.use("megatron"):
        pass


def test_a_function_traced_under_one_table_is_traced_anew_under_another():
    split = jax.jit(lambda x: rules.constrain(2 * x, "act_batch", "act_residual", "act_embed"))
    x, found = jnp.ones((4, 8, 8)), []
    with jax.set_mesh(mesh(data=2, tensor=4)):
        for preset in ("standard", "sequence", "standard"):
            with rules.use(preset):
                found.append(split(x).sharding.shard_shape(x.shape))
        with rules.unsplit():
            assert split(x).sharding.is_fully_replicated
    assert found == [(2, 8, 8), (2, 2, 8), (2, 8, 8)]


def test_a_mesh_axis_splits_one_dimension_only():
    with rules.use("expert_wide"):
        assert rules.spec("experts", "embed", "mlp") == jax.sharding.PartitionSpec(("expert", "tensor"), "fsdp", None)


def test_a_dimension_that_does_not_divide_stays_whole():
    layout = rules.sharding(mesh(fsdp=4, tensor=2), ("embed", "kv_heads", "head_dim"), (16, 1, 8))
    assert layout.shard_shape((16, 1, 8)) == (4, 1, 8)


def test_every_dimension_that_stays_whole_is_told_once(caplog):
    grid, axes = mesh(fsdp=4, tensor=2), {"a": ("embed", "kv_heads"), "b": ("embed", "kv_heads"), "c": ("vocab",)}
    shapes = {"a": (16, 3), "b": (16, 3), "c": (5,)}
    with caplog.at_level(logging.INFO, logger="absl"):
        for name in axes:
            rules.sharding(grid, axes[name], shapes[name])
    assert [record.getMessage() for record in caplog.records] == [
        "('embed', 'kv_heads') (16, 3): 3 is not divisible by mesh axis tensor=2; replicated over it",
        "('vocab',) (5,): 5 is not divisible by mesh axis tensor=2; replicated over it",
    ]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, None),
        ({"data": 16}, "does not fit 8 device"),
        ({"data": -1, "fsdp": -1}, "at most one"),
        ({"data": 0}, ">= 1"),
        ({"data": -1, "tensor": 3}, "does not fit 8 device"),
    ],
)
def test_a_mesh_fits_the_machine_or_says_why_not(sizes, message):
    if message is None:
        assert mesh(**sizes).size == 3
    else:
        with pytest.raises(ValueError, match=message):
            mesh(**sizes)


def test_optimizer_state_is_laid_out_as_its_parameters():
    params = {"layer": {"kernel": jnp.zeros((16, 32))}, "norm": {"scale": jnp.zeros(16)}}
    axes = {"layer": {"kernel": ("embed", "mlp")}, "norm": {"scale": ("embed",)}}
    grid = mesh(fsdp=4, tensor=2)
    state = optax.chain(optax.adam(1e-3), optax.scale_by_factored_rms(min_dim_size_to_factor=8)).init(params)
    layouts = rules.state_shardings(grid, state, axes, params)
    shapes = jax.tree.map(lambda x, layout: layout.shard_shape(x.shape), state, layouts)
    adam, factored = shapes[0][0], shapes[1]
    assert adam.mu["layer"]["kernel"] == (4, 16) and adam.nu["norm"]["scale"] == (4,) and adam.count == ()
    assert factored.v_row["layer"]["kernel"] == (4,) and factored.v_col["layer"]["kernel"] == (16,)
    assert np.prod(factored.v["norm"]["scale"]) == 4
