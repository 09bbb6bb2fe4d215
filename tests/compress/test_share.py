"""Layers, keys and values and tables of a trained model that come to be shared, and what that leaves of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import share
from gptjax.nn import transformer
from gptjax.nn.formats import KernelRule, QuantConfig, RankRule, WeightFormat
from gptjax.nn.sharing import SharingConfig
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh
from tests.nn import zoo
from tests.tiny import TINY, random_params

TOKENS_BT = jnp.asarray(np.random.default_rng(1).integers(0, TINY.vocab_size, (4, 12)), jnp.int32)
HALF = SharingConfig(pattern="adjacent", unique=2)


def hidden(cfg, params, tokens=TOKENS_BT):
    return np.asarray(transformer.forward(cfg, params, tokens).hidden_BTD)


def logits(cfg, params):
    return np.asarray(transformer.logits(cfg, params, transformer.forward(cfg, params, TOKENS_BT).hidden_BTD))


def has_its_shapes(made):
    wanted = transformer.abstract_params(made.model)
    assert jax.tree.map(np.shape, made.params) == jax.tree.map(np.shape, wanted)


def with_equal_layers(cfg, uses):
    """Random weights, the same in layers of the same number."""
    params = random_params(cfg)
    params["group_0"] = jax.tree.map(lambda leaf: leaf[np.array(uses)], params["group_0"])
    return params


@pytest.mark.parametrize("init", ["average", "first", "influential"])
@pytest.mark.parametrize(
    ("pattern", "unique", "uses"),
    [
        ("all", None, [0] * 4),
        ("cyclic", 2, [0, 1, 0, 1]),
        ("adjacent", 2, [0, 0, 1, 1]),
        ("sandwich", None, [0, 1, 1, 2]),
    ],
)
def test_equal_layers_share_without_a_change(pattern, unique, uses, init):
    cfg = dataclasses.replace(TINY, num_layers=4).build()
    params = with_equal_layers(cfg, uses)
    before = jax.tree.map(np.copy, params)
    config = SharingConfig(pattern=pattern, unique=unique)
    made = share.layers(cfg, params, config, init=init, batches=[TOKENS_BT])
    has_its_shapes(made)
    np.testing.assert_allclose(hidden(*made[:2]), hidden(cfg, params), atol=2e-5)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, params))
    counts = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, made.params)]
    assert counts == [sum(line.before for line in made.lines), sum(line.after for line in made.lines)]


def test_what_unequal_layers_begin_as():
    cfg = dataclasses.replace(TINY, num_layers=4).build()
    params = random_params(cfg)
    params["group_0"]["block_0"]["attention"]["out"]["kernel"][0] *= 9  # the first layer turns the stream most
    params["group_0"]["block_0"]["mlp"]["down"]["kernel"][3] *= 9
    up = params["group_0"]["block_0"]["mlp"]["up"]["kernel"]
    wanted = {
        "average": [(up[0] + up[1]) / 2, (up[2] + up[3]) / 2],
        "first": [up[0], up[2]],
        "influential": [up[0], up[3]],
    }
    for init, kernels in wanted.items():
        made = share.layers(cfg, params, HALF, init=init, batches=[TOKENS_BT])
        for i, kernel in enumerate(kernels):
            np.testing.assert_allclose(made.params[f"group_{i}"]["block_0"]["mlp"]["up"]["kernel"], kernel, atol=1e-6)


def test_keys_and_values_of_equal_streams_are_shared_without_a_change():
    cfg = dataclasses.replace(TINY, num_layers=4, qk_norm=True).build()
    params = with_equal_layers(cfg, [0, 0, 2, 2])
    for part in (("attention", "out"), ("mlp", "down")):  # the first of two adds nothing to the stream
        params["group_0"]["block_0"][part[0]][part[1]]["kernel"][np.array([0, 2])] = 0
    for init in ("first", "average"):
        made = share.keys_and_values(cfg, params, 2, init=init)
        has_its_shapes(made)
        np.testing.assert_allclose(hidden(*made[:2]), hidden(cfg, params), atol=2e-5)
    assert [block.attention.kv for block in made.model.blocks] == ["own", "previous"] * 2


def test_keys_and_values_then_layers_share():
    cfg = dataclasses.replace(TINY, num_layers=4).build()
    both = share.keys_and_values(cfg, random_params(cfg), 2)
    made = share.layers(*both[:2], SharingConfig(pattern="cyclic", unique=2))
    has_its_shapes(made)
    spec = dataclasses.replace(TINY, num_layers=4, kv_every=2, sharing=SharingConfig(pattern="cyclic", unique=2))
    assert made.model == spec.build()
    with pytest.raises(ValueError, match="layers 1 and 2 would share weights, but are not alike: attention.kv"):
        share.layers(*both[:2], HALF)
    with pytest.raises(
        ValueError, match="kv_every=4: does not divide the 2 layers of a group whose weights are shared"
    ):
        share.keys_and_values(*share.layers(cfg, random_params(cfg), SharingConfig(pattern="cyclic", unique=2))[:2], 4)


@pytest.mark.parametrize("keep", ["input", "output", "average"])
@pytest.mark.parametrize("name", ["dense", "gpt2"])
def test_tables_that_differ_in_size_alone_are_tied_without_a_change(name, keep):
    cfg = zoo.build(name, tie_embeddings=False)
    params = random_params(cfg)
    params["head"]["kernel"] = 0.3 * params["embed"]["tokens"].T
    made = share.embeddings(cfg, params, keep)
    has_its_shapes(made)
    np.testing.assert_allclose(logits(*made[:2]), logits(cfg, params), atol=1e-4)


def test_over_eight_devices_it_is_the_same():
    cfg = dataclasses.replace(TINY, num_layers=4, tie_embeddings=False).build()
    params = random_params(cfg)

    def made(params):
        kv = share.keys_and_values(cfg, params, 2, init="average")
        layers = share.layers(*kv[:2], SharingConfig(pattern="cyclic", unique=2))
        return share.embeddings(*layers[:2], "average")

    wanted = made(params)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=1, context=1, tensor=2, rules="standard"))
    with jax.set_mesh(mesh):
        shardings = rules.tree_shardings(mesh, transformer.param_axes(cfg), transformer.abstract_params(cfg))
        got = made(jax.device_put(params, shardings))
        for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(wanted.params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        shardings = rules.tree_shardings(
            mesh, transformer.param_axes(got.model), transformer.abstract_params(got.model)
        )
        placed = jax.device_put(got.params, shardings)
        states = jax.jit(transformer.forward, static_argnums=0)(got.model, placed, TOKENS_BT).hidden_BTD
    np.testing.assert_allclose(states, hidden(*wanted[:2]), atol=2e-5)


def test_what_cannot_be_shared_is_said():
    cfg = dataclasses.replace(TINY, num_layers=4).build()
    params = random_params(cfg)
    with pytest.raises(ValueError, match="needs calibration text"):
        share.layers(cfg, params, HALF, init="influential")
    with pytest.raises(ValueError, match="kv_every=1: expected at least 2"):
        share.keys_and_values(cfg, params, 1)
    with pytest.raises(ValueError, match="kv_every=3: does not divide the 4 layers"):
        share.keys_and_values(cfg, params, 3)
    with pytest.raises(ValueError, match="has one table for both ends already"):
        share.embeddings(cfg, params, "input")
    with pytest.raises(ValueError, match="layer 1 of a group has latents instead"):
        share.keys_and_values(zoo.build("mla"), random_params(zoo.build("mla")), 2)
    quant = QuantConfig(rules=(KernelRule(pattern="mlp", weights=WeightFormat(dtype="int8")),))
    for change, said in (
        ({"quant": quant}, "in few bits already"),
        ({"low_rank": (RankRule(pattern="up", rank=2),)}, "two factors"),
    ):
        changed = dataclasses.replace(cfg, **change)
        for method in (lambda c: share.layers(c, params, HALF), lambda c: share.keys_and_values(c, params, 2)):
            with pytest.raises(ValueError, match=said):
                method(changed)
