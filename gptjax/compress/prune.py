"""Weights of a trained model set to zero, where they matter least.

magnitude   `|w|`, over a whole kernel as in Han et al. 2015 (arXiv:1506.02626) and the baselines of the papers below:
            rows of large weights keep more of them
wanda       `|w| * ||x||` with the norm of the weight's input over the calibration text, in each row (output) alone, as
            outputs differ in scale and must not compete (Sun et al. 2023, arXiv:2306.11695)
sparsegpt   `gptjax.compress.sparsegpt`

n:m is by the same scores in every m consecutive inputs of a row. Kernels of the layers are pruned, experts one by one.
Routers decide by small differences, and the embedding and head are most of what a small model knows of rare words; they
stay, as do norms and biases.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.compress import calibrate, gptq, sensitivity, sparsegpt
from gptjax.compress.calibrate import Inputs, Site
from gptjax.compress.sparsegpt import SparseGPT
from gptjax.nn import quantized, storage, transformer
from gptjax.nn.config import ModelConfig
from gptjax.nn.quantized import Layout
from gptjax.optim import sparsity as sparsity_lib
from gptjax.optim.sparsity import Sparsity
from gptjax.parallel import rules
from gptjax.types import Array, Params

Method = Literal["magnitude", "wanda", "sparsegpt"]


def prune(
    cfg: ModelConfig,
    params: Params,
    batches: Sequence[Array],
    *,
    method: Method,
    sparsity: Sparsity,
    config: SparseGPT | None = None,
    sequence: calibrate.Sequence_ = "stage",
    told: Callable[[int], None] = lambda layer: None,
) -> tuple[ModelConfig, Params]:
    """The model with its layers' kernels pruned.

    Args:
      batches: int32 calibration tokens `[B, T]` each, all of one shape; magnitude takes none.
      config: of sparsegpt.
      sequence, told: see `calibrate.walk`.

    Raises:
      ValueError: for a quantised model, for n:m that does not divide a kernel's inputs, and without text where the
        method needs it.
    """
    check(cfg, sparsity)
    if method == "magnitude":
        return cfg, _by_magnitude(cfg, params, sparsity)
    if not batches:
        raise ValueError(f"method={method}: needs calibration text; give some, or use magnitude")
    config = SparseGPT() if config is None else config
    plain = storage.with_float_kernels(cfg)  # kernels that training rounds are floats
    found = sensitivity.Sensitivity({}, {})
    # Of n:m each group has its own, which competes with no other's.
    if method == "sparsegpt" and config.costs == "loss" and sparsity.group is None and cfg.causal:
        found = sensitivity.measure(plain, params, batches, pruned_layouts(cfg), fraction=sparsity.fraction)

    def treat(site: Site, kernel: Array, inputs: Inputs) -> Array:
        rows = site.layout.to_rows(kernel)
        flat = rows.reshape(*inputs.hessian.shape[:-2], -1, rows.shape[-1])
        if method == "wanda":
            pruned = by_inputs(flat, inputs, sparsity)
        else:
            key = site.path, site.layer
            flat, inputs, weight = rules.on_each_device((flat, inputs, found.outputs.get(key)))
            pruned = _by_hessian(flat, inputs, weight, sparsity, config, found.fractions.get(key))
        return site.layout.from_rows(pruned.reshape(rows.shape))

    against: calibrate.Against = "original" if method == "sparsegpt" and config.aim else "none"
    done = calibrate.walk(plain, params, batches, treat, sequence=sequence, against=against, told=told)
    return cfg, done


def check(cfg: ModelConfig, sparsity: Sparsity) -> None:
    """Raises:
    ValueError: if the model cannot be pruned so.
    """
    if cfg.has_stored_kernels:
        raise ValueError("the model's kernels are in few bits already: prune the model that they were made from")
    for path, layout in pruned_layouts(cfg).items():
        sparsity_lib.check(sparsity, layout.num_inputs, path=path)


def pruned_layouts(cfg: ModelConfig) -> dict[str, Layout]:
    """Of the kernels that are pruned, by path."""
    return {path: layout for path, layout in transformer.layouts(cfg).items() if why_left(path) is None}


def why_left(path: str) -> str | None:
    """Why a parameter is not pruned; None if it is."""
    if path.startswith(("embed/", "head/")):
        return "embeddings and head stay"
    if "/router/" in path:
        return "a router decides by small differences"
    if not path.endswith(("/kernel", "/kernel/reduce", "/kernel/expand")):
        return "not a kernel"
    return None


class Row(NamedTuple):
    """One parameter in the table of what was done; `left` is the reason why nothing was."""

    path: str
    shape: tuple[int, ...]
    zeros: float
    left: str | None


def table(params: Params) -> list[Row]:
    """Every parameter with the fraction of its values that are zero."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=quantized.is_quantized)
    rows = []
    for key_path, leaf in leaves:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        rows.append(Row(path, tuple(leaf.shape), num_zeros(leaf) / max(1, math.prod(leaf.shape)), why_left(path)))
    return rows


def num_zeros(leaf: Any) -> int:
    """Values of a parameter that are exactly 0."""
    values = quantized.dequantize(leaf) if quantized.is_quantized(leaf) else leaf
    return math.prod(leaf.shape) - int(jnp.count_nonzero(values))


def _by_magnitude(cfg: ModelConfig, params: Params, sparsity: Sparsity) -> Params:
    layouts = pruned_layouts(cfg)

    def leaf(key_path: tuple[Any, ...], kernel: Array) -> Array:
        layout = layouts.get(jax.tree_util.keystr(key_path, simple=True, separator="/"))
        return kernel if layout is None else _smallest_removed(kernel, layout, sparsity)

    return jax.tree_util.tree_map_with_path(leaf, params)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _smallest_removed(kernel: Array, layout: Layout, sparsity: Sparsity) -> Array:
    rows = layout.to_rows(kernel)
    lead = kernel.ndim - len(layout.in_shape) - len(layout.out_shape)
    flat = rows.reshape(*kernel.shape[:lead], -1, rows.shape[-1])
    stay = sparsity_lib.kept(jnp.abs(flat), sparsity, scope="kernel")
    return layout.from_rows(jnp.where(stay, flat, 0).reshape(rows.shape))


def by_inputs(rows: Array, inputs: Inputs, sparsity: Sparsity) -> Array:
    """The rows `[*experts, outputs, inputs]` as Wanda prunes them."""
    norm = jnp.sqrt(jnp.diagonal(inputs.hessian, axis1=-2, axis2=-1))
    # An expert that the text never reached is pruned by magnitude.
    norm = jnp.where(norm.any(-1, keepdims=True), norm, 1.0)
    stay = sparsity_lib.kept(jnp.abs(rows) * norm[..., None, :], sparsity, scope="row")
    return jnp.where(stay, rows, 0)


def _by_hessian(
    rows: Array,
    inputs: Inputs,
    weight: Array | None,
    sparsity: Sparsity,
    config: SparseGPT,
    fraction: float | None,
) -> Array:
    if inputs.drift is not None:
        rows = gptq.aimed(rows, inputs.hessian, inputs.drift, strength=config.aim, damping=config.damping)
    return sparsegpt.prune(rows, inputs.hessian, sparsity, config=config, weight=weight, fraction=fraction)
