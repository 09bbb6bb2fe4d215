"""Noticing that a run no longer trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.optim.groups import path_of

MAX_CONSECUTIVE_SKIPS = 20


class DivergedError(ValueError):
    """Training cannot go on; the newest checkpoint is from before it went wrong."""


class Health:
    """Checks each step's `loss`, `grad_norm` and, from the optimizer's guard, `skipped`.

    A step that the guard skipped changed nothing, so a few in a row are survived.
    """

    def __init__(self, *, max_skips: int = MAX_CONSECUTIVE_SKIPS) -> None:
        self._max_skips = max_skips
        self._skips = 0

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Raises:
        DivergedError: on a non-finite first step, on a non-finite step that was applied, and after
          `max_skips` skipped steps in a row.
        """
        figures = {name: values[name] for name in ("loss", "grad_norm") if name in values}
        finite = all(map(math.isfinite, figures.values()))
        skipped = values.get("skipped", 0.0) > 0
        self._skips = self._skips + 1 if skipped else 0
        seen = ", ".join(f"{name}={value:g}" for name, value in figures.items())
        if not finite and step == 1:
            raise DivergedError(
                f"step 1: {seen}, before any update. Nothing was saved; check the model's "
                f"configuration and initialisation, the dtype, and the starting parameters."
            )
        if not finite and not skipped:
            raise DivergedError(
                f"step {step}: {seen}, and the update was applied, so the parameters are lost. Nothing was saved "
                f"since; resume from the last checkpoint with a lower learning rate or with the guard on."
            )
        if self._skips >= self._max_skips:
            raise DivergedError(
                f"step {step}: the last {self._skips} steps were all skipped as non-finite or spiking ({seen}). "
                f"Nothing was saved since; resume from the last checkpoint with a lower learning rate or other data."
            )


def describe(params: Any) -> str:
    """One sentence on which parameters are not finite: where to look first."""
    finite = jax.device_get(jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))(params))
    leaves = jax.tree_util.tree_leaves_with_path(finite)
    broken = [path_of(path) for path, is_finite in leaves if not is_finite]
    if not broken:
        return "All parameters are finite, so it arises in the forward or the backward pass."
    shown = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
    return f"Not finite are the parameters {shown}."
