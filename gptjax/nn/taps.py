"""Seeing what kernels are multiplied with, and their gradients, without a word of it in the modules.

A kernel in `Tapped` is multiplied as it is; its inputs are kept for whoever opened `collect` around the trace. They
must not cross a loop or another transformation on their way, so a model is traced a layer at a time.

A kernel in `Weighed` is one too; its gradient becomes figures where it arises, inside of the loop over layers, so the
gradients of all layers never exist together.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.kernels.grouped import Groups
from gptjax.types import Array

_found: contextvars.ContextVar[dict[str, Seen] | None] = contextvars.ContextVar("taps", default=None)


@flax.struct.dataclass
class Seen:
    """The inputs of one kernel.

    Attributes:
      rows_MI: `[rows, inputs]`.
      x: as they were multiplied; None for experts.
      groups: which rows are of which expert; None where there is one kernel.
    """

    rows_MI: Array
    x: Array | None = None
    groups: Groups | None = None


@flax.struct.dataclass
class Tapped:
    """A kernel whose inputs are seen; stands in a tree of parameters where the kernel would.

    Attributes:
      x: is multiplied with the kernel instead of its inputs, which are then not computed; as it was seen before.
    """

    kernel: Any
    path: str = flax.struct.field(pytree_node=False)
    x: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def ndim(self) -> int:
        return self.kernel.ndim


@contextlib.contextmanager
def collect() -> Iterator[dict[str, Seen]]:
    """What is seen inside, by path."""
    found: dict[str, Seen] = {}
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


def record(tapped: Tapped, seen: Seen) -> None:
    """Called by the products with a kernel, before it is multiplied."""
    found = _found.get()
    assert found is not None, f"{tapped.path}: tapped outside of `collect`"
    assert tapped.path not in found, f"{tapped.path}: multiplied twice in one layer"
    found[tapped.path] = seen


@flax.struct.dataclass
class Weighed:
    """A kernel whose gradient is summed up; stands in a tree of parameters where the kernel would.

    Attributes:
      figures: of what `of` returns, zeros; differentiating with respect to these gives what it returned, and where a
        kernel is used by several layers the sum of it.
      of: `(kernel, its gradient) -> figures`.
    """

    kernel: Array
    figures: Any
    of: Callable[[Array, Array], Any] = flax.struct.field(pytree_node=False)


def plain(leaf: Any) -> Any:
    """What stands in a kernel's place, without `Weighed`."""
    return _weighed(leaf.of, leaf.kernel, leaf.figures) if isinstance(leaf, Weighed) else leaf


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighed(of: Callable[[Array, Array], Any], kernel: Array, figures: Any) -> Array:
    del of, figures
    return kernel


def _weighed_forward(of: Callable[[Array, Array], Any], kernel: Array, figures: Any) -> tuple[Array, Array]:
    del of, figures
    return kernel, kernel


def _weighed_backward(of: Callable[[Array, Array], Any], kernel: Array, gradient: Array) -> tuple[Array, Any]:
    return jnp.zeros_like(kernel), of(kernel, gradient)


_weighed.defvjp(_weighed_forward, _weighed_backward)
