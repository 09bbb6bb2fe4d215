"""Adafactor's direction: a second moment kept as row and column means of each matrix.

    d_t = min(b2, 1 - (t + 1)^-0.8)
    R_t = d_t R_{t-1} + (1 - d_t) mean_columns(g^2 + 1e-30),     C_t likewise over rows
    v   = R C / mean(R),     u = g / sqrt(v),     u <- u / max(1, rms(u))

The learning rate is absolute (no multiplication by the parameter's own scale), as for the
other optimizers. Vectors, and matrices with a side under `MIN_FACTORED`, keep all of `v`.

Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithm 4, with b2 capped as by Zhai et
al. 2021, arXiv:2106.04560, section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.optim.groups import MatrixLayout, path_of
from gptjax.types import Array, Params

MIN_FACTORED = 128


class AdafactorState(NamedTuple):
    """Second moments, each under the parameters' own paths.

    Attributes:
      num_updates: int32 scalar.
      rows, columns: shaped like the parameter less the averaged axes; `optax.MaskedNode`
        where not factored.
      full: shaped like the parameter; `optax.MaskedNode` where factored.
    """

    num_updates: Array
    rows: Params
    columns: Params
    full: Params


def scale_by_adafactor(layouts: Mapping[str, MatrixLayout | None], *, b2: float) -> optax.GradientTransformation:
    """The direction above, ascending; layers and experts of one array are independent.

    Args:
      layouts: by parameter path; None marks a vector.
    """

    def init(params: Params) -> AdafactorState:
        def start(axes_of: Any) -> Params:
            return jax.tree_util.tree_map_with_path(
                lambda path, p: _zeros(p, axes_of(layouts[path_of(path)], p)), params
            )

        return AdafactorState(jnp.zeros((), jnp.int32), start(_output_axes), start(_input_axes), start(_no_axes))

    def update(grads: Params, state: AdafactorState, params: Params | None = None) -> tuple[Params, AdafactorState]:
        del params
        decay = jnp.minimum(b2, 1.0 - (state.num_updates + 1.0) ** -0.8)

        def moment(axes_of: Any, old: Params) -> Params:
            def step(key_path: tuple[Any, ...], g: Array, old: Any) -> Any:
                axes = axes_of(layouts[path_of(key_path)], g)
                if axes is None:
                    return optax.MaskedNode()
                return decay * old + (1.0 - decay) * jnp.mean(jnp.square(g) + 1e-30, axis=axes)

            return jax.tree_util.tree_map_with_path(step, grads, old)

        rows = moment(_output_axes, state.rows)
        columns = moment(_input_axes, state.columns)
        full = moment(_no_axes, state.full)

        def direction(key_path: tuple[Any, ...], g: Array, row: Any, column: Any, v: Any) -> Array:
            layout = layouts[path_of(key_path)]
            inputs, outputs = _input_axes(layout, g), _output_axes(layout, g)
            if inputs is None or outputs is None:
                u = g * jax.lax.rsqrt(v)
            else:
                row = row / jnp.mean(row, axis=inputs, keepdims=True)
                u = g * jax.lax.rsqrt(jnp.expand_dims(row, outputs)) * jax.lax.rsqrt(jnp.expand_dims(column, inputs))
            return u / jnp.maximum(1.0, _rms(u, layout))

        updates = jax.tree_util.tree_map_with_path(direction, grads, rows, columns, full)
        return updates, AdafactorState(state.num_updates + 1, rows, columns, full)

    return optax.GradientTransformation(init, update)


def _is_factored(layout: MatrixLayout | None, p: Array) -> bool:
    if layout is None:
        return False
    split = layout.num_batch_axes + layout.num_input_axes
    return min(math.prod(p.shape[layout.num_batch_axes : split]), math.prod(p.shape[split:])) >= MIN_FACTORED


def _input_axes(layout: MatrixLayout | None, p: Array) -> tuple[int, ...] | None:
    """The axes that `columns` averages over; None where the parameter is not factored."""
    if layout is None or not _is_factored(layout, p):
        return None
    return tuple(range(layout.num_batch_axes, layout.num_batch_axes + layout.num_input_axes))


def _output_axes(layout: MatrixLayout | None, p: Array) -> tuple[int, ...] | None:
    if layout is None or not _is_factored(layout, p):
        return None
    return tuple(range(layout.num_batch_axes + layout.num_input_axes, p.ndim))


def _no_axes(layout: MatrixLayout | None, p: Array) -> tuple[int, ...] | None:
    return None if _is_factored(layout, p) else ()


def _zeros(p: Array, averaged_axes: tuple[int, ...] | None) -> Any:
    if averaged_axes is None:
        return optax.MaskedNode()
    return jnp.zeros([size for i, size in enumerate(p.shape) if i not in averaged_axes], jnp.float32)


def _rms(u: Array, layout: MatrixLayout | None) -> Array:
    batch = layout.num_batch_axes if layout else 0
    return jnp.sqrt(jnp.mean(jnp.square(u), axis=tuple(range(batch, u.ndim)), keepdims=True))
