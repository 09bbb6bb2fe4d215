"""Sums and maxima over the last dimension, and norms, in the forms that XLA:CPU vectorizes.

XLA:CPU reduces a row one element after the other: a maximum of 4,096 numbers takes five times as long as
reading them, and an argmax fifteen times. Elementwise maxima of halves, and a product with ones,
run at the speed of memory. Other platforms have good reductions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.parallel import rules
from gptjax.parallel.mesh import is_portable
from gptjax.types import Array

# What is left after halving is as wide as a vector register.
_VECTOR = 16
# What is summed elementwise at a time, so that it stays in the cache.
_BLOCK = 64 * 1024


def row_max(x: Array) -> Array:
    """The largest element of each row, `[..., V] -> [...]`; not differentiable."""
    x = jax.lax.stop_gradient(x)
    # Halves of a row that is split over devices would be sent around; a symbolic length has none.
    if rules.current_mesh() is not None or is_portable():
        return x.max(axis=-1)
    return jax.lax.platform_dependent(x, cpu=_halving_max, default=lambda x: x.max(axis=-1))


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """The `k` largest elements of each row and their int32 places, `[..., k]` each, as `jax.lax.top_k`."""
    if not is_portable():
        return jax.lax.top_k(x, k)
    # StableHLO has no such operation, and the composite that JAX writes for it is too new for many readers.
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    _, value, index = jax.lax.sort((-x, x, place), num_keys=1, is_stable=True)
    return value[..., :k], index[..., :k]


def is_first_highest(x: Array, index: Array, value: Array, peak: Array) -> Array:
    """Whether `argmax(x) == index`, bool `[...]`.

    Args:
      x: `[..., V]`.
      index: int `[...]`, the element asked for.
      value: `[...]`, that element.
      peak: `[...]`, `row_max(x)`.
    """
    if rules.current_mesh() is not None:
        return jnp.argmax(x, axis=-1) == index
    before = jax.lax.broadcasted_iota(index.dtype, x.shape, x.ndim - 1) < index[..., None]
    # The largest of those before it decides between equals. Two maxima are far cheaper than an argmax on CPU.
    return (value >= peak) & (row_max(jnp.where(before, x, -jnp.inf)) < value)


def row_sum(x: Array) -> Array:
    """The float32 sum of each row, `[..., V] -> [...]`."""
    ones = jnp.ones(x.shape[-1], x.dtype)
    return jnp.einsum("...v,v->...", x, ones, preferred_element_type=jnp.float32)


def norm(tree: Any) -> Array:
    """The 2-norm of all the tree's elements together, a float32 scalar."""
    return jnp.sqrt(sum((_sum_of_squares(leaf) for leaf in jax.tree.leaves(tree)), start=jnp.zeros(())))


def _sum_of_squares(x: Array) -> Array:
    x = x.astype(jnp.float32)
    if rules.current_mesh() is not None or x.size < 2 * _BLOCK:  # blocks of a sharded array would be sent around
        return jnp.sum(jnp.square(x))
    return jax.lax.platform_dependent(x, cpu=_blocked_squares, default=lambda x: jnp.sum(jnp.square(x)))


def _blocked_squares(x: Array) -> Array:
    flat = x.reshape(-1)
    whole = flat.size // _BLOCK * _BLOCK

    def add(sums: Array, block: Array) -> tuple[Array, None]:
        return sums + jnp.square(block), None

    sums = jax.lax.scan(add, jnp.zeros(_BLOCK), flat[:whole].reshape(-1, _BLOCK))[0]
    return jnp.sum(sums) + jnp.sum(jnp.square(flat[whole:]))


def _halving_max(x: Array) -> Array:
    while x.shape[-1] > _VECTOR:
        half = -(-x.shape[-1] // 2)
        # The halves of an odd row overlap, which a maximum does not mind.
        x = jnp.maximum(x[..., :half], x[..., x.shape[-1] - half :])
    return x.max(axis=-1)
