"""Through a model a layer at a time, with what each kernel is multiplied with.

A method sees one kernel with a summary of its inputs, and gives back what is to stand in its place. Layers come in the
order of execution, and each is given what the layers before it make as they have become, so that a method works on
the errors that are really there (sequential calibration). In memory are the hidden states of the calibration rows, one
layer, and the summaries of one stage of it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.kernels.grouped import Groups, grouped_matmul
from gptjax.nn import quantized, taps, transformer
from gptjax.nn.block import Block, Stream
from gptjax.nn.config import BlockConfig, LayerGroup, ModelConfig
from gptjax.nn.quantized import Layout
from gptjax.nn.taps import Seen, Tapped
from gptjax.parallel import rules
from gptjax.types import Array, Params

Sequence_ = Literal["stage", "layer", "none"]

# What is multiplied with the outputs of the kernels of the stage before.
_STAGES = (
    ("attention/query", "attention/key", "attention/value", "attention/query_down", "attention/kv_down"),
    ("attention/query_up", "attention/key_up", "attention/value_up"),
    ("attention/out",),
    ("mlp/gate", "mlp/up", "moe/experts_gate", "moe/experts_up", "moe/shared/gate", "moe/shared/up"),
    ("mlp/down", "moe/experts_down", "moe/shared/down"),
)


@flax.struct.dataclass
class Inputs:
    """Of a kernel's inputs `x`, over all rows of the calibration text; experts have a leading dimension.

    Attributes:
      hessian: `sum x x'`, float32 `[I, I]`: half the second derivative of the squared error of an output.
      abs_sum, abs_max: `sum |x|` and `max |x|`, `[I]`.
      count: number of rows.
    """

    hessian: Array
    abs_sum: Array
    abs_max: Array
    count: Array


class Site(NamedTuple):
    """A kernel to be treated.

    Attributes:
      path: in the model's parameters.
      layer: number of the (first) layer that has it.
      layout: of a single kernel; experts are stacked before it.
    """

    path: str
    layer: int
    layout: Layout


Treat = Callable[[Site, Array, Inputs], Any]
"""`(site, float kernel, inputs) -> what stands in its place`, an array or a `QuantizedArray`."""

Prepare = Callable[[BlockConfig, Params, Mapping[str, Inputs]], Params]
"""Changes a layer's parameters without changing what it computes, before its kernels are treated."""


def walk(
    cfg: ModelConfig,
    params: Params,
    batches: Sequence[Array],
    treat: Treat,
    *,
    sequence: Sequence_ = "stage",
    prepare: Prepare | None = None,
    clip: float | None = None,
    told: Callable[[int], None] = lambda layer: None,
) -> Params:
    """The parameters with every kernel of the layers but routers treated.

    Args:
      cfg: of float parameters.
      batches: int32 tokens `[B, T]` each, all of one shape.
      sequence: what a kernel's inputs come from: `stage`, all before it as treated; `layer`, all layers before it as
        treated; `none`, the model as it was.
      clip: rows longer than this many times the median row count as if they were that long: a few tokens (attention
        sinks) are otherwise most of a Hessian.
      told: called with the number of layers that are done.

    Raises:
      ValueError: for inputs that are not finite.
    """
    assert cfg.quant is None, "kernels are floats before they are treated"
    xs = [_embed(cfg, params, tokens) for tokens in batches]
    walker = _Walker(cfg, treat, sequence, prepare, clip)
    out, layer = dict(params), 0
    for i, group in enumerate(cfg.groups):
        name = f"group_{i}"
        if group.shared:
            out[name], xs = walker.shared_group(name, group, params[name], xs, layer)
            layer += group.num_layers
            told(layer)
            continue
        repeats = []
        for repeat in range(group.repeats):
            own = jax.tree.map(operator.itemgetter(repeat), params[name])
            done = {}
            for j, block in enumerate(group.pattern):
                done[f"block_{j}"], xs = walker.layer(f"{name}/block_{j}", block, own[f"block_{j}"], xs, layer)
                layer += 1
                told(layer)
            repeats.append(done)
        out[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *repeats)
    return out


class _Walker(NamedTuple):
    cfg: ModelConfig
    treat: Treat
    sequence: Sequence_
    prepare: Prepare | None
    clip: float | None

    def layer(
        self, prefix: str, block: BlockConfig, weights: Params, xs: list[Stream], layer: int
    ) -> tuple[Params, list[Stream]]:
        if self.prepare is not None:
            weights = self.prepare(block, weights, self.inputs(block, _kernels(weights), weights, xs))
        before = weights
        stages = _stages(weights) if self.sequence == "stage" else [_kernels(weights)]
        for stage in stages:
            found = self.inputs(block, stage, weights, xs)
            for path in stage:
                site = Site(f"{prefix}/{path}", layer, self.layout(f"{prefix}/{path}"))
                weights = replaced(weights, path, self.treat(site, at(weights, path), found[path]))
        passed = before if self.sequence == "none" else weights
        return weights, [_run(self.cfg, block, (), passed, x, self.clip)[0] for x in xs]

    def shared_group(
        self, name: str, group: LayerGroup, weights: Params, xs: list[Stream], layer: int
    ) -> tuple[Params, list[Stream]]:
        """Layers with one set of weights: a kernel's inputs are those of all its uses, before any is treated."""
        found: dict[str, Inputs] = {}
        states = xs
        for _ in range(group.repeats):
            for j, block in enumerate(group.pattern):
                own = weights[f"block_{j}"]
                for path, inputs in self.inputs(block, _kernels(own), own, states).items():
                    key = f"block_{j}/{path}"
                    found[key] = _add(found[key], inputs) if key in found else inputs
                states = [_run(self.cfg, block, (), own, x, self.clip)[0] for x in states]
        if self.prepare is not None:
            raise ValueError(f"{name}: layers that share weights cannot be prepared; choose a method without scaling")
        treated = weights
        for path, inputs in found.items():
            site = Site(f"{name}/{path}", layer + int(path[6 : path.index("/")]), self.layout(f"{name}/{path}"))
            treated = replaced(treated, path, self.treat(site, at(treated, path), inputs))
        if self.sequence == "none":
            return treated, states
        for _ in range(group.repeats):
            for j, block in enumerate(group.pattern):
                xs = [_run(self.cfg, block, (), treated[f"block_{j}"], x, self.clip)[0] for x in xs]
        return treated, xs

    def inputs(self, block: BlockConfig, paths: Sequence[str], weights: Params, xs: list[Stream]) -> dict[str, Inputs]:
        total: dict[str, Inputs] | None = None
        for x in xs:
            found = _look(self.cfg, block, tuple(paths), weights, x, self.clip)
            total = found if total is None else {path: _add(total[path], found[path]) for path in total}
        assert total is not None, "calibration has rows"
        for path, inputs in total.items():
            if not bool(jnp.isfinite(inputs.hessian).all()):
                raise ValueError(f"{path}: the calibration text gives inputs that are not finite numbers")
        return total

    def layout(self, path: str) -> Layout:
        return transformer.layouts(self.cfg)[path]


@functools.partial(jax.jit, static_argnums=0)
def _embed(cfg: ModelConfig, params: Params, tokens_BT: Array) -> Stream:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    return Stream(transformer.Embedding(cfg).apply({"params": params["embed"]}, tokens_BT, positions_BT))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5))
def _run(
    cfg: ModelConfig, block: BlockConfig, paths: tuple[str, ...], weights: Params, stream: Stream, clip: float | None
) -> tuple[Stream, dict[str, Inputs]]:
    """One layer on one batch, and the inputs of its kernels at `paths`."""
    x_BTD = stream.x_BTD
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
    for path in paths:
        weights = replaced(weights, path, Tapped(at(weights, path), path))
    # Inputs cannot leave the manual regions of a mesh; the compiler splits what is inside by itself.
    with rules.unsplit(), taps.collect() as found:
        ctx = transformer.context(cfg, positions_BT, None)
        after, _, _ = Block(block, out_scale=1.0).apply({"params": weights}, stream, ctx, None)  # type: ignore[misc]
    return after, {path: _summary(seen, clip) for path, seen in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5))
def _look(
    cfg: ModelConfig, block: BlockConfig, paths: tuple[str, ...], weights: Params, stream: Stream, clip: float | None
) -> dict[str, Inputs]:
    """The inputs alone: the compiler leaves out what of the layer comes after them."""
    return _run(cfg, block, paths, weights, stream, clip)[1]


def _summary(seen: Seen, clip: float | None) -> Inputs:
    x_MI = seen.rows_MI.astype(jnp.float32)
    if clip is not None:
        norm_M = jnp.linalg.norm(x_MI, axis=1)
        limit = clip * jnp.nanmedian(jnp.where(norm_M > 0, norm_M, jnp.nan))
        x_MI = x_MI * jnp.minimum(1.0, limit / jnp.maximum(norm_M, 1e-30))[:, None]
    size = jnp.abs(x_MI)
    if seen.groups is None:
        hessian = jax.lax.dot_general(x_MI, x_MI, (((0,), (0,)), ((), ())), precision="highest")
        return Inputs(hessian, size.sum(0), size.max(0), jnp.asarray(x_MI.shape[0], jnp.float32))
    return _summary_by_expert(x_MI, size, seen.groups)


def _summary_by_expert(x_MI: Array, size_MI: Array, groups: Groups) -> Inputs:
    """The sums of each expert's rows; the Hessian is what would be the gradient of its kernel."""
    num_experts = groups.sizes_E.shape[0]
    kernel = jnp.zeros((num_experts, x_MI.shape[1], x_MI.shape[1]), jnp.float32)
    hessian = jax.vjp(lambda w: grouped_matmul(x_MI, w, groups), kernel)[1](x_MI)[0]
    row_M = jnp.arange(x_MI.shape[0])[:, None]
    member_ME = (row_M >= groups.starts_E) & (row_M < groups.starts_E + groups.sizes_E)
    expert_M = jnp.where(member_ME.any(1), member_ME.argmax(1), num_experts)
    total = jax.ops.segment_sum(size_MI, expert_M, num_experts + 1)[:-1]
    largest = jax.ops.segment_max(size_MI, expert_M, num_experts + 1)[:-1]
    return Inputs(hessian, total, jnp.maximum(largest, 0.0), groups.sizes_E.astype(jnp.float32))


def _add(a: Inputs, b: Inputs) -> Inputs:
    return Inputs(a.hessian + b.hessian, a.abs_sum + b.abs_sum, jnp.maximum(a.abs_max, b.abs_max), a.count + b.count)


def _kernels(weights: Params) -> list[str]:
    """The paths of the kernels that are treated, in the order of their stages."""
    return [path for stage in _stages(weights) for path in stage]


def _stages(weights: Params) -> list[list[str]]:
    leaves = jax.tree_util.tree_leaves_with_path(weights, is_leaf=quantized.is_quantized)
    paths = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    found = []
    for stage in _STAGES:
        for parts in (("kernel", "kernel/reduce"), ("kernel/expand",)):
            found.append([f"{name}/{part}" for name in stage for part in parts if f"{name}/{part}" in paths])
    return [stage for stage in found if stage]


def at(tree: Any, path: str) -> Any:
    """What is at a `/`-joined path of nested dicts."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def replaced(tree: Any, path: str, value: Any) -> Any:
    """The tree with another value at a path."""
    name, _, rest = path.partition("/")
    return {**tree, name: value if not rest else replaced(tree[name], rest, value)}
