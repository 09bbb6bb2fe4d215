"""The einsum seam: same values and gradients as `jnp.einsum`, on every layout we use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.kernels import matmul

_SIZES = {"B": 8, "T": 4, "D": 6, "N": 2, "K": 2, "H": 3, "F": 10, "V": 5, "E": 4, "M": 9, "R": 5}
_SPECS = [
    "BTD,DNH->BTNH",
    "BTNH,NHD->BTD",
    "BTD,DF->BTF",
    "BTD,VD->BTV",
    "MD,DF->MF",
    "BTD,D->BT",
    "BTNR,RNH->BTNH",
    "EMD,EDF->EMF",
    "BD,VD->BV",
]


def _operands(spec, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x_dims, w_dims, y_dims = spec.replace("->", ",").split(",")
    return [jnp.asarray(rng.normal(size=[_SIZES[d] for d in dims]), dtype) for dims in (x_dims, w_dims, y_dims)]


def _gradients(fn, x, w, dy):
    return jax.jit(jax.grad(lambda x, w: (fn(x, w) * dy).sum().astype(jnp.float32), (0, 1)))(x, w)


@pytest.mark.parametrize("spec", _SPECS)
def test_value_and_gradients_match_plain_einsum(spec):
    x, w, dy = _operands(spec)
    # Merged dimensions are summed in another order.
    np.testing.assert_allclose(matmul.einsum(spec, x, w), jnp.einsum(spec, x, w), rtol=1e-6, atol=1e-6)
    got = _gradients(lambda x, w: matmul.einsum(spec, x, w), x, w, dy)
    want = _gradients(lambda x, w: jnp.einsum(spec, x, w), x, w, dy)
    for got_leaf, want_leaf in zip(got, want, strict=True):
        np.testing.assert_allclose(got_leaf, want_leaf, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_head_projection_is_one_plain_product():
    """Over heads and their dimensions apart, XLA:CPU transposes the gradient and the weight first."""
    x, w, dy = _operands("BTD,DNH->BTNH")
    fn = jax.jit(jax.grad(lambda x, w, dy: (matmul.einsum("BTD,DNH->BTNH", x, w) * jnp.sin(dy)).sum()))
    assert " transpose(" not in fn.lower(x, w, dy).compile().as_text()


def test_gradients_keep_bfloat16():
    spec = "BTD,DF->BTF"
    x, w, dy = _operands(spec, jnp.bfloat16)
    got = _gradients(lambda x, w: matmul.einsum(spec, x, w), x, w, dy)
    assert [leaf.dtype for leaf in got] == [jnp.bfloat16, jnp.bfloat16]
    want = _gradients(lambda x, w: jnp.einsum(spec, x, w), *(a.astype(jnp.float32) for a in (x, w, dy)))
    for got_leaf, want_leaf in zip(got, want, strict=True):
        np.testing.assert_allclose(got_leaf.astype(jnp.float32), want_leaf, rtol=2e-2, atol=2e-2)


def test_under_vmap_remat_and_two_uses():
    spec = "BTD,DF->BTF"
    x, w, _ = _operands(spec)

    def loss(product, x, w):
        y = jax.checkpoint(lambda x: product(x, w) + product(2 * x, w))(x)
        return jnp.sin(y).sum()

    def gradients(product):
        xs = jnp.stack([x, 2 * x, 3 * x])
        return jax.vmap(jax.grad(lambda x, w: loss(product, x, w), (0, 1)), in_axes=(0, None))(xs, w)

    got = gradients(lambda x, w: matmul.einsum(spec, x, w))
    want = gradients(lambda x, w: jnp.einsum(spec, x, w))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("x_axes", [("data", None), ("data", "tensor"), (None, "tensor")])
def test_sharded_gradients_match(x_axes):
    spec = "BTD,DF->BTF"
    x, w, dy = _operands(spec)
    want = _gradients(lambda x, w: jnp.einsum(spec, x, w), x, w, dy)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*x_axes)))
    w = jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "tensor")))
    with jax.set_mesh(mesh):
        got = _gradients(lambda x, w: matmul.einsum(spec, x, w), x, w, dy)
    for got_leaf, want_leaf in zip(got, want, strict=True):
        np.testing.assert_allclose(got_leaf, want_leaf, rtol=1e-5, atol=1e-5)


def _compiled_gradient(product, platform):
    x, w, dy = _operands("BTD,DF->BTF")
    grad = jax.jit(jax.grad(lambda x, w: (product(x, w) * dy).sum(), 1))
    return grad.trace(x, w).lower(lowering_platforms=(platform,)).as_text()


def test_rows_are_merged_on_cpu_only():
    def product(x, w):
        return matmul.einsum("BTD,DF->BTF", x, w)

    assert "contracting_dims = [0] x [0]" in _compiled_gradient(product, "cpu")
    assert "contracting_dims = [0, 1] x [0, 1]" in _compiled_gradient(product, "tpu")


@pytest.mark.parametrize(("length", "num_products"), [(4, 3), (64, 1)])
def test_products_of_one_input_are_one_where_there_are_many_rows(length, num_products):
    rng = np.random.default_rng(0)
    x, *kernels = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, length, 6), (6, 4, 3), (6, 2, 3), (6, 5)))

    def apart(x, kernels):
        return [jnp.einsum("BTD,D...->BT...", x, kernel) for kernel in kernels]

    assert str(jax.make_jaxpr(matmul.project)(x, kernels)).count("dot_general[") == num_products

    def loss(fn):
        return lambda x, kernels: sum((i + 1.0) * jnp.sum(jnp.sin(y)) for i, y in enumerate(fn(x, kernels)))

    got, want = (jax.jit(jax.value_and_grad(loss(fn), (0, 1)))(x, kernels) for fn in (matmul.project, apart))
    for got_leaf, want_leaf in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got_leaf, want_leaf, rtol=1e-4, atol=1e-4)
