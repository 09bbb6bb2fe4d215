"""Comparing what student and teacher hold after each layer, through projections where their widths differ.

For a pair of layers, with `s` the student's residual stream, `t` the teacher's and `P` a projection that is learnt
(the identity where the widths agree), a position's loss is the relative error

    |s P - t|^2 / |t|^2

and the pairs are averaged. Relative, because the norm of a residual stream grows with the layers, and a few
positions have a hundred times that of the others. Source: FitNets (arXiv:1412.6550), section 2.2, for hints through
a regressor; TinyBERT (arXiv:1909.10351), section 3.1, for layer maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gptjax.nn.config import ModelConfig
from gptjax.train.task import Companions
from gptjax.types import Array, Params

LayerMap = tuple[tuple[int, int], ...]
NAME = "distill_projections"


def layer_map(student: ModelConfig, teacher: ModelConfig, wanted: LayerMap = ()) -> LayerMap:
    """Pairs of a student's layer and a teacher's, from 1.

    Args:
      wanted: is checked and returned; without any, layer `i` of `n` is compared with the teacher's nearest to the
        same part of its depth.

    Raises:
      ValueError: for a layer that there is not, or a student's layer given twice.
    """
    num, theirs = student.num_layers, teacher.num_layers
    if not wanted:
        return tuple((i, max(1, round(i * theirs / num))) for i in range(1, num + 1))
    for mine, other in wanted:
        if not (1 <= mine <= num and 1 <= other <= theirs):
            raise ValueError(
                f"hidden_layers: ({mine}, {other}): expected a layer of the student, 1 to {num}, and one of the "
                f"teacher, 1 to {theirs}"
            )
    if len({mine for mine, _ in wanted}) < len(wanted):
        raise ValueError(f"hidden_layers={wanted}: expected each layer of the student once")
    return wanted


def projections(student: ModelConfig, teacher: ModelConfig, layers: LayerMap) -> Companions:
    """The projections `[student's D, teacher's D]` of a map; none where the widths agree."""
    shape = (student.d_model, teacher.d_model)
    if not layers or shape[0] == shape[1]:
        return Companions()
    names = [f"layer_{mine}" for mine, _ in layers]

    def init_fn(rng: Array) -> Params:
        keys = jax.random.split(rng, len(names))
        drawn = {name: shape[0] ** -0.5 * jax.random.normal(key, shape) for name, key in zip(names, keys, strict=True)}
        return {NAME: drawn}

    return Companions(
        shapes={NAME: {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in names}},
        axes={NAME: {name: ("embed", None) for name in names}},
        init_fn=init_fn,
    )


def apart(params: Params) -> tuple[Params, Params]:
    """The student's parameters, and the projections by layer."""
    return {name: value for name, value in params.items() if name != NAME}, params.get(NAME, {})


def hidden_loss(
    projections: Params, layers: LayerMap, student: Sequence[Array], teacher: Sequence[Array], mask_BT: Array
) -> Array:
    """The loss above, summed over targets.

    Args:
      student, teacher: the residual stream after each layer, `[B, T, D]` with a width of their own.
    """
    total = jnp.zeros(mask_BT.shape, jnp.float32)
    for mine, other in layers:
        s, t = student[mine - 1].astype(jnp.float32), teacher[other - 1].astype(jnp.float32)
        if projections:
            s = s @ projections[f"layer_{mine}"]
        total += jnp.sum((s - t) ** 2, axis=-1) / jnp.maximum(jnp.sum(t**2, axis=-1), 1e-12)
    return jnp.sum(mask_BT * total) / len(layers)
