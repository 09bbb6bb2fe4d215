"""Training with zeros in kernels: those that are there stay, and more are made on the way.

`keep_zeros` is all that recovery after pruning needs. The masks are the parameters' own zeros, so there is no state to
save or to shard; a given mask is kept by multiplying the parameters with it once. A weight that a sum happens to make
exactly 0 is lost too, which is rarer than one in 2^20 of those near 0 and step.

`prune_gradually` removes the smallest weights of every kernel, up to the fraction

    s(t) = s_final (1 - (1 - p)^3),     p = (t - first_step) / (last_step - first_step)

at step t, every so many steps: fast while there are many to choose from, slowly at the end.

Source: Zhu & Gupta 2017, arXiv:1710.01878, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.optim import sparsity as sparsity_lib
from gptjax.optim.groups import MatrixLayout, Treatment, path_of
from gptjax.types import Array, Params

LEAST_PRUNED = 0.01
"""Of the kernels' weights, above which a model has been pruned."""


@dataclass(frozen=True, kw_only=True)
class GradualConfig:
    """Magnitude pruning during training: `--config.optim.prune='{"sparsity": 0.5, "first_step": 0, "last_step": 800}'`.

    Attributes:
      sparsity: at the end; see `optim.sparsity.parse`.
      first_step, last_step: between which weights are removed; the steps after are for recovery.
      every_steps: how often.
    """

    sparsity: float | str
    first_step: int
    last_step: int
    every_steps: int = 10

    def __post_init__(self) -> None:
        sparsity_lib.parse(self.sparsity)
        if not 0 <= self.first_step < self.last_step:
            raise ValueError(
                f"first_step={self.first_step}, last_step={self.last_step}: expected 0 <= first_step < last_step"
            )
        if self.every_steps < 1:
            raise ValueError(f"every_steps={self.every_steps}: expected at least 1")


def pruned_layouts(treatments: Mapping[str, Treatment]) -> dict[str, MatrixLayout]:
    """Of the kernels whose zeros are looked after, by path: trained matrices but routers, embeddings and the head."""
    return {
        path: t.layout
        for path, t in treatments.items()
        if t.kind == "matrix" and t.layout is not None and not t.freeze and "/router/" not in path
    }


def part_of_kernels(params: Params) -> float:
    """Which part of the weights of all layers' kernels is exactly 0."""
    leaves = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if _is_kernel(path_of(path))]
    parts = jax.jit(lambda kernels: [jnp.mean(kernel == 0) for kernel in kernels])(leaves)
    sizes = [leaf.size for leaf in leaves]
    return sum(float(part) * size for part, size in zip(parts, sizes, strict=True)) / max(1, sum(sizes))


def _is_kernel(path: str) -> bool:
    is_left = path.startswith("head/") or "/router/" in path
    return path.endswith(("/kernel", "/kernel/reduce", "/kernel/expand")) and not is_left


def keep_zeros(
    inner: optax.GradientTransformation, *, kept_fn: Callable[[str], bool]
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner`, which then neither sees the gradients of parameters that are 0 nor moves them.

    Args:
      kept_fn: of a parameter's path; the zeros of the others are parameters like any.
    """
    wrapped = optax.with_extra_args_support(inner)

    def masked(tree: Params, params: Params) -> Params:
        def leaf(key_path: tuple[Any, ...], x: Array, p: Array) -> Array:
            return jnp.where(p == 0, jnp.zeros_like(x), x) if kept_fn(path_of(key_path)) else x

        return jax.tree_util.tree_map_with_path(leaf, tree, params)

    def update(grads: Params, state: Any, params: Params, **extra: Any) -> tuple[Params, Any]:
        updates, state = wrapped.update(masked(grads, params), state, params, **extra)
        return masked(updates, params), state

    return optax.GradientTransformationExtraArgs(wrapped.init, update)


def prune_gradually(
    cfg: GradualConfig, layouts: Mapping[str, MatrixLayout], shapes: Mapping[str, tuple[int, ...]]
) -> optax.GradientTransformationExtraArgs:
    """The last part of a chain: turns updates of weights that are to go into their negatives. Needs `keep_zeros`.

    After `last_step` it goes on, which does nothing more unless a step that it was due in was skipped.

    Args:
      layouts: of the kernels that are pruned, by path.
      shapes: of all parameters, by path.

    Raises:
      ValueError: for n:m that does not divide a kernel's inputs.
    """
    sparsity = sparsity_lib.parse(cfg.sparsity)
    for path, layout in layouts.items():
        sparsity_lib.check(sparsity, math.prod(_sides(shapes[path], layout)[1]), path=path)

    def update(
        updates: Params, state: optax.EmptyState, params: Params | None = None, *, step: Array, **extra: Any
    ) -> tuple[Params, optax.EmptyState]:
        del extra
        progress = jnp.clip((step - cfg.first_step) / (cfg.last_step - cfg.first_step), 0.0, 1.0)
        fraction = sparsity.fraction * (1.0 - (1.0 - progress) ** 3)
        due = (step >= cfg.first_step) & ((step - cfg.first_step) % cfg.every_steps == 0) | (step == cfg.last_step)

        def leaf(key_path: tuple[Any, ...], u: Array, p: Array) -> Array:
            layout = layouts.get(path_of(key_path))
            if layout is None:
                return u
            batch, ins, outs = _sides(p.shape, layout)
            rows = jnp.abs(p + u).reshape(*batch, math.prod(ins), math.prod(outs)).swapaxes(-1, -2)
            stay = sparsity_lib.kept(rows, sparsity, scope="kernel", fraction=fraction)
            return jnp.where(stay.swapaxes(-1, -2).reshape(p.shape), u, -p)

        pruned = jax.lax.cond(due, lambda: jax.tree_util.tree_map_with_path(leaf, updates, params), lambda: updates)
        return pruned, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _sides(shape: tuple[int, ...], layout: MatrixLayout) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The dimensions that count kernels, those of inputs and those of outputs."""
    first, end = layout.num_batch_axes, layout.num_batch_axes + layout.num_input_axes
    return shape[:first], shape[first:end], shape[end:]
