"""Muon: momentum whose every matrix is replaced by the nearest orthogonal one.

    m_t = beta m_{t-1} + (1 - beta) g_t
    n_t = beta m_t + (1 - beta) g_t                       (Nesterov)
    u_t = scale * NS(n_t),     NS(U S V^T) ~ U V^T

`NS` is Newton-Schulz: X <- a X + (b A + c A^2) X with A = X X^T, on X = n / |n|_F, five
times with (a, b, c) = (3.4445, -4.7750, 2.0315). It leaves singular values in about 0.7 to
1.2 rather than at 1, which does no harm and converges in five products.

Sources: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; scale from Liu et
al. 2025, arXiv:2502.16982 section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.optim.groups import MatrixLayout, path_of
from gptjax.types import Array, Params

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5

Scale = Literal["match_rms", "spectral"]
"""`match_rms`: 0.2 * sqrt(max(rows, columns)), the RMS of AdamW's update, so that both share one learning
rate and weight decay (arXiv:2502.16982, eq. 4). `spectral`: sqrt(max(1, columns / rows)), Jordan's."""


class MuonState(NamedTuple):
    """`mu` is the momentum, like the parameters, in float32."""

    mu: Params


def scale_by_muon(
    layouts: Mapping[str, MatrixLayout], *, momentum: float = 0.95, scale: Scale = "match_rms", nesterov: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Orthogonalized momentum, ascending: the caller multiplies by minus the learning rate.

    As in `optim.adam`, a step that `keep` is false for leaves the momentum alone.

    Args:
      layouts: by parameter path; layers and experts of one array are independent matrices.
    """

    def init(params: Params) -> MuonState:
        return MuonState(mu=jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params))

    def update(
        grads: Params, state: MuonState, params: Params | None = None, *, keep: Array, **extra: Any
    ) -> tuple[Params, MuonState]:
        del params, extra
        mu = jax.tree.map(lambda m, g: jnp.where(keep, momentum * m + (1.0 - momentum) * g, m), state.mu, grads)
        direction = jax.tree.map(lambda m, g: momentum * m + (1.0 - momentum) * g, mu, grads) if nesterov else mu

        def orthogonal(key_path: tuple[Any, ...], x: Array) -> Array:
            matrices = as_matrices(x, layouts[path_of(key_path)])
            factor = _scale(scale, rows=matrices.shape[-2], columns=matrices.shape[-1])
            return (factor * orthogonalize(matrices)).reshape(x.shape)

        return jax.tree_util.tree_map_with_path(orthogonal, direction), MuonState(mu)

    return optax.GradientTransformationExtraArgs(init, update)


def as_matrices(x: Array, layout: MatrixLayout) -> Array:
    """The array as `[*batch, rows, columns]`; rows are inputs, columns outputs.

    The batch axes stay as they are: merged with layers, experts that are spread over devices would
    have to be gathered.
    """
    split = layout.num_batch_axes + layout.num_input_axes
    rows = math.prod(x.shape[layout.num_batch_axes : split])
    return x.reshape(*x.shape[: layout.num_batch_axes], rows, math.prod(x.shape[split:]))


def orthogonalize(x: Array) -> Array:
    """Newton-Schulz on each matrix of `[..., rows, columns]`; float32 in and out.

    Products are in bfloat16, which is enough for an approximate orthogonalization, but on
    CPU, where bfloat16 is slower, in float32.
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
    x = x / (norm + 1e-8)
    # NS(X^T) = NS(X)^T: the Gram matrix is on the shorter side.
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -2, -1) if tall else x
    x = jax.lax.platform_dependent(x, cpu=_newton_schulz_cpu, default=_newton_schulz_bf16)
    return jnp.swapaxes(x, -2, -1) if tall else x


def _newton_schulz(x: Array) -> Array:
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def _newton_schulz_gram(x: Array) -> Array:
    """The same on the short side alone: X_k = Q_k X with Q_k a polynomial of the first Gram matrix.

    Per iteration P = a + b A + c A^2, Q <- Q P and A <- P A P, which commute. That is 17 products of
    short sides and two with X in place of five with the long side twice. It needs float32, in
    which it differs by about 1e-5; bfloat16 would lose the small singular values in A.
    """
    a, b, c = COEFFICIENTS
    gram, identity = x @ x.T, jnp.eye(x.shape[0], dtype=x.dtype)
    product = identity
    for iteration in range(NUM_ITERATIONS):
        poly = a * identity + b * gram + c * (gram @ gram)
        product = product @ poly if iteration else poly
        if iteration < NUM_ITERATIONS - 1:
            gram = gram @ poly @ poly
    return product @ x


def _newton_schulz_cpu(x: Array) -> Array:
    # One matrix at a time is as fast as a batched product here, and its intermediates stay in cache.
    *batch, rows, columns = x.shape
    one = _newton_schulz_gram if columns >= 2 * rows else _newton_schulz
    return jax.lax.map(one, x.reshape(math.prod(batch), rows, columns)).reshape(x.shape)


def _newton_schulz_bf16(x: Array) -> Array:
    return _newton_schulz(x.astype(jnp.bfloat16)).astype(jnp.float32)


def _scale(scale: Scale, *, rows: int, columns: int) -> float:
    if scale == "match_rms":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, columns / rows))
