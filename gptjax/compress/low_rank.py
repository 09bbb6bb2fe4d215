"""Kernels in two factors that keep what a kernel does to the inputs that it really gets.

With `H = sum x x'` over the calibration text, the factors of rank r that keep the outputs best,
`min |(W - W') X|`, are the first r principal components of the outputs:

    W' = U_r U_r' W,      U S^2 U' = W H W',      |(W - W') X|^2 = sum of the other S^2.

`S` are the singular values of `W L` with `L L' = H`, the kernel whitened by the Cholesky factor of the Hessian; `U_r`
are its left singular vectors, so `L` need not be inverted, and a singular Hessian needs no damping. Without text H is
the identity, and this is the truncated SVD of the kernel.

Sources: Wang et al. 2024 (SVD-LLM), arXiv:2403.07378, section 3.2; Yuan et al. 2023 (ASVD), arXiv:2312.05821.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.compress import calibrate
from gptjax.compress.calibrate import Inputs, Site
from gptjax.compress.share import Line
from gptjax.nn import low_rank, storage, transformer
from gptjax.nn.config import ModelConfig
from gptjax.nn.formats import RankRule
from gptjax.nn.quantized import Layout
from gptjax.types import Array, Params


class Result(NamedTuple):
    """A model with kernels in two factors.

    Attributes:
      errors: by kernel, squared error of the outputs on the calibration text, as a part of their square, the mean of
        all layers.
    """

    model: ModelConfig
    params: Params
    lines: tuple[Line, ...]
    errors: Mapping[str, float]


def ranks_of_size(cfg: ModelConfig, size: float, *, leave: str | None = None) -> dict[str, int]:
    """Ranks, by kernel, with which factors have the part `size` of the kernel's parameters.

    Args:
      leave: regular expression of the paths of kernels that stay whole.

    Returns:
      Ranks that groups of numbers in few bits divide, unless they are small; so factors are a little smaller.

    Raises:
      ValueError: for a size that is not between 0 and 1.
    """
    storage.check_whole_floats(cfg, wanted="factorise")
    if not 0.0 < size < 1.0:
        raise ValueError(f"rank={size:g}: expected above 0 and below 1, the part of a kernel's parameters that stays")
    found = {}
    for path, layout in _kernels(cfg, leave).items():
        inputs, outputs = layout.num_inputs, math.prod(layout.out_shape)
        most = low_rank.largest_rank(layout)
        if most:
            rank = max(1, min(int(size * inputs * outputs / (inputs + outputs)), most))
            found[path] = rank - rank % _step(rank)
    return found


def _step(rank: int) -> int:
    """What a rank is made a multiple of, so that groups of few bits divide it; an eighth of it at most is lost."""
    return next((step for step in (32, 16, 8, 4, 2) if rank >= 8 * step), 1)


def ranks_of_energy(
    cfg: ModelConfig, params: Params, batches: Sequence[Array], energy: float, *, leave: str | None = None
) -> dict[str, int]:
    """The smallest ranks, by kernel, that keep the part `energy` of the outputs' square, in the mean over its layers.

    Kernels whose factors would be no smaller have none.

    Raises:
      ValueError: for a part that is not between 0 and 1.
    """
    storage.check_whole_floats(cfg, wanted="factorise")
    if not 0.0 < energy < 1.0:
        raise ValueError(f"energy={energy:g}: expected above 0 and below 1, the part of the outputs' square that stays")
    kernels, found = _kernels(cfg, leave), dict[str, list[np.ndarray]]()

    def look(site: Site, kernel: Array, inputs: Inputs) -> Array:
        if site.path in kernels:
            rows, hessian = _flat(site.layout, kernel, inputs)
            parts = np.asarray(_components(rows, hessian)[0]).reshape(-1, min(rows.shape[-2:]))
            found.setdefault(site.path, []).extend(parts / np.maximum(parts.sum(-1, keepdims=True), 1e-30))
        return kernel

    calibrate.walk(storage.with_float_kernels(cfg), params, batches, look, sequence="none")
    ranks = {path: int(np.searchsorted(np.cumsum(np.mean(s, axis=0)), energy)) + 1 for path, s in found.items()}
    return {path: rank for path, rank in ranks.items() if rank <= low_rank.largest_rank(kernels[path])}


def factorise(
    cfg: ModelConfig,
    params: Params,
    batches: Sequence[Array],
    ranks: Mapping[str, int],
    *,
    sequence: calibrate.Sequence_ = "stage",
    told: Callable[[int], None] = lambda layer: None,
) -> Result:
    """The model with the kernels of `ranks` in two factors.

    Args:
      batches: calibration tokens `[B, T]` each, all of one shape; none for the SVD of kernels alone.
      sequence, told: see `calibrate.walk`.

    Raises:
      ValueError: for a model in few bits or in factors already, a rank that does not fit, or no rank at all.
    """
    storage.check_whole_floats(cfg, wanted="factorise")
    if not ranks:
        raise ValueError("no kernel is left whose factors would be smaller than the kernel")
    layouts, errors = transformer.layouts(cfg), dict[str, list[float]]()
    for path, rank in ranks.items():
        low_rank.check(rank, layouts[path], path=path)

    def treat(site: Site, kernel: Array, inputs: Inputs) -> Any:
        if site.path not in ranks:
            return kernel
        rows, hessian = _flat(site.layout, kernel, inputs)
        factors, error = _factors(rows, hessian, ranks[site.path])
        errors.setdefault(site.path, []).append(float(error.mean()))
        return _as_kernels(site.layout, kernel, factors)

    plain = storage.with_float_kernels(cfg)  # kernels that training rounds are floats
    if batches:
        done = calibrate.walk(plain, params, batches, treat, sequence=sequence, told=told)
    else:
        done = _by_weights(params, layouts, ranks)
    made = dataclasses.replace(cfg, low_rank=rules(ranks, can=_kernels(cfg, None)))
    wanted: Any = transformer.abstract_params(dataclasses.replace(made, quant=None))
    assert jax.tree.map(jnp.shape, done) == jax.tree.map(jnp.shape, wanted), "every rule is met"
    means = {path: sum(found) / len(found) for path, found in errors.items()}
    return Result(made, done, tuple(_lines(params, layouts, ranks, means)), means)


def rules(ranks: Mapping[str, int], *, can: Mapping[str, Layout]) -> tuple[RankRule, ...]:
    """Rules that give each kernel its rank, one for all kernels of a name where those agree."""
    by_name: dict[str, dict[str, int | None]] = {}
    for path in can:
        by_name.setdefault("/".join(path.split("/")[2:]), {})[path] = ranks.get(path)
    found = []
    for name, own in by_name.items():
        if len(set(own.values())) == 1:
            own = {f"/{name}": next(iter(own.values()))}
        found += [RankRule(pattern=f"{re.escape(path)}$", rank=rank) for path, rank in own.items() if rank is not None]
    return tuple(found)


def _kernels(cfg: ModelConfig, leave: str | None) -> dict[str, Layout]:
    found = {path: layout for path, layout in transformer.layouts(cfg).items() if low_rank.can_be_factored(path)}
    left = set() if leave is None else {path for path in found if re.search(leave, path)}
    if leave is not None and not left:
        raise ValueError(f"leave={leave!r}: no kernel has this in its path; there are {', '.join(sorted(found))}")
    return {path: layout for path, layout in found.items() if path not in left}


def _flat(layout: Layout, kernel: Array, inputs: Inputs) -> tuple[Array, Array]:
    """Rows `[*experts, outputs, inputs]` and their Hessian; experts that no token reached are judged by weights."""
    rows = layout.to_rows(kernel.astype(jnp.float32))
    hessian = inputs.hessian
    seen = jnp.diagonal(hessian, axis1=-2, axis2=-1).any(-1)[..., None, None]
    return rows.reshape(*hessian.shape[:-2], -1, rows.shape[-1]), jnp.where(seen, hessian, jnp.eye(hessian.shape[-1]))


@jax.jit
def _components(rows: Array, hessian: Array) -> tuple[Array, Array]:
    """The squares `[*experts, num]` of the outputs along their principal components, largest first, and those.

    There are as many as inputs or outputs, whichever are fewer: more outputs are first reduced to what a basis of the
    kernel's columns says of them, so that rounding cannot mix directions into the components that no input leads to.
    """
    basis = None
    if rows.shape[-2] > rows.shape[-1]:
        basis, rows = jnp.linalg.qr(rows)
    product = functools.partial(jnp.matmul, precision="highest")
    values, vectors = jnp.linalg.eigh(product(product(rows, hessian), jnp.swapaxes(rows, -1, -2)))
    vectors = vectors if basis is None else product(basis, vectors)
    return jnp.maximum(values[..., ::-1], 0.0), vectors[..., ::-1]


@functools.partial(jax.jit, static_argnames="rank")
def _factors(rows: Array, hessian: Array, rank: int) -> tuple[tuple[Array, Array], Array]:
    """`(U_r' W, U_r)`, and the part of the outputs' square that is lost."""
    values, vectors = _components(rows, hessian)
    kept = vectors[..., :rank]
    reduce = jnp.einsum("...or,...oi->...ri", kept, rows, precision="highest")
    total = values.sum(-1)
    return (reduce, kept), values[..., rank:].sum(-1) / jnp.where(total == 0, 1, total)


def _as_kernels(layout: Layout, kernel: Array, factors: tuple[Array, Array]) -> dict[str, Array]:
    reduce, expand = factors
    lead, rank = kernel.shape[: kernel.ndim - len(layout.in_shape) - len(layout.out_shape)], expand.shape[-1]
    expand = expand.reshape(*lead, *layout.out_shape, rank)
    return {
        "reduce": Layout(layout.in_shape, (rank,)).from_rows(reduce.reshape(*lead, rank, -1)).astype(kernel.dtype),
        "expand": Layout((rank,), layout.out_shape).from_rows(expand).astype(kernel.dtype),
    }


def _by_weights(params: Params, layouts: Mapping[str, Layout], ranks: Mapping[str, int]) -> Params:
    def leaf(path: tuple, kernel: Any) -> Any:
        name = storage.name(path)
        if name not in ranks:
            return kernel
        layout = layouts[name]
        rows = layout.to_rows(kernel.astype(jnp.float32))
        lead = kernel.shape[: kernel.ndim - len(layout.in_shape) - len(layout.out_shape)]
        flat = rows.reshape(*lead, -1, rows.shape[-1])
        factors, _ = _factors(flat, jnp.eye(flat.shape[-1]), ranks[name])
        return _as_kernels(layout, kernel, factors)

    return jax.tree_util.tree_map_with_path(leaf, params)


def _lines(
    params: Params, layouts: Mapping[str, Layout], ranks: Mapping[str, int], errors: Mapping[str, float]
) -> list[Line]:
    found = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path, size = storage.name(key_path), math.prod(leaf.shape)
        if path not in ranks:
            found.append(Line(path, f"left: {_why_left(path)}", size, size))
            continue
        layout, rank = layouts[path], ranks[path]
        inputs, outputs = layout.num_inputs, math.prod(layout.out_shape)
        error = f", output error {errors[path]:.2%}" if path in errors else ""
        found.append(Line(path, f"rank {rank}{error}", size, size // (inputs * outputs) * rank * (inputs + outputs)))
    return found


def _why_left(path: str) -> str:
    if not path.endswith("/kernel") or path.startswith(("embed/", "head/")):
        return "not a layer's kernel"
    if not low_rank.can_be_factored(path):
        return "router: decides by small differences" if "/router/" in path else "latent attention's, used both ways"
    return "asked to, or factors would be no smaller"
