"""Smaller models out of larger ones: what stays computes what it did with the rest switched off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import mixtures, structured
from gptjax.nn import transformer
from gptjax.nn.config import LayerGroup
from tests.nn import zoo
from tests.tiny import random_params

NAMES = [name for name in zoo.ZOO if name != "moe_capacity"]


def batches(cfg, *, num=2, rows=2, length=12):
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (num, rows, length)).astype(np.int32)
    return [jnp.asarray(batch) for batch in tokens]


def hidden(cfg, params, tokens):
    return np.asarray(transformer.forward(cfg, params, tokens).hidden_BTD)


def has_its_shapes(cfg, params):
    wanted = transformer.abstract_params(cfg)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, wanted)


def switched_off(monkeypatch, method, cfg, params, size):
    """What `method` gives when it cuts nothing away, only zeroes and fits."""
    with monkeypatch.context() as patch:
        patch.setattr(mixtures, "cut", lambda tree, *_: tree)
        return method(cfg, params, batches(cfg), size)[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method, size", [(structured.width, 0.5), (structured.heads, 2)])
def test_what_is_cut_had_no_part_any_more(monkeypatch, name, method, size):
    if method is structured.heads and name == "kv_shared":
        with pytest.raises(ValueError, match="heads: layers use the keys and values of others"):
            structured.heads(zoo.build(name), {}, [], size)
        return
    if method is structured.heads and zoo.ZOO[name].get("num_kv_heads") == 1:
        pytest.skip("one group of heads")
    cfg = zoo.build(name)
    params = random_params(cfg)
    small_cfg, small = method(cfg, params, batches(cfg), size)
    has_its_shapes(small_cfg, small)
    assert sum(x.size for x in jax.tree.leaves(small)) < sum(x.size for x in jax.tree.leaves(params))
    wanted = hidden(cfg, switched_off(monkeypatch, method, cfg, params, size), batches(cfg)[0])
    np.testing.assert_allclose(hidden(small_cfg, small, batches(cfg)[0]), wanted, atol=2e-4 * np.abs(wanted).max())


def test_hidden_units_that_do_nothing_or_the_same_are_no_loss():
    cfg = zoo.build("dense")
    params = random_params(cfg)
    mlp = params["group_0"]["block_0"]["mlp"]
    mlp["down"]["kernel"][:, 1::4] = 0  # do nothing
    for kernel in (mlp["up"]["kernel"], mlp["gate"]["kernel"]):
        kernel[:, :, 2::4] = kernel[:, :, 3::4]  # do the same as others, which can take over
    mlp["down"]["kernel"][:, 2::4] *= 0.01
    small_cfg, small = structured.width(cfg, params, batches(cfg), 0.5)
    assert small_cfg.blocks[0].mlp.d_ff == 16
    wanted, got = hidden(cfg, params, batches(cfg)[0]), hidden(small_cfg, small, batches(cfg)[0])
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


def test_heads_of_a_group_that_does_nothing_go():
    cfg = zoo.build("dense")  # heads 0 and 1 share a key, 2 and 3 the other
    params = random_params(cfg)
    params["group_0"]["block_0"]["attention"]["out"]["kernel"][0, :2] = 0
    params["group_0"]["block_0"]["attention"]["out"]["kernel"][1, 2:] = 0
    small_cfg, small = structured.heads(cfg, params, batches(cfg), 2)
    assert (small_cfg.blocks[0].attention.num_heads, small_cfg.blocks[0].attention.num_kv_heads) == (2, 1)
    wanted, got = hidden(cfg, params, batches(cfg)[0]), hidden(small_cfg, small, batches(cfg)[0])
    np.testing.assert_allclose(got, wanted, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["dense", "window", "moe"])
def test_layers_that_do_nothing_go_first(name):
    cfg = zoo.build(name, num_layers=6)
    params = random_params(cfg)
    idle = 3 if name != "moe" else 4  # whose outputs add nothing
    layers = [
        f"group_{i}/{r}/block_{j}"
        for i, g in enumerate(cfg.groups)
        for r in range(g.repeats)
        for j in range(len(g.pattern))
    ]
    group, repeat, block = layers[idle].split("/")
    for part, projection in (("attention", "out"), ("mlp", "down"), ("moe", "experts_down")):
        if part in params[group][block]:
            params[group][block][part][projection]["kernel"][int(repeat)] = 0
    if name == "moe":
        params[group][block]["moe"]["shared"]["down"]["kernel"][int(repeat)] = 0
    assert np.argmin(structured.block_influence(cfg, params, batches(cfg))) == idle
    small_cfg, small = structured.depth(cfg, params, batches(cfg), 5)
    has_its_shapes(small_cfg, small)
    assert small_cfg.blocks == cfg.blocks[:idle] + cfg.blocks[idle + 1 :]
    np.testing.assert_allclose(
        hidden(small_cfg, small, batches(cfg)[0]), hidden(cfg, params, batches(cfg)[0]), atol=1e-4
    )


def test_experts_that_no_token_reaches_are_no_loss():
    moe = dataclasses.replace(zoo.MOE, router_bias=True)
    cfg = zoo.build("moe", moe=moe, num_layers=3)
    params = random_params(cfg)
    params["group_1"]["block_0"]["moe"]["router"]["bias"][:, ::2] = -1e4
    small_cfg, small = structured.experts(cfg, params, batches(cfg), 2)
    has_its_shapes(small_cfg, small)
    wanted = hidden(cfg, params, batches(cfg)[0])
    np.testing.assert_allclose(hidden(small_cfg, small, batches(cfg)[0]), wanted, atol=1e-4)


def test_each_group_of_experts_keeps_as_many():
    cfg = zoo.build("moe_grouped")
    params = random_params(cfg)
    moe = params["group_0"]["block_0"]["moe"]
    moe["balance_bias"][:] = np.arange(8)  # which expert of the 4 groups of 2 it was
    small_cfg, small = structured.experts(cfg, params, batches(cfg), 4)
    has_its_shapes(small_cfg, small)
    assert np.all(np.asarray(small["group_0"]["block_0"]["moe"]["balance_bias"]) // 2 == np.arange(4))
    assert np.isfinite(hidden(small_cfg, small, batches(cfg)[0])).all()


def test_an_expert_merged_into_its_copy_changes_nothing_though_its_units_are_in_another_order():
    cfg = zoo.build("moe", num_layers=1, first_k_dense=0)
    params = random_params(cfg)
    moe = params["group_0"]["block_0"]["moe"]
    order = np.random.default_rng(1).permutation(16)
    for name, dim in (("gate", -1), ("up", -1), ("down", -2)):
        kernel = moe[f"experts_{name}"]["kernel"]
        kernel[0, 3] = np.take(kernel[0, 0], order, axis=dim)
    moe["experts_down"]["kernel"][0, 1:3] *= 9.0
    moe["router"]["kernel"][0, :, 3] = 0.9 * moe["router"]["kernel"][0, :, 0]
    small_cfg, small = structured.merged_experts(cfg, params, batches(cfg), 3)
    has_its_shapes(small_cfg, small)
    _, dropped = structured.experts(cfg, params, batches(cfg), 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), small, dropped)


def test_what_is_merged_is_the_mean_by_worth_into_the_nearest_of_the_group():
    cfg = zoo.build("moe_grouped", num_layers=1)
    params = random_params(cfg)
    for name in ("gate", "up", "down"):  # units that differ so much that none changes places
        kernel = params["group_0"]["block_0"]["moe"][f"experts_{name}"]["kernel"]
        kernel *= 4.0 ** (np.arange(8)[:, None] if name == "down" else np.arange(8))
        kernel[:] = np.abs(kernel)
    worth = mixtures.scores(cfg, params, batches(cfg))["group_0/block_0"][0]
    small_cfg, small = structured.merged_experts(cfg, params, batches(cfg), 4)
    has_its_shapes(small_cfg, small)
    down = np.asarray(params["group_0"]["block_0"]["moe"]["experts_down"]["kernel"])[0]
    bias = np.asarray(params["group_0"]["block_0"]["moe"]["experts_down"]["bias"])[0]
    got = small["group_0"]["block_0"]["moe"]["experts_down"]
    for group in range(4):
        part = np.maximum(worth, 1e-6 * worth.max())[2 * group : 2 * group + 2]  # some no token asked
        wanted = np.average(bias[2 * group : 2 * group + 2], axis=0, weights=part)
        np.testing.assert_allclose(got["bias"][0, group], wanted, rtol=1e-4, atol=1e-6)
        wanted = np.average(down[2 * group : 2 * group + 2], axis=0, weights=part)
        np.testing.assert_allclose(got["kernel"][0, group], wanted, rtol=1e-3, atol=1e-4)


def test_experts_are_worth_their_routed_length():
    cfg = zoo.build("moe", num_layers=1, first_k_dense=0)
    params, (tokens, *_) = random_params(cfg), batches(cfg, num=1)
    found = mixtures.scores(cfg, params, [tokens])["group_0/block_0"][0]
    weights = jax.tree.map(lambda leaf: leaf[0], params["group_0"]["block_0"])
    louder = jax.tree.map(jnp.asarray, params)
    kernel = louder["group_0"]["block_0"]["moe"]["experts_down"]["kernel"]
    louder["group_0"]["block_0"]["moe"]["experts_down"]["kernel"] = kernel.at[0, 2].multiply(3.0)
    again = mixtures.scores(cfg, louder, [tokens])["group_0/block_0"][0]
    assert again[2] == pytest.approx(3 * found[2], rel=1e-4) and again[1] == pytest.approx(found[1], rel=1e-4)
    assert weights["moe"]["router"]["kernel"].shape == (16, 4) and np.all(found >= 0)


def test_one_after_the_other_and_shared_layers_too():
    dense = zoo.build("dense", num_layers=3)
    group = LayerGroup(pattern=dense.blocks[:1], repeats=3, shared=True)
    for cfg in (dense, dataclasses.replace(dense, groups=(group,))):
        params = random_params(cfg)
        for name, size in (("heads", 2), ("width", 0.75)):
            cfg, params = structured.METHODS[name](cfg, params, batches(cfg), size)
            has_its_shapes(cfg, params)
        assert np.isfinite(hidden(cfg, params, batches(cfg)[0])).all()


@pytest.mark.parametrize(
    "name, cut, message",
    [
        ("dense", {"heads": 1}, "heads=1: 4 heads are in groups of 2 .* multiple of 2 from 2 to 2"),
        ("dense", {"heads": 4}, "heads=4"),
        ("dense", {"width": 1.0}, "width=1: expected above 0 and below 1"),
        ("dense", {"depth": 2}, "depth=2: expected 1 to 1"),
        ("dense", {"experts": 2}, "experts=2: the model has none"),
        ("moe", {"experts": 4}, "experts=4: expected a multiple"),
        ("moe", {"experts": 1}, "experts=1: a token is sent to 2"),
        ("moe_grouped", {"experts": 6}, "multiple of num_groups=4"),
    ],
)
def test_what_cannot_be_left_out_is_refused_before_the_work(name, cut, message):
    with pytest.raises(ValueError, match=message):
        structured.check(zoo.build(name), cut)
