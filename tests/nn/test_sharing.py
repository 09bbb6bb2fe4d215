"""Layers that share weights, or keys and values: which do, what that computes, and what it costs."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.nn import cost, sharing, transformer
from gptjax.nn.cache import init_cache
from gptjax.nn.config import RopeConfig
from gptjax.nn.sharing import SharingConfig
from tests.nn import zoo
from tests.tiny import TINY, random_params

TOKENS_BT = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 12)).astype(np.int32)
PATTERNS = {
    "all": (SharingConfig(pattern="all"), 4, [0, 0, 0, 0]),
    "cyclic": (SharingConfig(pattern="cyclic", unique=2), 6, [0, 1, 0, 1, 0, 1]),
    "adjacent": (SharingConfig(pattern="adjacent", unique=2), 4, [0, 0, 1, 1]),
    "sandwich": (SharingConfig(pattern="sandwich"), 5, [0, 1, 1, 1, 2]),
    "wide_sandwich": (SharingConfig(pattern="sandwich", unique=4), 6, [0, 1, 1, 2, 2, 3]),
}


def spec(**changes):
    return dataclasses.replace(TINY, **changes)


@functools.partial(jax.jit, static_argnums=0)
def loss(cfg, params):
    logits = transformer.logits(cfg, params, transformer.forward(cfg, params, TOKENS_BT).hidden_BTD)
    return jnp.square(logits).mean()


def unshared(cfg, params):
    """The same function with a copy of the weights for each use: one group of layers of its own."""
    layers = [weights for _, weights in transformer.layers(cfg, params)]
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("group_")}
    return rest | {"group_0": {"block_0": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}}


@pytest.mark.parametrize("name", PATTERNS)
def test_layers_use_what_the_pattern_says_and_gradients_are_sums_over_the_uses(name):
    config, num_layers, wanted = PATTERNS[name]
    shared, own = spec(num_layers=num_layers, sharing=config).build(), spec(num_layers=num_layers).build()
    params = random_params(shared)
    norms = [float(weights["mlp"]["up"]["kernel"][0, 0]) for _, weights in transformer.layers(shared, params)]
    assert [sorted(set(norms), key=norms.index).index(norm) for norm in norms] == wanted
    copies = unshared(shared, params)
    np.testing.assert_allclose(loss(shared, params), loss(own, copies), rtol=1e-5)
    gradient, by_use = jax.grad(functools.partial(loss, shared))(params), jax.grad(functools.partial(loss, own))(copies)
    found = [own for _, own in transformer.layers(shared, gradient)]
    for unique in set(wanted):
        uses = [layer for layer, of in enumerate(wanted) if of == unique]
        total = jax.tree.map(lambda leaf, uses=uses: leaf[np.array(uses)].sum(0), by_use["group_0"]["block_0"])
        for got, expected in zip(*map(jax.tree.leaves, (found[uses[0]], total)), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max() + 1e-7)
    assert cost.count(shared).total < cost.count(own).total
    assert cost.flops_per_token(shared, 12) == cost.flops_per_token(own, 12)


@pytest.mark.parametrize(
    ("config", "num_layers", "message"),
    [
        ({"pattern": "cyclic", "unique": 3}, 4, "unique=3 does not divide 4 layers evenly; expected one of 1, 2"),
        ({"pattern": "adjacent", "unique": 5}, 4, "unique=5 does not divide"),
        ({"pattern": "sandwich", "unique": 4}, 5, "the 3 layers between first and last evenly; expected one of 3"),
        ({"pattern": "sandwich"}, 2, "expected more layers"),
        ({"pattern": "adjacent"}, 4, "expected unique, the number of layers"),
        ({"pattern": "all", "unique": 2}, 4, "pattern='all' has one layer's weights, got unique=2"),
    ],
)
def test_what_does_not_come_out_even_is_refused(config, num_layers, message):
    with pytest.raises(ValueError, match=message):
        sharing.groups(spec(num_layers=num_layers).build().blocks, SharingConfig(**config))


def test_layers_that_are_not_alike_do_not_share():
    blocks = spec(num_layers=4, window=4, global_every=2).build().blocks
    with pytest.raises(ValueError, match="layers 1 and 2 would share weights, but are not alike: attention.window"):
        sharing.groups(blocks, SharingConfig(pattern="adjacent", unique=2))
    assert sharing.groups(blocks, SharingConfig(pattern="cyclic", unique=2))[0].pattern == blocks[:2]


@pytest.mark.parametrize("kind", [{}, {"sharing": SharingConfig(pattern="cyclic", unique=2)}, {"window": 6}])
def test_a_layer_attends_to_the_keys_and_values_of_the_one_before(kind):
    """Where the stream is the same in both layers, what they would compute for themselves is what they share."""
    changes = {"num_layers": 4, "qk_norm": True, **kind}
    own, shared = spec(**changes).build(), spec(**changes, kv_every=2).build()
    if not kind.get("sharing"):
        own = dataclasses.replace(own, groups=(dataclasses.replace(own.groups[0], pattern=own.blocks[:2], repeats=2),))
    params = random_params(own)
    group = params["group_0"]
    for name in ("attention_norm", *[f"attention/{part}" for part in ("key", "value", "key_norm")]):
        *parents, leaf = name.split("/")
        first, second = (functools.reduce(operator.getitem, parents, group[f"block_{j}"]) for j in (0, 1))
        second[leaf] = first[leaf]
    for path in (("attention", "out"), ("mlp", "down")):
        leaf = functools.reduce(operator.getitem, path, group["block_0"])
        leaf["kernel"] = np.zeros_like(leaf["kernel"])
    theirs = jax.tree.map(lambda leaf: leaf, params)
    for name in ("key", "value", "key_norm"):
        del theirs["group_0"]["block_1"]["attention"][name]
    assert jax.tree.map(np.shape, theirs) == jax.tree.map(np.shape, transformer.abstract_params(shared))
    got, wanted = (transformer.forward(*model, TOKENS_BT).hidden_BTD for model in ((shared, theirs), (own, params)))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_the_cache_shrinks_as_the_costs_say():
    sizes = {}
    for every in (1, 2, 4):
        cfg = spec(num_layers=4, kv_every=every).build()
        cache = init_cache(cfg, batch_size=1, max_len=32)
        entries = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(cache) if path[-1].key != "positions"]
        sizes[every] = sum(leaf.nbytes for leaf in entries) // 32
        assert sizes[every] == cost.cache_bytes_per_token(cfg)
        width = TINY.num_kv_heads * TINY.head_dim
        saved = (4 - 4 // every) * 2 * TINY.d_model * width
        whole = spec(num_layers=4).build()
        assert cost.count(whole).total - cost.count(cfg).total == saved
        assert cost.flops_per_token(whole, 8).kernels - cost.flops_per_token(cfg, 8).kernels == 2 * saved
    assert sizes[1] == 2 * sizes[2] == 4 * sizes[4]


def test_keys_that_fit_no_layer_are_refused():
    block = zoo.build("kv_shared").groups[0].pattern[1]
    group = zoo.build("kv_shared").groups[0]
    with pytest.raises(ValueError, match="expected the first layer of a pattern"):
        dataclasses.replace(group, pattern=(block,))
    for name, value in (("window", None), ("num_kv_heads", 4), ("rope", RopeConfig(theta=7.0))):
        other = dataclasses.replace(block, attention=dataclasses.replace(block.attention, **{name: value}))
        with pytest.raises(ValueError, match=f"kv='previous': {name}=.* the layer whose keys and values it uses"):
            dataclasses.replace(group, pattern=(group.pattern[0], other))
    with pytest.raises(ValueError, match="kv_every=3: does not divide num_layers=4"):
        spec(num_layers=4, kv_every=3)
    with pytest.raises(ValueError, match="kv_every=2 has no effect with mla"):
        zoo.build("mla", kv_every=2)
