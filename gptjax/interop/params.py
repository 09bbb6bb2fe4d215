"""The parameters of a source in memory."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint import arrays
from gptjax.interop.source import Source
from gptjax.interop.table import check_names, units
from gptjax.nn import transformer
from gptjax.types import Params


def read(source: Source, *, dtype: np.dtype | None = None) -> Params:
    """Reads every tensor.

    Args:
      dtype: of the parameters; None keeps that of the source, or the widest where layers of one array differ.

    Raises:
      ValueError: naming the tensor that is missing, unknown or of another shape.
    """
    wanted = units(source.family, source.model)
    check_names(source.family, wanted, source.tensors, path=str(source.path))
    shapes = {path: leaf.shape for path, leaf in arrays.flatten(transformer.abstract_params(source.model)).items()}
    dtypes: dict[str, np.dtype] = {}
    for unit in wanted:
        for part in unit.ours:
            own = dtype or source.tensors[unit.theirs].dtype
            dtypes[part.path] = jnp.promote_types(dtypes.get(part.path, own), own)
    whole = {path: np.empty(shape, dtypes[path]) for path, shape in shapes.items()}
    for unit in wanted:
        values = unit.layout.to_ours(source.tensors[unit.theirs].read(), [part.shape for part in unit.ours])
        for part, value in zip(unit.ours, values, strict=True):
            whole[part.path][part.index] = value
    return arrays.nest({path: jnp.asarray(value) for path, value in whole.items()})
