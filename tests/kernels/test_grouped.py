"""Grouped products against a loop over experts: exact for every split of the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.kernels.grouped import contiguous, grouped_matmul, place


def _loop(x, w, sizes):
    ends = np.cumsum(sizes)
    parts = [x[end - size : end] @ w[e] for e, (size, end) in enumerate(zip(sizes, ends, strict=True))]
    return jnp.concatenate(parts)


def _operands(num_rows, num_experts, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(num_rows, 6)), dtype)
    w = jnp.asarray(rng.normal(size=(num_experts, 6, 10)), dtype)
    return x, w, jnp.asarray(rng.normal(size=(num_rows, 10)), dtype)


_SPLITS = [[5], [0, 7, 0], [300, 0, 17, 80], [16, 16], [3, 345, 0]]


@pytest.mark.parametrize("sizes", _SPLITS, ids=str)
def test_values_and_gradients_match_a_loop(sizes):
    x, w, dy = _operands(sum(sizes), len(sizes))

    def run(product):
        return jax.jit(jax.value_and_grad(lambda x, w: (product(x, w) * dy).sum(), (0, 1)))(x, w)

    got = grouped_matmul(x, w, contiguous(jnp.asarray(sizes, jnp.int32)))
    np.testing.assert_allclose(got, _loop(x, w, sizes), rtol=1e-5, atol=1e-5)
    (_, got), (_, want) = (
        run(lambda x, w: grouped_matmul(x, w, contiguous(jnp.asarray(sizes, jnp.int32)))),
        run(lambda x, w: _loop(x, w, sizes)),
    )
    for got_leaf, want_leaf in zip(got, want, strict=True):
        np.testing.assert_allclose(got_leaf, want_leaf, rtol=1e-4, atol=1e-4)


def test_rows_of_no_expert_do_not_reach_the_others():
    x, w, _ = _operands(40, 3)
    sizes = jnp.asarray([10, 0, 7], jnp.int32)
    x = x.at[17:].set(jnp.inf)

    def loss(x, w):
        return (grouped_matmul(x, w, contiguous(sizes))[:17] ** 2).sum()

    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    want = jax.grad(lambda x, w: (_loop(x[:17], w, [10, 0, 7]) ** 2).sum(), (0, 1))(x, w)
    np.testing.assert_allclose(dx[:17], want[0][:17], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, want[1], rtol=1e-4, atol=1e-4)


def test_bfloat16_keeps_dtype_and_accumulates_in_float32():
    sizes = [300, 20]
    x, w, dy = _operands(sum(sizes), 2, jnp.bfloat16)
    dx, dw = jax.grad(
        lambda x, w: (grouped_matmul(x, w, contiguous(jnp.asarray(sizes, jnp.int32))) * dy).sum().astype(jnp.float32),
        (0, 1),
    )(x, w)
    assert dx.dtype == dw.dtype == jnp.bfloat16
    wide = [a.astype(jnp.float32) for a in (x, w, dy)]
    want = jax.grad(lambda x, w: (_loop(x, w, sizes) * wide[2]).sum(), 1)(*wide[:2])
    np.testing.assert_allclose(dw.astype(jnp.float32), want, rtol=1e-2, atol=1e-1)


def test_under_remat_and_scan():
    x, w, _ = _operands(20, 3)
    sizes = [9, 0, 11]

    def gradients(product):
        def total(x, w):
            def body(h, _):
                return jnp.tanh(jax.checkpoint(product)(h, w)[:, :6]), None

            return jax.lax.scan(body, x, None, length=2)[0].sum()

        return jax.grad(total, (0, 1))(x, w)

    got = gradients(lambda x, w: grouped_matmul(x, w, contiguous(jnp.asarray(sizes, jnp.int32))))
    want = gradients(lambda x, w: _loop(x, w, sizes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_get_ragged_dot(platform):
    x, w, dy = _operands(32, 4)
    grad = jax.jit(jax.grad(lambda x, w: (grouped_matmul(x, w, contiguous(jnp.full(4, 8))) * dy).sum(), (0, 1)))
    text = grad.trace(x, w).lower(lowering_platforms=(platform,)).as_text()
    assert "ragged_dot" in text and "while" not in text


@pytest.mark.parametrize(
    ("sizes", "is_even"), [([40, 64, 50, 38], True), ([10, 150, 0, 32], False)], ids=["even", "not"]
)
def test_a_nearly_even_load_gets_equal_parts(sizes, is_even):
    num_rows, groups = place(jnp.asarray(sizes, jnp.int32), sum(sizes))
    assert bool(groups.is_even) == is_even and num_rows % len(sizes) == 0
    row_M = np.concatenate([start + np.arange(size) for start, size in zip(groups.starts_E, sizes, strict=True)])
    x, w, dy = _operands(sum(sizes), len(sizes))
    # What lies in unused rows must not matter, neither what they hold nor the gradient of their results.
    spread_x, spread_dy = (jnp.full((num_rows, v.shape[1]), 7.0).at[row_M].set(v) for v in (x, dy))

    def loss(x, w):
        return (grouped_matmul(x, w, groups) * spread_dy).sum()

    got, (dx, dw) = grouped_matmul(spread_x, w, groups), jax.jit(jax.grad(loss, (0, 1)))(spread_x, w)
    want_dx, want_dw = jax.grad(lambda x, w: (_loop(x, w, sizes) * dy).sum(), (0, 1))(x, w)
    np.testing.assert_allclose(got[row_M], _loop(x, w, sizes), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx[row_M], want_dx, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-4, atol=1e-4)


def test_few_rows_are_not_spread():
    assert place(jnp.asarray([1, 0, 3], jnp.int32), 4)[0] == 4
