"""A small parameter tree with every kind of parameter that a model has."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

SHAPES = {
    "embed/tokens": ((32, 16), ("vocab", "embed")),
    "group_0/block_0/attention_norm/scale": ((2, 16), ("layers", "embed")),
    "group_0/block_0/attention/query/kernel": ((2, 16, 4, 8), ("layers", "embed", "heads", "head_dim")),
    "group_0/block_0/attention/query/bias": ((2, 4, 8), ("layers", "heads", "head_dim")),
    "group_0/block_0/attention/out/kernel": ((2, 4, 8, 16), ("layers", "heads", "head_dim", "embed")),
    "group_0/block_0/moe/router/kernel": ((2, 16, 4), ("layers", "embed", "experts")),
    "group_0/block_0/moe/experts_up/kernel": ((2, 4, 16, 24), ("layers", "experts", "embed", "mlp")),
    "group_0/block_0/moe/experts_up/bias": ((2, 4, 24), ("layers", "experts", "mlp")),
    "group_0/block_0/moe/balance_bias": ((2, 4), ("layers", "experts")),
    "final_norm/scale": ((16,), ("embed",)),
    "head/kernel": ((32, 16), ("vocab", "embed")),
}


class Model(NamedTuple):
    params: dict[str, Any]
    axes: dict[str, Any]
    grads: dict[str, Any]


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return root


def normals(seed: int) -> dict[str, Any]:
    # From numpy: each shape drawn by JAX would be one more program to compile.
    rng = np.random.default_rng(seed)
    return nest({path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, (shape, _) in SHAPES.items()})


@pytest.fixture
def model() -> Model:
    return Model(normals(0), nest({path: axes for path, (_, axes) in SHAPES.items()}), normals(1))


@pytest.fixture
def abstract(model: Model) -> dict[str, Any]:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), model.params)
