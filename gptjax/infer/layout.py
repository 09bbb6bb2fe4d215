"""Parameters laid out for decoding: every layer's weights apart, in the compute dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from gptjax.nn.config import LayerGroup, ModelConfig
from gptjax.types import Params


def unstack(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model with one group a layer.

    A stacked kernel is sliced before every product, and a product with one row of activations
    does no more work than that copy: apart, each weight is read once a token.
    """
    groups: list[LayerGroup] = []
    out: dict[str, Any] = {name: value for name, value in params.items() if not name.startswith("group_")}
    for i, group in enumerate(cfg.groups):
        stacked = params[f"group_{i}"]
        repeats = [group] if group.shared else [dataclasses.replace(group, repeats=1)] * group.repeats
        for layer, single in enumerate(repeats):
            weights = stacked if group.shared else _layer(stacked, layer)
            out[f"group_{len(groups)}"] = weights
            groups.append(single)
    return dataclasses.replace(cfg, groups=tuple(groups)), out


def _layer(stacked: Mapping[str, Any], layer: int) -> Mapping[str, Any]:
    return jax.tree.map(lambda leaf: leaf[layer : layer + 1], stacked)
