import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.kernels import rows


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (1000, 333)], ids=str)
def test_norm_is_the_root_of_the_sum_of_squares(shape):
    tree = {"a": np.random.default_rng(0).normal(size=shape).astype(np.float32), "b": np.float32(2.0)}
    np.testing.assert_allclose(jax.jit(rows.norm)(tree), optax.tree.norm(tree), rtol=1e-6)
    assert rows.norm({}) == 0


@pytest.mark.parametrize("fn", [rows.scale_rows, rows.add_to_rows])
def test_gradients_of_scale_and_bias(fn):
    rng = np.random.default_rng(0)
    x, row, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 9, 6), (6,), (2, 9, 6)))
    plain = {rows.scale_rows: jnp.multiply, rows.add_to_rows: jnp.add}[fn]
    np.testing.assert_array_equal(fn(x, row), plain(x, row))
    got, want = (jax.jit(jax.grad(lambda x, row, f=f: (f(x, row) * g).sum(), (0, 1)))(x, row) for f in (fn, plain))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
