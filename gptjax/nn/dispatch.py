"""Sending tokens to experts and back, on one device or split over a mesh.

Two ways. *Dropless*: assignments are sorted by expert and each projection is one grouped
product, so every token reaches all its experts (MegaBlocks, arXiv:2211.15841). *Capacity*:
each expert has a buffer of fixed size a row, filled in order of position, and what does not
fit is dropped (GShard, arXiv:2006.16668).

Over a mesh both run per device on its own tokens. Where the mesh axes of `experts` also split
the batch, dropless gathers the tokens of that axis and scatters back the sums, capacity
exchanges buffers all-to-all. The hidden dimension of an expert may be split as well; its
partial sums are added at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.kernels.grouped import place
from gptjax.nn.config import MoEConfig
from gptjax.nn.linear import AnyKernel, einsum, grouped
from gptjax.nn.low_rank import Factors
from gptjax.nn.mlp import activate
from gptjax.nn.quantized import QuantizedArray
from gptjax.parallel import rules
from gptjax.parallel.mesh import is_portable, platform
from gptjax.types import Array

Weights = Mapping[str, tuple[AnyKernel, Array | None]]
"""`up`, `down` and, where gated, `gate`: kernel `[E, in, out]` and bias `[E, out]` or None."""


def capacity(cfg: MoEConfig, seq_len: int) -> int:
    """Tokens that one expert takes from a row of `seq_len`."""
    assert cfg.capacity_factor is not None, "dropless layers have no capacity"
    return math.ceil(cfg.capacity_factor * seq_len * cfg.num_experts_per_token / cfg.num_experts)


def slots(index_BTA: Array, num_experts: int) -> Array:
    """`[B, T, A]`: how many assignments of the row, in order of position, its expert had before."""
    batch, length, active = index_BTA.shape
    flat = index_BTA.reshape(batch, length * active)
    order = jnp.argsort(flat, axis=1, stable=True)
    ranked = jnp.take_along_axis(flat, order, axis=1)
    first = jax.vmap(lambda row: jnp.searchsorted(row, jnp.arange(num_experts)))(ranked)
    rank = jnp.arange(length * active) - jnp.take_along_axis(first, ranked, axis=1)
    inverse = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(rank, inverse, axis=1).reshape(index_BTA.shape)


def apply_experts(cfg: MoEConfig, x_BTD: Array, index_BTA: Array, weight_BTA: Array, weights: Weights) -> Array:
    """`sum_a weight[a] * expert[index[a]](x)`, `[B, T, D]`.

    Args:
      cfg: `capacity_factor` chooses the way; see the module's description.
      x_BTD: tokens.
      index_BTA: int32 experts of each token.
      weight_BTA: float32 weight of each.
      weights: the experts' projections.
    """
    if is_portable():
        return _portable(cfg, x_BTD, index_BTA, weight_BTA, weights)
    local = _dropless if cfg.capacity_factor is None else _capacity
    mesh = rules.current_mesh()
    if mesh is None:
        return local(cfg, _Axes(), x_BTD, index_BTA, weight_BTA, weights)
    # Capacity counts within whole rows, so there the sequence is not split.
    length = "act_length" if cfg.capacity_factor is None else None
    tokens = rules.fitted_spec(mesh, ("act_batch", length, None), x_BTD.shape)
    specs = {name: _weight_specs(mesh, name, kernel, bias) for name, (kernel, bias) in weights.items()}
    experts, _, hidden = rules.fitted_spec(mesh, _UP, weights["up"][0].shape)
    run = jax.shard_map(
        functools.partial(local, cfg, _Axes.of(mesh, tokens[0], experts, hidden)),
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, specs),
        out_specs=tokens,
        check_vma=False,
    )
    return run(x_BTD, index_BTA, weight_BTA, weights)


def _portable(cfg: MoEConfig, x_BTD: Array, index_BTA: Array, weight_BTA: Array, weights: Weights) -> Array:
    """Grouped products where a platform has a kernel for them; on CPU they would hold all rows once an expert."""
    if cfg.capacity_factor is not None:
        raise ValueError(
            f"capacity_factor={cfg.capacity_factor}: a capacity is counted over the tokens of a call, whose number a "
            "portable program does not know; lay the model out by infer.layout.for_decoding, which has none"
        )
    operands = x_BTD, index_BTA, weight_BTA, weights
    dense = functools.partial(_dense, cfg)
    if platform() == "plain":
        return dense(*operands)
    return jax.lax.platform_dependent(*operands, cpu=dense, default=functools.partial(_dropless, cfg, _Axes()))


_UP, _DOWN = ("experts", None, "mlp"), ("experts", "mlp", None)


def _weight_specs(mesh: Mesh, name: str, kernel: AnyKernel, bias: Array | None) -> tuple[Any, Any]:
    """The partitions of a projection's kernel and bias; an axis that does not divide a dimension leaves it whole."""
    names = _DOWN if name == "down" else _UP
    kernel_spec = _kernel_specs(mesh, names, kernel)
    return kernel_spec, None if bias is None else rules.fitted_spec(mesh, (names[0], names[2]), bias.shape)


def _kernel_specs(mesh: Mesh, names: tuple[str | None, ...], kernel: AnyKernel) -> Any:
    expert, ins, outs = names
    if isinstance(kernel, Factors):
        reduce = _kernel_specs(mesh, (expert, ins, None), kernel.reduce)
        return dataclasses.replace(
            kernel, reduce=reduce, expand=_kernel_specs(mesh, (expert, None, outs), kernel.expand)
        )
    stored = (expert, outs, ins) if isinstance(kernel, QuantizedArray) else names  # rows of outputs
    return jax.tree.map(lambda array: rules.fitted_spec(mesh, stored, array.shape), kernel)


class _Axes(NamedTuple):
    """How a manual region's mesh splits the experts.

    Attributes:
      experts: mesh axes that split experts, with their sizes.
      exchange: those of them that split the batch too.
      select: those that split experts alone; every device along them has the same tokens.
      hidden: axes that split the hidden dimension of each expert.
    """

    experts: tuple[tuple[str, int], ...] = ()
    exchange: tuple[str, ...] = ()
    select: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    @classmethod
    def of(cls, mesh: Mesh, *entries: Any) -> _Axes:
        """From the entries of batch, experts and hidden dimension in their partitions."""
        batch, experts, hidden = (
            [axis for axis in ((entry,) if isinstance(entry, str) else entry or ()) if mesh.shape[axis] > 1]
            for entry in entries
        )
        return cls(
            experts=tuple((axis, mesh.shape[axis]) for axis in experts),
            exchange=tuple(axis for axis in experts if axis in batch),
            select=tuple(axis for axis in experts if axis not in batch),
            hidden=tuple(hidden),
        )

    def first_expert(self, num_local: int) -> Array | int:
        """The first expert of this device."""
        return _position(self.experts) * num_local

    def first_selected(self, num_local: int) -> Array | int:
        """The same among the experts of the devices that have the same tokens."""
        return _position([(axis, size) for axis, size in self.experts if axis in self.select]) * num_local


def _position(axes: Iterable[tuple[str, int]]) -> Array | int:
    position: Array | int = 0
    for axis, size in axes:
        position = position * size + jax.lax.axis_index(axis)
    return position


def _dropless(cfg: MoEConfig, axes: _Axes, x: Array, index: Array, weight: Array, weights: Weights) -> Array:
    for axis in axes.exchange:
        x, index, weight = (jax.lax.all_gather(v, axis, axis=0, tiled=True) for v in (x, index, weight))
    num_local, (active, d_model) = weights["up"][0].shape[0], (index.shape[-1], x.shape[-1])
    expert_M = index.reshape(-1) - axes.first_expert(num_local)
    mine_M = (expert_M >= 0) & (expert_M < num_local)
    # Assignments to experts elsewhere sort behind all groups, where the product gives zeros.
    expert_M = jnp.where(mine_M, expert_M, num_local)
    rows = _Rows(expert_M, num_local)
    rows_RD = _gather(x.reshape(-1, d_model), rows, active)

    def project(name: str, x_RD: Array) -> Array:
        kernel, bias = weights[name]
        y = grouped(x_RD, kernel, rows.groups)
        if bias is None:
            return y
        bias_RF = _once(bias.astype(y.dtype)[rows.expert_R], axes.hidden if name == "down" else ())
        return rows.unused_are_zero(y + bias_RF)

    gate = project("gate", rows_RD) if "gate" in weights else None
    out_RD = project("down", activate(cfg.activation, project("up", rows_RD), gate))
    share_MA = jnp.where(mine_M.reshape(-1, active), weight.reshape(-1, active), 0.0)
    y = _combine(out_RD, rows, share_MA.astype(x.dtype)).reshape(x.shape)
    y = jax.lax.psum(y, axes.select + axes.hidden) if axes.select + axes.hidden else y
    for axis in reversed(axes.exchange):
        y = jax.lax.psum_scatter(y, axis, scatter_dimension=0, tiled=True)
    return y


def _dense(cfg: MoEConfig, x_BTD: Array, index_BTA: Array, weight_BTA: Array, weights: Weights) -> Array:
    """Every expert on every token, weighted by 0 where it was not chosen: nothing is sorted or of unknown size."""

    def add(y_BTD: Array, expert: tuple[Array, Weights]) -> tuple[Array, None]:
        number, own = expert

        def project(name: str, spec: str, x: Array) -> Array:
            kernel, bias = own[name]
            y = einsum(spec, x, kernel)
            return y if bias is None else y + bias.astype(y.dtype)

        gate = project("gate", "BTD,DF->BTF", x_BTD) if "gate" in own else None
        hidden_BTF = activate(cfg.activation, project("up", "BTD,DF->BTF", x_BTD), gate)
        share_BT1 = jnp.sum(jnp.where(index_BTA == number, weight_BTA, 0.0), axis=-1, keepdims=True)
        return y_BTD + share_BT1 * project("down", "BTF,FD->BTD", hidden_BTF), None

    experts = jnp.arange(cfg.num_experts, dtype=index_BTA.dtype), dict(weights)
    return jax.lax.scan(add, jnp.zeros(x_BTD.shape, jnp.float32), experts)[0].astype(x_BTD.dtype)


def _once(bias: Array, axes: tuple[str, ...]) -> Array:
    """`bias` on the first device along `axes` and zero on the others, so that a sum adds it once."""
    for axis in axes:
        bias = jnp.where(jax.lax.axis_index(axis) == 0, bias, 0)
    return bias


class _Rows:
    """The rows in which assignments go to experts.

    Attributes:
      source_R: the assignment of each row.
      used_R: whether the row has one, None if all have.
      row_M: the row of each assignment.
      expert_R: a local expert for each row, for what is looked up per expert.
    """

    def __init__(self, expert_M: Array, num_experts: int):
        order_M = jnp.argsort(expert_M, stable=True)
        sizes_E = jnp.bincount(expert_M, length=num_experts + 1)[:num_experts].astype(jnp.int32)
        num_rows, self.groups = place(sizes_E, expert_M.shape[0])
        if self.groups.is_even is None:
            self.source_R, self.row_M, self.used_R = order_M, jnp.argsort(order_M), None
            self.expert_R = jnp.minimum(expert_M[order_M], num_experts - 1)
            return
        starts_E, row_R = self.groups.starts_E, jnp.arange(num_rows)
        self.expert_R = jnp.minimum(
            jnp.searchsorted(starts_E + sizes_E, row_R, side="right", method="compare_all"), num_experts - 1
        )
        rank_R = row_R - starts_E[self.expert_R]
        self.used_R = (rank_R >= 0) & (rank_R < sizes_E[self.expert_R])
        sorted_E = jnp.cumsum(sizes_E) - sizes_E
        self.source_R = jnp.where(self.used_R, order_M[sorted_E[self.expert_R] + rank_R], 0)
        self.row_M = jnp.argsort(order_M) + (starts_E - sorted_E)[expert_M]

    def unused_are_zero(self, x_RD: Array) -> Array:
        return x_RD if self.used_R is None else jnp.where(self.used_R[:, None], x_RD, 0)


def _gather(x_ND: Array, rows: _Rows, active: int) -> Array:
    """The token of each row's assignment; there are `active` a token."""
    return rows.unused_are_zero(_take(x_ND, rows.source_R, rows.row_M, active))


# The transpose of a gather is a scatter-add, slow on every backend. The transpose of a permutation is
# another gather, so both moves state their gradients.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _take(x_ND: Array, source_R: Array, row_M: Array, active: int) -> Array:
    return x_ND[source_R // active]


_take.defvjp(
    lambda x_ND, source_R, row_M, active: (x_ND[source_R // active], row_M),
    lambda active, row_M, g_RD: (g_RD[row_M].reshape(-1, active, g_RD.shape[-1]).sum(1), None, None),
)


def _combine(out_RD: Array, rows: _Rows, share_NA: Array) -> Array:
    """`y[n] = sum_a share[n, a] * out[row[n, a]]`."""
    own_MD = _return(out_RD, rows.row_M, rows.source_R, rows.used_R)
    own_NAD = own_MD.reshape(*share_NA.shape, -1)
    # Rows past all groups are unspecified where the product is a device's own kernel.
    own_NAD = jnp.where(share_NA[..., None] == 0, 0, own_NAD)
    return jnp.einsum("NAD,NA->ND", own_NAD, share_NA)


@jax.custom_vjp
def _return(x_RD: Array, row_M: Array, source_R: Array, used_R: Array | None) -> Array:
    return x_RD[row_M]


def _return_backward(residuals: tuple, g_MD: Array) -> tuple:
    source_R, used_R = residuals
    g_RD = g_MD[source_R]
    return g_RD if used_R is None else jnp.where(used_R[:, None], g_RD, 0), None, None, None


_return.defvjp(lambda x_RD, row_M, source_R, used_R: (x_RD[row_M], (source_R, used_R)), _return_backward)


def _capacity(cfg: MoEConfig, axes: _Axes, x: Array, index: Array, weight: Array, weights: Weights) -> Array:
    batch, length, d_model = x.shape
    size = capacity(cfg, length)
    slot_BTA = slots(index, cfg.num_experts)
    row = jnp.arange(batch)[:, None, None]
    token_BTA = jnp.broadcast_to(jnp.arange(length)[None, :, None], index.shape)
    # Slots past the capacity are outside the table, so the write drops them.
    table_BEC = jnp.full((batch, cfg.num_experts, size), length, jnp.int32)
    table_BEC = table_BEC.at[row, index, slot_BTA].set(token_BTA, mode="drop")
    padded = jnp.concatenate([x, jnp.zeros((batch, 1, d_model), x.dtype)], axis=1)
    sent_BECD = padded[row, table_BEC]
    for axis in axes.exchange:
        sent_BECD = jax.lax.all_to_all(sent_BECD, axis, split_axis=1, concat_axis=0, tiled=True)
    num_local = weights["up"][0].shape[0]
    first = axes.first_selected(num_local)
    if axes.select:
        sent_BECD = jax.lax.dynamic_slice_in_dim(sent_BECD, first, num_local, axis=1)

    def project(name: str, spec: str, rows: Array) -> Array:
        kernel, bias = weights[name]
        y = einsum(spec, rows, kernel)
        if bias is None:
            return y
        return y + _once(bias.astype(y.dtype)[None, :, None], axes.hidden if name == "down" else ())

    gate = project("gate", "BECD,EDF->BECF", sent_BECD) if "gate" in weights else None
    hidden = activate(cfg.activation, project("up", "BECD,EDF->BECF", sent_BECD), gate)
    back_BECD = project("down", "BECF,EFD->BECD", hidden)
    back_BECD = jax.lax.psum(back_BECD, axes.hidden) if axes.hidden else back_BECD
    for axis in reversed(axes.select):
        back_BECD = jax.lax.all_gather(back_BECD, axis, axis=1, tiled=True)
    for axis in reversed(axes.exchange):
        back_BECD = jax.lax.all_to_all(back_BECD, axis, split_axis=0, concat_axis=1, tiled=True)
    kept = jnp.where(slot_BTA < size, weight, 0.0).astype(x.dtype)
    taken_BTAD = back_BECD[row, index, jnp.minimum(slot_BTA, size - 1)]
    return jnp.einsum("BTAD,BTA->BTD", taken_BTAD, kept)
