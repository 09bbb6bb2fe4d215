"""Kernels in two factors: the product of both, wherever a kernel is multiplied."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.nn import cost, low_rank, transformer
from gptjax.nn.cache import init_cache
from gptjax.nn.formats import KernelRule, QuantConfig, RankRule, WeightFormat
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh
from tests.nn import zoo
from tests.tiny import random_params

TOKENS_BT = np.random.default_rng(1).integers(0, 64, (4, 12)).astype(np.int32)
RULES = (RankRule(pattern="query|out", rank=5), RankRule(pattern="(up|gate|down)/kernel", rank=4))
NAMES = ["dense", "gpt2", "kv_shared", "mla", "moe", "moe_capacity"]


def thin(name, **changes):
    return dataclasses.replace(zoo.build(name, **changes), low_rank=RULES)


def multiplied(cfg, params):
    """The model with the products of factors for kernels."""
    whole = dataclasses.replace(cfg, low_rank=())
    layouts = transformer.layouts(whole)

    def visit(path, node):
        if isinstance(node, dict) and "reduce" in node:
            layout = layouts[path]
            rank = node["reduce"].shape[-1]
            lead = node["reduce"].shape[: node["reduce"].ndim - 1 - len(layout.in_shape)]
            product = node["reduce"].reshape(*lead, -1, rank) @ node["expand"].reshape(*lead, rank, -1)
            return product.reshape(*lead, *layout.in_shape, *layout.out_shape)
        return {k: visit(f"{path}/{k}" if path else k, v) for k, v in node.items()} if isinstance(node, dict) else node

    return whole, visit("", params)


def hidden(cfg, params):
    return np.asarray(transformer.forward(cfg, params, TOKENS_BT).hidden_BTD)


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_multiplied_as_their_product_is(name):
    cfg = thin(name)
    params = random_params(cfg)
    whole, products = multiplied(cfg, params)
    assert any("reduce" in path for path in transformer.layouts(cfg))
    wanted = hidden(whole, products)
    np.testing.assert_allclose(hidden(cfg, params), wanted, atol=2e-4 * np.abs(wanted).max())
    assert cost.count(cfg).total == sum(leaf.size for leaf in jax.tree.leaves(params))
    saved = cost.flops_per_token(whole, 8).kernels - cost.flops_per_token(cfg, 8).kernels
    counts = cost.count(whole).active - cost.count(cfg).active
    assert saved == 2 * counts > 0  # each parameter of these layers is used once


def test_decoding_equals_the_full_pass():
    cfg = thin("kv_shared")
    params, cache, parts = random_params(cfg), init_cache(cfg, batch_size=4, max_len=12), []
    step = jax.jit(functools.partial(transformer.forward, cfg))
    for t in range(12):
        out = step(params, TOKENS_BT[:, t : t + 1], positions_BT=np.full((4, 1), t, np.int32), cache=cache)
        cache = out.cache
        parts.append(out.hidden_BTD)
    np.testing.assert_allclose(np.concatenate(parts, 1), hidden(cfg, params), atol=2e-5)


def test_both_factors_train_and_begin_with_the_gain_of_a_kernel():
    cfg = thin("dense", d_model=64, d_ff=128)
    params = transformer.init(cfg, jax.random.key(0))
    gradient = jax.grad(lambda p: jnp.square(transformer.forward(cfg, p, TOKENS_BT).hidden_BTD[..., 0]).mean())(params)
    for leaf in jax.tree.leaves(gradient["group_0"]["block_0"]["mlp"]):
        assert np.abs(leaf).max() > 0
    whole = transformer.init(dataclasses.replace(cfg, low_rank=()), jax.random.key(0))
    for part in ("up", "down"):
        (product,) = (p["group_0"]["block_0"]["mlp"][part]["kernel"] for p in [multiplied(cfg, params)[1]])
        assert 0.8 < product.std() / whole["group_0"]["block_0"]["mlp"][part]["kernel"].std() < 1.25


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_split_over_eight_devices_it_is_the_same(name):
    cfg = thin(name)
    params = random_params(cfg)
    wanted = hidden(cfg, params)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, context=1, tensor=2, rules="standard"))
    with jax.set_mesh(mesh):
        shardings = rules.tree_shardings(mesh, transformer.param_axes(cfg), transformer.abstract_params(cfg))
        placed = jax.device_put(params, shardings)
        expand = placed["group_0" if name == "dense" else "group_1"]["block_0"]["attention"]["query"]["kernel"][
            "expand"
        ]
        assert expand.sharding.spec[2] == "tensor"
        got = jax.jit(transformer.forward, static_argnums=0)(cfg, placed, TOKENS_BT).hidden_BTD
    np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_factors_in_few_bits(name):
    cfg = thin(name)
    quant = QuantConfig(rules=(KernelRule(pattern="(reduce|expand)$", weights=WeightFormat(dtype="int8")),))
    stored_cfg = dataclasses.replace(cfg, quant=quant)
    params = random_params(cfg)
    stored = transformer.store(stored_cfg, params)
    assert jax.tree.structure(stored) == jax.tree.structure(transformer.abstract_params(stored_cfg))
    wanted, got = hidden(cfg, params), hidden(stored_cfg, stored)
    assert 0 < np.abs(got - wanted).mean() < 0.05 * np.abs(wanted).mean()
    trained = dataclasses.replace(quant, stage="train")
    np.testing.assert_allclose(hidden(dataclasses.replace(cfg, quant=trained), params), got, atol=2e-4)


@pytest.mark.parametrize("rank", [0, -1, 11, 16, 64])
def test_ranks_that_save_nothing_are_refused(rank):
    cfg = dataclasses.replace(zoo.build("dense"), low_rank=(RankRule(pattern="mlp/up", rank=rank),))
    with pytest.raises(ValueError, match=f"mlp/up/kernel: rank={rank} of a kernel of 16 inputs and 32 .*1 to 10"):
        transformer.abstract_params(cfg)


def test_tables_routers_and_norms_stay_whole():
    cfg = dataclasses.replace(zoo.build("moe", tie_embeddings=False), low_rank=(RankRule(pattern="", rank=2),))
    whole = {path for path in transformer.layouts(cfg) if not path.endswith(("reduce", "expand"))}
    assert whole == {"embed/tokens", "head/kernel", "group_1/block_0/moe/router/kernel"}
    assert not low_rank.can_be_factored("group_0/block_0/attention/key_up/kernel")
