import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.optim import adam


def test_same_directions_as_optax_and_nothing_moves_where_it_is_not_kept():
    params = {"w": jnp.zeros((5, 3)), "b": jnp.zeros((3,))}
    ours, theirs = adam.scale_by_adam(0.9, 0.95), optax.scale_by_adam(0.9, 0.95)
    state, reference = ours.init(params), theirs.init(params)
    update = jax.jit(lambda grads, state, keep: ours.update(grads, state, keep=keep))
    for seed in range(4):
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(lambda p, rng=rng: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        poison = jax.tree.map(lambda g: g * jnp.nan, grads)
        _, skipped = update(poison, state, False)
        for a, b in zip(jax.tree.leaves(skipped), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b)
        got, state = update(grads, skipped, True)
        want, reference = theirs.update(grads, reference)
        for a, b in zip(jax.tree.leaves((got, state)), jax.tree.leaves((want, reference)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
