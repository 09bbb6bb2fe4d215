"""Adam's direction, with moments that a skipped step leaves alone.

    m_t = b1 m_{t-1} + (1 - b1) g_t,     v_t = b2 v_{t-1} + (1 - b2) g_t^2
    u_t = m_t / (1 - b1^t) / (sqrt(v_t / (1 - b2^t)) + eps)

`optax.scale_by_adam` does the same, but there the choice between old and new moments comes after the direction
was made of the new ones, so XLA:CPU computes the new ones twice and copies the old ones. A direction made of
what is kept takes half the time.

Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.types import Array, Params

_EPS = 1e-8


def scale_by_adam(b1: float, b2: float) -> optax.GradientTransformationExtraArgs:
    """The direction above, ascending; moments are float32, and `keep` comes from `optim.guard`."""

    def init(params: Params) -> optax.ScaleByAdamState:
        def zeros() -> Params:
            return jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)

        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=zeros(), nu=zeros())

    def update(
        grads: Params,
        state: optax.ScaleByAdamState,
        params: Params | None = None,
        *,
        keep: Array,
        **extra: Any,
    ) -> tuple[Params, optax.ScaleByAdamState]:
        del params, extra
        count = state.count + keep
        mu = jax.tree.map(lambda m, g: jnp.where(keep, b1 * m + (1.0 - b1) * g, m), state.mu, grads)
        nu = jax.tree.map(lambda v, g: jnp.where(keep, b2 * v + (1.0 - b2) * jnp.square(g), v), state.nu, grads)
        # A run whose every step was skipped has no moments yet; its update is skipped too, and must only be finite.
        num = jnp.maximum(count, 1).astype(jnp.float32)
        per_m, per_v = 1.0 / (1.0 - b1**num), 1.0 / (1.0 - b2**num)
        direction = jax.tree.map(lambda m, v: (m * per_m) / (jnp.sqrt(v * per_v) + _EPS), mu, nu)
        return direction, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
