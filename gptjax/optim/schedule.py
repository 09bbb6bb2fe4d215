"""Learning rates as pure functions of the step.

Every schedule has a linear warm-up, `lr(t) = peak * (t + 1) / W` for `t < W`, so that the
first update already moves and the last warm-up step has the peak. After it, with `N`
steps in all and `f = final_scale`:

    constant   peak
    cosine     peak * (f + (1 - f) * (1 + cos(pi * p)) / 2)      p = (t - W) / (N - W)
    linear     peak * (f + (1 - f) * (1 - p))
    wsd        peak * (f + (1 - f) * (1 - c))                    c = max(0, t - (N - C)) / C
    wsd_sqrt   peak * (f + (1 - f) * (1 - sqrt(c)))              C = decay_fraction * N
    rsqrt      peak * sqrt(max(W, 1) / (t + 1)), times wsd's factor

`t` counts from 0, so the last update (`t = N - 1`) is just short of `f * peak` and never
wasted on a rate of zero. From `t = N` on the rate stays at its final value (`rsqrt`
without cool-down goes on falling).

Sources: cosine, arXiv:1608.03983 eq. 5; warm-up, stable, decay, arXiv:2404.06395 section 4
and arXiv:2405.18392 (whose best cool-down is `1 - sqrt`); rsqrt with a linear cool-down,
arXiv:2106.04560 section 3.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from absl import logging

from gptjax.types import Array

Schedule = Callable[[Array | int], Array]
"""Step (int, from 0) to learning rate (float32 scalar)."""

Shape = Literal["constant", "cosine", "linear", "wsd", "wsd_sqrt", "rsqrt"]


def make(
    shape: Shape, peak: float, *, num_steps: int, warmup_steps: int, final_scale: float, decay_fraction: float
) -> Schedule:
    """The schedule of that shape; formulas above.

    Args:
      peak: the highest rate.
      num_steps: `N`, the steps of the whole run.
      warmup_steps: `W`; 0 starts at the peak.
      final_scale: `f`, the final rate over the peak.
      decay_fraction: the part of the run that `wsd`, `wsd_sqrt` and `rsqrt` spend cooling down.

    Raises:
      ValueError: if a number lies outside its range.
    """
    _check(num_steps, warmup_steps, final_scale, decay_fraction, shape)
    decay = _DECAYS[shape]
    span = max(num_steps - warmup_steps, 1)
    cooldown_steps = max(decay_fraction * num_steps, 1.0)

    def schedule(step: Array | int) -> Array:
        t = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, (t + 1) / max(warmup_steps, 1))
        progress = jnp.clip((t - warmup_steps) / span, 0.0, 1.0)
        cooldown = jnp.clip((t - num_steps) / cooldown_steps + 1.0, 0.0, 1.0)
        remaining = decay(progress, cooldown if decay_fraction else jnp.zeros_like(t))
        rate = peak * warmup * (final_scale + (1.0 - final_scale) * remaining)
        if shape == "rsqrt":
            rate = rate * jnp.sqrt(max(warmup_steps, 1) / jnp.maximum(t + 1, max(warmup_steps, 1)))
        return rate

    return schedule


# How much of the way down to the final rate is left: (progress, cooldown) -> 1..0.
_DECAYS: dict[str, Callable[[Array, Array], Array]] = {
    "constant": lambda progress, cooldown: jnp.ones_like(progress),
    "cosine": lambda progress, cooldown: 0.5 * (1.0 + jnp.cos(math.pi * progress)),
    "linear": lambda progress, cooldown: 1.0 - progress,
    "wsd": lambda progress, cooldown: 1.0 - cooldown,
    "wsd_sqrt": lambda progress, cooldown: 1.0 - jnp.sqrt(cooldown),
    "rsqrt": lambda progress, cooldown: 1.0 - cooldown,
}


def _check(num_steps: int, warmup_steps: int, final_scale: float, decay_fraction: float, shape: str) -> None:
    if shape not in _DECAYS:
        raise ValueError(f"schedule: expected one of {', '.join(_DECAYS)}, got {shape!r}")
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: expected at least 1")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps}: expected at least 0")
    if not 0.0 <= final_scale <= 1.0:
        raise ValueError(f"final_lr_scale={final_scale}: expected 0 to 1, the final rate over the peak")
    if not 0.0 <= decay_fraction <= 1.0:
        raise ValueError(f"decay_fraction={decay_fraction}: expected 0 to 1, the part of the run that cools down")
    if shape.startswith("wsd") and decay_fraction == 0.0:
        raise ValueError(f"decay_fraction=0.0: {shape} needs a part of the run to decay in; use 'constant' for none")
    if warmup_steps >= num_steps:
        logging.warning(
            "warmup_steps=%d is not below num_steps=%d: the learning rate stays below its peak.",
            warmup_steps,
            num_steps,
        )
