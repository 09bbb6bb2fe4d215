"""Comparing what happens inside of student and teacher: their hidden states, and what attends to what.

Hidden states go through projections where the widths differ. For a pair of layers, with `s` the student's residual
stream, `t` the teacher's and `P` a projection that is learnt (the identity where the widths agree), a position's loss
is the relative error

    |s P - t|^2 / |t|^2

and the pairs are averaged. Relative, because the norm of a residual stream grows with the layers, and a few
positions have a hundred times that of the others.

Attention is compared by relations: for queries, keys and values each, the vectors of all heads of a position are one,
cut anew into `A` parts of size `d`, and with `x` these,

    R = softmax(x x^T / sqrt(d)) over what the position may attend,      KL(teacher's R || student's R)

averaged over parts and the three kinds. The models' numbers and sizes of heads do not matter, and the values are
taught, which the distribution of attention says nothing of.

Source: FitNets (arXiv:1412.6550), section 2.2, for hints through a regressor; TinyBERT (arXiv:1909.10351), section
3.1, for layer maps; MiniLMv2 (arXiv:2012.15828), section 3.1, for relations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gptjax.kernels import cross_entropy
from gptjax.kernels.attention import allowed
from gptjax.nn.config import ModelConfig
from gptjax.nn.transformer import LayerValues
from gptjax.parallel import rules
from gptjax.train.task import Companions
from gptjax.types import Array, Batch, Params

LayerMap = tuple[tuple[int, int], ...]
NAME = "distill_projections"
_NEVER = -1e30


def layer_map(student: ModelConfig, teacher: ModelConfig, wanted: LayerMap = (), *, key: str) -> LayerMap:
    """Pairs of a student's layer and a teacher's, from 1.

    Args:
      wanted: is checked and returned; without any, layer `i` of `n` is compared with the teacher's nearest to the
        same part of its depth.
      key: of the config, for the errors.

    Raises:
      ValueError: for a layer that there is not, or a student's layer given twice.
    """
    num, theirs = student.num_layers, teacher.num_layers
    if not wanted:
        return tuple((i, max(1, round(i * theirs / num))) for i in range(1, num + 1))
    for mine, other in wanted:
        if not (1 <= mine <= num and 1 <= other <= theirs):
            raise ValueError(
                f"{key}: ({mine}, {other}): expected a layer of the student, 1 to {num}, and one of the "
                f"teacher, 1 to {theirs}"
            )
    if len({mine for mine, _ in wanted}) < len(wanted):
        raise ValueError(f"{key}={wanted}: expected each layer of the student once")
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
    projections: Params,
    layers: LayerMap,
    student: Sequence[LayerValues],
    teacher: Sequence[LayerValues],
    mask_BT: Array,
) -> Array:
    """The relative error above, averaged over pairs and summed over targets."""
    total = jnp.zeros(mask_BT.shape, jnp.float32)
    for mine, other in layers:
        s, t = (of[i - 1].x_BTD.astype(jnp.float32) for of, i in ((student, mine), (teacher, other)))
        if projections:
            s = s @ projections[f"layer_{mine}"]
        total += jnp.sum((s - t) ** 2, axis=-1) / jnp.maximum(jnp.sum(t**2, axis=-1), 1e-12)
    return jnp.sum(mask_BT * total) / len(layers)


def attention_loss(
    layers: LayerMap, student: Sequence[LayerValues], teacher: Sequence[LayerValues], batch: Batch
) -> Array:
    """The divergence of relations above, averaged over pairs and summed over targets.

    The relations of one chunk of positions with all others exist at a time.
    """
    total = jnp.zeros((), jnp.float32)
    for mine, other in layers:
        pairs = tuple(zip(student[mine - 1][1:], teacher[other - 1][1:], strict=True))
        num_parts = num_relations(student[mine - 1], teacher[other - 1])
        for s, t in pairs:
            total += _relation_loss(_parts(s, num_parts), _parts(t, num_parts), batch)
    return total / (3 * len(layers))


def num_relations(student: LayerValues, teacher: LayerValues) -> int:
    """Into how many parts all of them can be cut: as many as the teacher has heads, or the next smaller number."""
    common = math.gcd(*(x.shape[2] * x.shape[3] for values in (student, teacher) for x in values[1:]))
    return next(n for n in range(teacher.queries.shape[2], 0, -1) if common % n == 0)


def _parts(x_BTNH: Array, num: int) -> Array:
    return x_BTNH.reshape(*x_BTNH.shape[:2], num, -1).astype(jnp.float32)


def _relation_loss(s_BTAH: Array, t_BTAH: Array, batch: Batch) -> Array:
    length, num_parts = s_BTAH.shape[1:3]
    mesh = rules.current_mesh()
    num_rows = s_BTAH.shape[0] // (1 if mesh is None else rules.axis_size(mesh, "act_batch"))
    num_chunks = cross_entropy.pick_num_chunks(num_rows=num_rows * num_parts, seq_len=length, vocab_size=length)

    def log_relations(queries: Array, keys: Array, mask_BTS: Array) -> Array:
        scores = jnp.einsum("BTAH,BSAH->BATS", queries, keys) * queries.shape[-1] ** -0.5
        # Finite, as padding may attend nothing, and must not make NaN.
        return jax.nn.log_softmax(jnp.where(mask_BTS[:, None], scores, _NEVER), axis=-1)

    # Otherwise the backward pass would keep the relations of all chunks.
    @jax.checkpoint
    def of_chunk(chunk: tuple[Array, ...]) -> Array:
        s, t, mask_BT, positions, segments = chunk
        mask_BTS = allowed(
            positions,
            batch.positions,
            q_segments_BT=segments,
            kv_segments_BS=batch.segment_ids,
            causal=True,
            window=None,
        )
        log_p = log_relations(t, t_BTAH, mask_BTS)
        log_q = log_relations(s, s_BTAH, mask_BTS)
        log_ratio = jnp.where(mask_BTS[:, None], log_p - log_q, 0.0)
        return jnp.sum(mask_BT * jnp.sum(jnp.exp(log_p) * log_ratio, axis=(1, 3))) / num_parts

    chunks = (s_BTAH, t_BTAH, batch.loss_mask, batch.positions, batch.segment_ids)
    split = functools.partial(cross_entropy.split, num_chunks=num_chunks)
    return jnp.sum(jax.lax.map(of_chunk, jax.tree.map(split, chunks)))
