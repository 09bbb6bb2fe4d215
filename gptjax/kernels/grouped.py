"""Matrix products of rows grouped by expert: the core of a dropless mixture of experts."""

from __future__ import annotations

import jax

from gptjax.types import Array


def grouped_matmul(x_MD: Array, w_EDF: Array, group_sizes_E: Array) -> Array:
    """Multiplies each row by the weight of its expert.

    Args:
      x_MD: rows sorted by expert.
      w_EDF: one matrix per expert.
      group_sizes_E: int32 rows of each expert, in order; rows past their sum give zeros.

    Returns:
      `[M, F]`.
    """
    return jax.lax.ragged_dot(x_MD, w_EDF, group_sizes_E)
