"""A model laid out for decoding: every layer's weights apart, in the compute dtype; experts without a limit."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from gptjax.nn.config import BlockConfig, LayerGroup, ModelConfig, MoEConfig
from gptjax.nn.linear import compute_dtype
from gptjax.nn.quantized import is_quantized
from gptjax.parallel.mesh import platform
from gptjax.types import Array, Params


def for_decoding(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same model with one group a layer, its products' weights in the compute dtype, and no token dropped.

    Experts take all their tokens: a capacity is counted over the tokens of a call, so what a row drops would
    depend on the length of its neighbours and on how its own tokens are divided into calls.

    A token's time is that of reading the weights. A stacked kernel would be copied out of its
    stack before every product, and a float32 one converted, which costs as much again. What is
    laid out already is returned as it is; the rest is copied once.
    """
    apart = layers_apart(cfg)
    dtype = compute_dtype(cfg.dtype, platform())
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    wrong_dtype = any(leaf.dtype != dtype for path, leaf in leaves if _is_cast(path, leaf))
    if apart == cfg and not wrong_dtype:
        return cfg, params
    return apart, _lay_out(cfg, params)


def layers_apart(cfg: ModelConfig) -> ModelConfig:
    """The config that `for_decoding` returns."""
    return dataclasses.replace(cfg, groups=tuple(single for group in cfg.groups for single in _split(group)))


@functools.partial(jax.jit, static_argnums=0)
def _lay_out(cfg: ModelConfig, params: Params) -> Params:
    dtype = compute_dtype(cfg.dtype, platform())

    def cast(path: tuple, leaf: Any) -> Any:
        return leaf.astype(dtype) if _is_cast(path, leaf) else leaf

    params = jax.tree_util.tree_map_with_path(cast, params, is_leaf=is_quantized)
    out = {name: value for name, value in params.items() if not name.startswith("group_")}
    layers: list[Any] = []
    for i, group in enumerate(cfg.groups):
        weights, singles = params[f"group_{i}"], _split(group)
        if len(singles) == 1:
            layers.append(weights)
        else:
            layers += [jax.tree.map(functools.partial(_layer, index=layer), weights) for layer in range(len(singles))]
    return out | {f"group_{i}": weights for i, weights in enumerate(layers)}


def _split(group: LayerGroup) -> list[LayerGroup]:
    """A group for each repeat; layers that share one set of weights stay together."""
    group = dataclasses.replace(group, pattern=tuple(map(_dropless, group.pattern)))
    if group.shared or group.repeats == 1:
        return [group]
    return [dataclasses.replace(group, repeats=1)] * group.repeats


def dropless(cfg: ModelConfig) -> ModelConfig:
    """The same model with no limit to the tokens of an expert, as it decodes."""
    groups = (dataclasses.replace(group, pattern=tuple(map(_dropless, group.pattern))) for group in cfg.groups)
    return dataclasses.replace(cfg, groups=tuple(groups))


def _dropless(block: BlockConfig) -> BlockConfig:
    if not isinstance(block.mlp, MoEConfig) or block.mlp.capacity_factor is None:
        return block
    return dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, capacity_factor=None))


def _layer(stacked: Array, *, index: int) -> Array:
    return stacked[index : index + 1]


def _is_cast(path: tuple, leaf: Any) -> bool:
    """Float weights that products or look-ups convert to the compute dtype anyway; routers compute in float32."""
    keys = [entry.key for entry in path]
    is_weight = "kernel" in keys or keys[-1] in ("tokens", "positions")
    return not is_quantized(leaf) and is_weight and "router" not in keys
