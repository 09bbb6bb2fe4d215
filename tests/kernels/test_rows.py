import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.kernels import activations, rows


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_activations_have_the_gradients_of_their_formulas(dtype):
    x, up, g = (jnp.asarray(np.linspace(*ends, 97), dtype) for ends in ((-12, 12), (3, -2), (1, 2)))
    wide = [v.astype(jnp.float32) for v in (x, up, g)]
    got = jax.grad(lambda x, up: (activations.swiglu(x, up) * g).sum().astype(jnp.float32), (0, 1))(x, up)
    want = jax.grad(lambda x, up: (jax.nn.silu(x) * up * wide[2]).sum(), (0, 1))(*wide[:2])
    got += (jax.grad(lambda x: (activations.gelu_tanh(x) * g).sum().astype(jnp.float32))(x),)
    want += (jax.grad(lambda x: (jax.nn.gelu(x) * wide[2]).sum())(wide[0]),)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=tolerance, atol=tolerance)
