import jax
import numpy as np
import optax
import pytest

from gptjax.kernels import rows
from gptjax.parallel import mesh


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (1000, 333)], ids=str)
def test_norm_is_the_root_of_the_sum_of_squares(shape):
    tree = {"a": np.random.default_rng(0).normal(size=shape).astype(np.float32), "b": np.float32(2.0)}
    np.testing.assert_allclose(jax.jit(rows.norm)(tree), optax.tree.norm(tree), rtol=1e-6)
    assert rows.norm({}) == 0


def test_top_k_of_portable_programs_is_that_of_jax():
    x = np.random.default_rng(0).integers(-3, 3, (50, 9)).astype(np.float32)  # many are equal
    x[:, 4] = np.finfo(np.float32).min
    with mesh.portable("any"):
        got = rows.top_k(x, 4)
    for ours, expected in zip(got, jax.lax.top_k(x, 4), strict=True):
        np.testing.assert_array_equal(ours, expected)
        assert ours.dtype == expected.dtype
