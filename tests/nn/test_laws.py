"""What must hold for every kind of layer, whatever its weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.nn import block, cache, linear, transformer
from gptjax.nn.config import ModelConfig, NormConfig
from gptjax.nn.norm import Norm
from tests.nn.zoo import TINY, ZOO, build

LENGTH = 12
TOKENS_BT = jnp.arange(2 * LENGTH, dtype=jnp.int32).reshape(2, LENGTH)


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, params, tokens_BT, positions_BT=None, segment_ids_BT=None):
    out = transformer.forward(cfg, params, tokens_BT, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT)
    return transformer.logits(cfg, params, out.hidden_BTD), out.aux


def params_of(cfg, seed=0):
    """Initial weights with every constant perturbed, so that no scale, bias or sink is neutral."""
    keys = jax.random.key(seed)
    params = transformer.init(cfg, keys)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + rng.normal(size=x.shape, scale=0.1).astype(np.float32), params)


def influence(cfg, params, tokens_T):
    """`[T, T]`: how much the hidden state at t depends on the embedding of the token at s.

    Tokens are distinct, so the gradient for a row of the table is the gradient for one position.
    """

    def hidden(table):
        changed = {**params, "embed": {**params["embed"], "tokens": table}}
        return transformer.forward(cfg, changed, tokens_T[None]).hidden_BTD[0].sum(-1)

    @jax.jit
    def rows(table):
        _, pull = jax.vjp(hidden, table)
        # One row at a time: grouped products cannot be batched.
        return jax.lax.map(lambda chosen: pull(chosen)[0], jnp.eye(tokens_T.shape[0]))

    gradient_TVD = rows(params["embed"]["tokens"])
    return np.abs(np.asarray(gradient_TVD)[:, np.asarray(tokens_T)]).sum(-1)


@pytest.mark.parametrize("name", ZOO)
def test_no_position_depends_on_later_ones(name):
    cfg = build(name)
    if name == "moe_capacity":
        # Which experts a token reaches is decided by tokens before it alone, but capacities are
        # filled by position, so all is as causal as without.
        assert cfg.blocks[0].mlp.capacity_factor is not None
    dependence = influence(cfg, params_of(cfg), TOKENS_BT[0])
    assert np.all(np.triu(dependence, 1) == 0.0)
    assert np.all(np.diagonal(dependence) > 0)
    if name == "dense":
        assert np.all(np.tril(dependence)[np.tril_indices(LENGTH)] > 0)


def test_without_causality_every_position_depends_on_every_other():
    cfg = dataclasses.replace(build("dense"), causal=False)
    assert np.all(influence(cfg, params_of(cfg), TOKENS_BT[0]) > 0)


def test_a_window_reaches_as_far_as_it_says():
    cfg = build("window", global_every=0)
    dependence = influence(cfg, params_of(cfg), TOKENS_BT[0])
    # Each of the three layers reaches three positions back.
    reach = 3 * (4 - 1)
    distance = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
    assert np.all((dependence > 0) == ((distance >= 0) & (distance <= reach)))


@pytest.mark.parametrize("name", [name for name in ZOO if name != "moe_capacity"])
def test_packed_documents_are_as_if_alone(name):
    cfg = build(name)
    params = params_of(cfg)
    split = 5
    positions = jnp.concatenate([jnp.arange(split), jnp.arange(LENGTH - split)])[None].astype(jnp.int32)
    segments = jnp.where(jnp.arange(LENGTH) < split, 1, 2)[None]
    tokens = TOKENS_BT[:1]
    packed, _ = forward(cfg, params, tokens, positions, segments)
    first, _ = forward(cfg, params, tokens[:, :split])
    second, _ = forward(cfg, params, tokens[:, split:])
    np.testing.assert_allclose(packed, jnp.concatenate([first, second], axis=1), atol=2e-5)


@pytest.mark.parametrize("name", ZOO)
def test_cached_equals_full(name):
    cfg = build(name)
    if name == "moe_capacity":
        pytest.skip("capacities are counted over the tokens of one call, so a prefix drops fewer")
    params = params_of(cfg)
    full, _ = forward(cfg, params, TOKENS_BT)
    step = jax.jit(functools.partial(transformer.forward, cfg))
    kv = cache.init_cache(cfg, batch_size=2, max_len=LENGTH)
    # The second row starts three tokens later: rows of a batch may stand at different positions.
    start = jnp.array([0, -3])[:, None]
    parts = []
    for first, last in [(0, 6), (6, 9), *((t, t + 1) for t in range(9, LENGTH + 3))]:
        index = jnp.arange(first, last)[None] + start
        positions = jnp.where((index >= 0) & (index < LENGTH), index, -1).astype(jnp.int32)
        tokens = jnp.take_along_axis(TOKENS_BT, jnp.maximum(positions, 0), axis=1)
        out = step(params, tokens, positions_BT=positions, cache=kv)
        kv = out.cache
        parts.append(transformer.logits(cfg, params, out.hidden_BTD))
    cached = jnp.concatenate(parts, axis=1)
    np.testing.assert_allclose(cached[0, :LENGTH], full[0], atol=3e-5)
    np.testing.assert_allclose(cached[1, 3:], full[1], atol=3e-5)


@pytest.mark.parametrize("name", ["window", "moe", "mla"])
def test_scanned_equals_unrolled(name, monkeypatch):
    cfg = build(name)
    params = params_of(cfg)
    unrolled, _ = forward(cfg, params, TOKENS_BT)
    monkeypatch.setattr(block, "_MAX_UNROLL_ON_CPU", 0)
    scanned, _ = jax.jit(forward.__wrapped__, static_argnums=0)(cfg, params, TOKENS_BT)
    np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


@pytest.mark.parametrize(("remat", "name"), [("full", "moe"), ("dots", "dense"), ("block_outputs", "window")])
def test_remat_changes_no_gradient(remat, name):
    plain = build(name)

    def gradient(cfg):
        params = params_of(plain)
        return jax.jit(jax.grad(lambda p: jnp.square(forward(cfg, p, TOKENS_BT)[0]).mean()))(params)

    for expected, got in zip(
        *map(jax.tree.leaves, (gradient(plain), gradient(dataclasses.replace(plain, remat=remat)))), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_shared_group_is_its_layers_with_equal_weights_and_its_gradient_their_sum():
    own = build("dense")
    shared = dataclasses.replace(own, groups=(dataclasses.replace(own.groups[0], shared=True),))
    params = params_of(shared)
    copies = {**params, "group_0": jax.tree.map(lambda x: jnp.stack([x, x]), params["group_0"])}

    def loss(cfg):
        return lambda p: jnp.square(forward(cfg, p, TOKENS_BT)[0]).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss(shared)))(params)
    value_own, gradient_own = jax.jit(jax.value_and_grad(loss(own)))(copies)
    np.testing.assert_allclose(value, value_own, rtol=1e-6)
    total = jax.tree.map(lambda x: x.sum(0), gradient_own["group_0"])
    for expected, got in zip(*map(jax.tree.leaves, (total, gradient["group_0"])), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("name", ZOO)
def test_every_stored_kernel_is_multiplied_at_the_one_seam(name, monkeypatch):
    """What changes products there, such as quantisation, changes all of them: cut there, no kernel has a gradient."""
    cfg = build(name)

    def kernel_gradients():
        params = params_of(cfg)
        gradient = jax.grad(lambda params: forward.__wrapped__(cfg, params, TOKENS_BT)[0].sum())(params)
        leaves = jax.tree_util.tree_leaves_with_path(gradient)
        return {jax.tree_util.keystr(path): np.abs(leaf).max() for path, leaf in leaves if path[-1].key == "kernel"}

    assert all(kernel_gradients().values())
    stop = jax.lax.stop_gradient

    class Cut:
        einsum = staticmethod(lambda spec, x, kernel, inner=linear.matmul: inner.einsum(spec, x, stop(kernel)))
        project = staticmethod(lambda x, kernels, inner=linear.matmul: inner.project(x, [stop(k) for k in kernels]))

    monkeypatch.setattr(linear, "matmul", Cut)
    grouped = linear.grouped_matmul
    monkeypatch.setattr(linear, "grouped_matmul", lambda x, kernel, groups: grouped(x, stop(kernel), groups))
    assert not any(kernel_gradients().values())


def test_bfloat16_is_near_float32():
    cfg = build("sandwich")
    params = params_of(cfg)
    full, _ = forward(cfg, params, TOKENS_BT)
    half, _ = forward(dataclasses.replace(cfg, dtype="bfloat16"), params, TOKENS_BT)
    assert half.dtype == jnp.float32
    assert 1e-6 < float(jnp.abs(half - full).mean()) < 0.05


def test_parameters_are_float32_and_activations_bfloat16_but_on_cpu():
    cfg = TINY.build()
    assert {leaf.dtype for leaf in jax.tree.leaves(transformer.abstract_params(cfg))} == {jnp.dtype("float32")}
    kinds = {platform: linear.compute_dtype(ModelConfig.dtype, platform) for platform in ("cpu", "gpu", "tpu")}
    assert kinds == {"cpu": jnp.float32, "gpu": jnp.bfloat16, "tpu": jnp.bfloat16}


@pytest.mark.parametrize("name", ZOO)
def test_the_residual_stream_is_there_after_every_layer(name):
    cfg = build(name)
    params = params_of(cfg)
    found = jax.jit(transformer.residuals, static_argnums=0)(cfg, params, TOKENS_BT)
    assert len(found) == cfg.num_layers + 1
    norm = Norm(cfg.final_norm).apply({"params": params["final_norm"]}, found[-1])
    assert np.abs(norm - transformer.forward(cfg, params, TOKENS_BT).hidden_BTD).max() < 1e-4


def test_a_zero_centered_norm_adds_its_one_in_float32():
    scale = jnp.asarray([0.0007, -0.3, 0.123], jnp.float16)
    x = jnp.asarray([[1.0, -2.0, 0.5]])
    cfg = NormConfig(zero_centered=True)
    wanted = Norm(cfg).apply({"params": {"scale": scale.astype(jnp.float32)}}, x)
    assert np.array_equal(Norm(cfg).apply({"params": {"scale": scale}}, x), wanted)
