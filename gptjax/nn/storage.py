"""Which kernels of a model are stored in few bits: the rules of `QuantConfig` on trees of parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gptjax.nn import quantized
from gptjax.nn.config import ModelConfig
from gptjax.nn.formats import KernelRule, QuantConfig
from gptjax.nn.quantized import Layout, QuantizedArray, RoundedKernel
from gptjax.types import Params

Layouts = Mapping[str, Layout]


def name(path: tuple) -> str:
    """The `/`-joined path of a parameter."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def rule_for(quant: QuantConfig | None, path: str) -> KernelRule | None:
    """The rule of the kernel at `path`; None if it is left as it is."""
    if quant is None:
        return None
    found = next((rule for rule in quant.rules if re.search(rule.pattern, path)), None)
    return None if found is None or (found.weights is None and found.activations == "none") else found


def with_float_kernels(cfg: ModelConfig) -> ModelConfig:
    """The model without its rules for kernels; what keys and values are rounded to stays."""
    kept = None if cfg.kv_cache is None else QuantConfig(kv_cache=cfg.kv_cache)
    return dataclasses.replace(cfg, quant=kept)


def check_whole_floats(cfg: ModelConfig, *, wanted: str) -> None:
    """Raises:
    ValueError: for a model whose kernels are not single arrays of floats; `wanted` is what to do to one that has them.
    """
    found = "in few bits" if cfg.has_stored_kernels else "in two factors" if cfg.low_rank else None
    if found is not None:
        raise ValueError(f"the model's kernels are {found} already: {wanted} the model that they were made from")


def check(quant: QuantConfig, layouts: Layouts) -> None:
    """Whether every rule is of some kernel, and these can have its format.

    Raises:
      ValueError: naming the rule, or the kernel.
    """
    for rule in quant.rules:
        if not any(re.search(rule.pattern, path) for path in layouts):
            raise ValueError(
                f"{rule.pattern!r}: no kernel has this in its path; there are {', '.join(sorted(layouts))}"
            )
    for path, layout in layouts.items():
        own = rule_for(quant, path)
        if own is not None and own.weights is not None:
            quantized.check(own.weights, layout, path=path)


def store(quant: QuantConfig | None, params: Params, layouts: Layouts) -> Params:
    """Float kernels rounded to the nearest of the numbers that they are to be stored in.

    Raises:
      ValueError: naming a kernel that cannot be stored so.
    """

    def stored(path: str, rule: KernelRule, kernel: Any) -> Any:
        assert rule.weights is not None, "stored kernels have a format"
        layout = layouts[path]
        return quantized.quantize(kernel, format=rule.weights, layout=layout, activations=rule.activations)

    return _on_kernels(quant, params, layouts, stored, stage="stored")


def abstract(quant: QuantConfig | None, shapes: Params, layouts: Layouts) -> Params:
    """The shapes of what `store` gives for float kernels of these shapes."""

    def stored(path: str, rule: KernelRule, kernel: Any) -> Any:
        assert rule.weights is not None, "stored kernels have a format"
        quantized.check(rule.weights, layouts[path], path=path)
        return quantized.abstract(kernel.shape, rule.weights, layouts[path], activations=rule.activations)

    return _on_kernels(quant, shapes, layouts, stored, stage="stored")


def as_trained(quant: QuantConfig | None, params: Params, layouts: Layouts) -> Params:
    """Float kernels that every product with them rounds first."""

    def rounded(path: str, rule: KernelRule, kernel: Any) -> Any:
        if rule.weights is not None:
            quantized.check(rule.weights, layouts[path], path=path)
        return RoundedKernel(kernel, layouts[path], rule.weights, rule.activations)

    return _on_kernels(quant, params, layouts, rounded, stage="train")


def axes(quant: QuantConfig | None, names: Params, shapes: Params) -> Params:
    """The logical axes of stored kernels from those of float ones: inputs are one dimension, named by their first."""
    if quant is None or quant.stage != "stored":
        return names
    flat = {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(names, is_leaf=_is_names)}

    def leaf(path: tuple, shape: Any) -> Any:
        own = flat[name(path)]
        if not isinstance(shape, QuantizedArray):
            return own
        num_in, num_out = len(shape.layout.in_shape), len(shape.layout.out_shape)
        lead, rest = own[: len(own) - num_in - num_out], own[len(own) - num_in - num_out :]
        ins = rest[:num_in] if shape.layout.in_first else rest[num_out:]
        outs = rest[num_in:] if shape.layout.in_first else rest[:num_out]
        return jax.tree.map(lambda _: (*lead, *outs, ins[0]), shape)

    return jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=quantized.is_quantized)


def stored_names(params: Params) -> frozenset[str]:
    """The paths of the arrays that kernels in few bits consist of; their dtypes are part of the format."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=quantized.is_quantized)
    parts = (
        name((*path, *part))
        for path, leaf in leaves
        if isinstance(leaf, QuantizedArray)
        for part, _ in jax.tree_util.tree_leaves_with_path(leaf)
    )
    return frozenset(parts)


def _is_names(leaf: Any) -> bool:
    return isinstance(leaf, tuple)


def _on_kernels(
    quant: QuantConfig | None,
    tree: Params,
    layouts: Layouts,
    change: Callable[[str, KernelRule, Any], Any],
    *,
    stage: str,
) -> Params:
    if quant is None or quant.stage != stage:
        return tree

    def leaf(path: tuple, value: Any) -> Any:
        own = name(path)
        rule = rule_for(quant, own) if own in layouts else None
        return value if rule is None else change(own, rule, value)

    return jax.tree_util.tree_map_with_path(leaf, tree)
