import jax
import numpy as np
import optax
import pytest

from gptjax.kernels import rows


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (1000, 333)], ids=str)
def test_norm_is_the_root_of_the_sum_of_squares(shape):
    tree = {"a": np.random.default_rng(0).normal(size=shape).astype(np.float32), "b": np.float32(2.0)}
    np.testing.assert_allclose(jax.jit(rows.norm)(tree), optax.tree.norm(tree), rtol=1e-6)
    assert rows.norm({}) == 0
