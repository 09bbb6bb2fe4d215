import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.kernels import activations


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


@pytest.mark.parametrize(("fn", "num_inputs"), [(activations.gelu_tanh, 1), (activations.swiglu, 2)])
def test_nothing_but_the_inputs_is_kept(fn, num_inputs):
    _, backward = jax.vjp(fn, *[jnp.ones((4, 8))] * num_inputs)
    assert len(jax.tree.leaves(backward)) == num_inputs
