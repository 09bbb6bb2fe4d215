"""Initial values of parameters.

Every value is normal, drawn by a hash of the seed, the parameter's path and the element's index. So it
depends neither on the mesh, nor on the order of parameters, nor on whether layers are scanned or
unrolled; each device computes its own part; and the compiled program is a few elementwise operations a
parameter, where one call of a cryptographic generator takes half a second to compile on a CPU,
times the number of parameters.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.nn.quantized import Layout
from gptjax.types import Array, Params


@flax.struct.dataclass
class Declared(nn.Partitioned):
    """A parameter's box: its logical axes and the distribution of its initial values.

    Attributes:
      std: standard deviation of the normal distribution around `constant`.
      layout: of a kernel that may be stored in few bits; None for all else.
    """

    std: float = flax.struct.field(default=0.0, pytree_node=False)
    constant: float = flax.struct.field(default=0.0, pytree_node=False)
    layout: Layout | None = flax.struct.field(default=None, pytree_node=False)

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The value; Flax would read the logical names as mesh axes and, under a mesh, fail."""
        del apply_constraint
        return self.value


def declare(
    shape: Sequence[int],
    axes: Sequence[str | None],
    *,
    std: float = 0.0,
    constant: float = 0.0,
    layout: Layout | None = None,
) -> Callable[[Array], Any]:
    """An initializer for `Module.param` that records what `draw` needs."""

    def boxed(_: Array) -> Any:
        value = jnp.full(tuple(shape), constant, jnp.float32)
        return Declared(value, names=tuple(axes), std=std, constant=constant, layout=layout)

    return boxed


def fan_in_std(shape: Sequence[int], in_dims: Sequence[int]) -> float:
    """`1 / sqrt(product of the contracted dimensions)`: outputs as large as inputs (LeCun 1998)."""
    return 1.0 / math.sqrt(math.prod(shape[dim] for dim in in_dims))


EMBEDDING_STD = 0.02
"""Of token and position embeddings and the untied head (GPT-2)."""


def draw(boxes: Any, rng: Array) -> Params:
    """Initial values of a tree of `Declared` boxes, whose own values are only shapes.

    Args:
      boxes: from `jax.eval_shape` of a module's init.
      rng: a JAX key.
    """
    seed = jax.random.key_data(rng).astype(jnp.uint32).reshape(-1)

    def leaf(path: tuple, box: Any) -> Array:
        if box.std == 0.0:
            return jnp.full(box.value.shape, box.constant, jnp.float32)
        name = "/".join(str(key.key) for key in path)
        return box.constant + box.std * normal(box.value.shape, seed, zlib.crc32(name.encode()))

    return jax.tree_util.tree_map_with_path(leaf, boxes, is_leaf=lambda node: isinstance(node, nn.Partitioned))


def normal(shape: Sequence[int], seed: Array, salt: int) -> Array:
    """Standard normal float32 up to 5.3 in size, a function of the seed's words, the salt and the index."""
    # Two counters, since stacked experts can have more than 2 ** 32 elements.
    low = _counter(shape, range(max(len(shape) - 2, 0), len(shape)))
    high = _counter(shape, range(max(len(shape) - 2, 0)))
    bits = _mix(high ^ jnp.uint32(salt))
    for word in seed:
        bits = _mix(bits + word)
    bits = _mix(_mix(bits ^ low) + low)
    # The middles of 2 ** 23 equal parts of -1..1: none is an end, where the inverse is infinite.
    return math.sqrt(2.0) * jax.lax.erf_inv((bits >> 9).astype(jnp.float32) * 2.0**-22 + (2.0**-23 - 1.0))


def _counter(shape: Sequence[int], dims: Sequence[int]) -> Array:
    """The row-major index over `dims`, broadcast to `shape`; wraps at 2 ** 32."""
    count = jnp.zeros(tuple(shape), jnp.uint32)
    for dim in dims:
        count = count * jnp.uint32(shape[dim]) + jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), dim)
    return count


def _mix(x: Array) -> Array:
    """Wellons' `lowbias32`: a bijection of 32-bit words with an avalanche bias of 0.17 (hash-prospector)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
