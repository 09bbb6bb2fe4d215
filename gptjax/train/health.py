"""Noticing that a run no longer trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.optim.groups import path_of

MAX_CONSECUTIVE_SKIPS = 20
# Products of a few such numbers exceed float32's 3e38.
_TOO_LARGE = 1e15
_ADVICE = (
    "Nothing was saved since; earlier checkpoints are as they were. A lower learning rate, a longer warmup or a "
    "guard against spikes may help."
)


class DivergedError(ValueError):
    """Training cannot go on; the newest checkpoint is from before it went wrong."""


class Health:
    """Checks each step's `loss`, `grad_norm`, `param_norm` and, from the optimizer's guard, `skipped`.

    A step that the guard skipped changed nothing, so a few in a row are survived.

    Attributes:
      num_doubtful: steps since the last finite one. Until another one is finite it is open whether the
        batches are bad or the parameters, which may be finite and too large to compute with.
    """

    def __init__(self, *, max_skips: int = MAX_CONSECUTIVE_SKIPS) -> None:
        self._max_skips = max_skips
        self._skips = 0
        self.num_doubtful = 0

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Raises:
        DivergedError: on a non-finite first step, on a non-finite step that was applied, on parameters
          that are not finite, and after `max_skips` skipped steps in a row.
        """
        figures = {name: values[name] for name in ("loss", "grad_norm", "param_norm") if name in values}
        finite = all(math.isfinite(value) for name, value in figures.items() if name != "param_norm")
        skipped = values.get("skipped", 0.0) > 0
        self._skips = self._skips + 1 if skipped else 0
        self.num_doubtful = 0 if finite else self.num_doubtful + 1
        seen = ", ".join(f"{name}={value:g}" for name, value in figures.items())
        if not finite and step == 1:
            raise DivergedError(
                f"step 1: {seen}, before any update. Nothing was saved; check the model's "
                f"configuration and initialisation, the dtype, and the starting parameters."
            )
        if not math.isfinite(figures.get("param_norm", 0.0)) or not (finite or skipped):
            raise DivergedError(f"step {step}: {seen}, so the parameters are lost. {_ADVICE}")
        if self._skips >= self._max_skips:
            raise DivergedError(
                f"step {step}: the last {self._skips} steps were all skipped as non-finite or spiking ({seen}). "
                + _ADVICE
            )

    def check_end(self, step: int) -> None:
        """Raises:
        DivergedError: if the run would end with parameters that two or more batches could not be computed with.
        """
        if self.num_doubtful > 1:
            raise DivergedError(
                f"step {step}, the last: neither it nor the {self.num_doubtful - 1} before were finite. {_ADVICE}"
            )


def describe(params: Any) -> str:
    """One sentence on which parameters are not finite or too large: where to look first."""
    sizes = jax.device_get(jax.jit(lambda tree: jax.tree.map(lambda x: jnp.max(jnp.abs(x), initial=0.0), tree))(params))
    leaves = [(path_of(path), float(size)) for path, size in jax.tree_util.tree_leaves_with_path(sizes)]
    broken = [path for path, size in leaves if not math.isfinite(size)]
    if not broken:
        path, size = max(leaves, key=lambda leaf: leaf[1], default=("", 0.0))
        if size > _TOO_LARGE:
            return f"All parameters are finite, but {path} is as large as {size:.0e}."
        return "All parameters are finite, so it arises in the forward or the backward pass."
    shown = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
    return f"Not finite are the parameters {shown}."
