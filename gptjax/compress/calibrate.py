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
Against = Literal["none", "original"]

# What is multiplied with the outputs of the kernels of the stage before.
_STAGES = (
    ("attention/query", "attention/key", "attention/value", "attention/query_down", "attention/kv_down"),
    ("attention/query_up", "attention/key_up", "attention/value_up"),
    ("attention/out",),
    ("mlp/gate", "mlp/up", "moe/experts_gate", "moe/experts_up", "moe/shared/gate", "moe/shared/up"),
    ("mlp/down", "moe/experts_down", "moe/shared/down"),
)

# Of one branch of a layer: what is before them need not be computed again once their inputs are known.
_ENDS = ("attention/out/kernel", "mlp/down/kernel", "moe/shared/down/kernel")
# Rows of a batch that are kept, at most.
_SAMPLE = 64
# Smaller products are no faster for being half of one.
_LEAST_HALF = 256


@flax.struct.dataclass
class Inputs:
    """Of a kernel's inputs `x`, over all rows of the calibration text; experts have a leading dimension.

    Attributes:
      hessian: `sum x x'`, float32 `[I, I]`: half the second derivative of the squared error of an output.
      abs_sum, abs_max: `sum |x|` and `max |x|`, `[I]`.
      count: number of rows.
      drift: `sum (x0 - x) x'`, `[I, I]`, x0 being the inputs in the model as it was; None where they were not asked
        for, and for experts, whose rows are others.
      sample_SI: some of the rows, evenly taken.
      expert_S: of which expert each of them is; one more than there are for none. None where there is one kernel.
    """

    hessian: Array
    abs_sum: Array
    abs_max: Array
    count: Array
    sample_SI: Array
    drift: Array | None = None
    expert_S: Array | None = None


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
    against: Against = "none",
    told: Callable[[int], None] = lambda layer: None,
) -> Params:
    """The parameters with every kernel of the layers but routers treated.

    Args:
      cfg: of float parameters.
      batches: int32 tokens `[B, T]` each, all of one shape.
      sequence: what a kernel's inputs come from: `stage`, all before it as treated; `layer`, all layers before it as
        treated; `none`, the model as it was.
      against: `original` runs the model as it was beside the treated one, and gives `Inputs.drift`.
      told: called with the number of layers that are done.

    Raises:
      ValueError: for inputs that are not finite.
    """
    assert cfg.quant is None or not cfg.quant.rules, "kernels are floats before they are treated"
    embedded = [_embed(cfg, params, tokens) for tokens in batches]
    xs = [_Hidden(x, x if against == "original" else None) for x in embedded]
    walker = _Walker(cfg, treat, sequence, prepare)
    out, layer = dict(params), 0
    for i, group in enumerate(cfg.groups):
        name = f"group_{i}"
        if group.shared:
            out[name], xs = walker.shared_group(name, group, params[name], xs, layer)
            layer += group.num_layers
            told(layer)
            continue
        repeats: list[Params] = []
        for repeat in range(group.repeats):
            own = jax.tree.map(operator.itemgetter(repeat), params[name])
            done = {}
            for j, block in enumerate(group.pattern):
                done[f"block_{j}"], xs = walker.layer(f"{name}/block_{j}", block, own[f"block_{j}"], xs, layer)
                layer += 1
                told(layer)
            repeats.append(done)
        out[name] = _stacked(repeats)
    return out


def _stacked(repeats: list[Params]) -> Params:
    """The repeats as one tree; empties the list, and lets go of leaves as soon as they are in their place."""
    structure = jax.tree.structure(repeats[0])
    columns = [list(column) for column in zip(*map(jax.tree.leaves, repeats), strict=True)][::-1]
    repeats.clear()
    return jax.tree.unflatten(structure, [jnp.stack(columns.pop()) for _ in range(len(columns))])


class _Hidden(NamedTuple):
    """What goes from layer to layer of one batch, in the treated model, and in the model as it was if asked for."""

    stream: Stream
    original: Stream | None


_Known = tuple[dict[str, Array], dict[str, Array]]
"""Inputs of kernels at paths that later treatment does not change, in the treated and in the original model."""


class _Walker(NamedTuple):
    cfg: ModelConfig
    treat: Treat
    sequence: Sequence_
    prepare: Prepare | None

    def layer(
        self, prefix: str, block: BlockConfig, weights: Params, xs: list[_Hidden], layer: int
    ) -> tuple[Params, list[_Hidden]]:
        where = f"{prefix}, layer {layer}"
        if self.prepare is not None:
            found = self.inputs(where, block, _kernels(weights), (weights, weights), xs)
            weights = self.prepare(block, weights, found)
        before = weights
        known: list[_Known] = [({}, {}) for _ in xs]
        for stage in _stages(weights) if self.sequence == "stage" else [_kernels(weights)]:
            found = self.inputs(where, block, stage, (weights, before), xs, known)
            for path in stage:
                site = Site(f"{prefix}/{path}", layer, self.layout(f"{prefix}/{path}"))
                weights = replaced(weights, path, self.treat(site, at(weights, path), found[path]))
        if self.sequence != "stage":
            known = [({}, {}) for _ in xs]
        passed = before if self.sequence == "none" else weights
        return weights, self.passed(block, (passed, before), xs, known)

    def shared_group(
        self, name: str, group: LayerGroup, weights: Params, xs: list[_Hidden], layer: int
    ) -> tuple[Params, list[_Hidden]]:
        """Layers with one set of weights: a kernel's inputs are those of all its uses, before any is treated."""
        found, states = self.uses(name, group, weights, xs)
        if self.prepare is not None:
            weights = {
                f"block_{j}": self.prepare(block, weights[f"block_{j}"], found[f"block_{j}"])
                for j, block in enumerate(group.pattern)
            }
            found, states = self.uses(name, group, weights, xs)
        treated = weights
        for j in range(len(group.pattern)):
            for path, inputs in found[f"block_{j}"].items():
                own = f"block_{j}/{path}"
                site = Site(f"{name}/{own}", layer + j, self.layout(f"{name}/{own}"))
                treated = replaced(treated, own, self.treat(site, at(treated, own), inputs))
        if self.sequence == "none":
            return treated, states
        for _ in range(group.repeats):
            for j, block in enumerate(group.pattern):
                xs = self.passed(block, (treated[f"block_{j}"], weights[f"block_{j}"]), xs)
        return treated, xs

    def uses(
        self, name: str, group: LayerGroup, weights: Params, xs: list[_Hidden]
    ) -> tuple[dict[str, dict[str, Inputs]], list[_Hidden]]:
        """What the kernels of each block of a shared group see, and the hidden states after it."""
        found: dict[str, dict[str, Inputs]] = {}
        for _ in range(group.repeats):
            for j, block in enumerate(group.pattern):
                own = weights[f"block_{j}"]
                seen = self.inputs(f"{name}/block_{j}", block, _kernels(own), (own, own), xs)
                before = found.get(f"block_{j}")
                found[f"block_{j}"] = seen if before is None else _added(before, seen)
                xs = self.passed(block, (own, own), xs)
        return found, xs

    def inputs(
        self,
        where: str,
        block: BlockConfig,
        paths: Sequence[str],
        weights: tuple[Params, Params],
        xs: list[_Hidden],
        known: list[_Known] | None = None,
    ) -> dict[str, Inputs]:
        """What the kernels at `paths` see; `weights` are the treated and the original ones. Adds to `known`."""
        total: dict[str, Inputs] | None = None
        for i, x in enumerate(xs):
            found, ends = _look(self.cfg, block, tuple(paths), weights, x, ({}, {}) if known is None else known[i])
            total = found if total is None else _added(total, found)
            if known is not None:
                known[i] = tuple(old | new for old, new in zip(known[i], ends, strict=True))  # type: ignore[assignment]
        assert total is not None, "calibration has rows"
        finite = jax.device_get({path: jnp.isfinite(inputs.hessian).all() for path, inputs in total.items()})
        for path, is_finite in finite.items():
            if not is_finite:
                raise ValueError(f"{where}: the calibration text gives {path} inputs that are not finite numbers")
        return total

    def passed(
        self, block: BlockConfig, weights: tuple[Params, Params], xs: list[_Hidden], known: list[_Known] | None = None
    ) -> list[_Hidden]:
        """The hidden states after the layer."""
        known = [({}, {}) for _ in xs] if known is None else known
        return [_pass(self.cfg, block, weights, x, seen) for x, seen in zip(xs, known, strict=True)]

    def layout(self, path: str) -> Layout:
        return transformer.layouts(self.cfg)[path]


@functools.partial(jax.jit, static_argnums=0)
def _embed(cfg: ModelConfig, params: Params, tokens_BT: Array) -> Stream:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    return Stream(transformer.Embedding(cfg).apply({"params": params["embed"]}, tokens_BT, positions_BT))  # type: ignore[arg-type]


def _run(
    cfg: ModelConfig,
    block: BlockConfig,
    paths: Sequence[str],
    weights: Params,
    stream: Stream,
    known: Mapping[str, Array],
) -> tuple[Stream, dict[str, Seen]]:
    """One layer on one batch, and the inputs of its kernels at `paths`; those in `known` are not computed again."""
    x_BTD = stream.x_BTD
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
    for path in {*paths, *known}:
        weights = replaced(weights, path, Tapped(at(weights, path), path, known.get(path)))
    # Inputs cannot leave the manual regions of a mesh; the compiler splits what is inside by itself.
    with rules.unsplit(), taps.collect() as found:
        ctx = transformer.context(cfg, positions_BT, None)
        after, _, _ = Block(block, out_scale=1.0).apply({"params": weights}, stream, ctx, None)  # type: ignore[misc]
    return after, found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pass(cfg: ModelConfig, block: BlockConfig, weights: tuple[Params, Params], x: _Hidden, known: _Known) -> _Hidden:
    own, _ = _run(cfg, block, (), weights[0], x.stream, known[0])
    if x.original is None:
        return _Hidden(own, None)
    return _Hidden(own, _run(cfg, block, (), weights[1], x.original, known[1])[0])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _look(
    cfg: ModelConfig,
    block: BlockConfig,
    paths: tuple[str, ...],
    weights: tuple[Params, Params],
    x: _Hidden,
    known: _Known,
) -> tuple[dict[str, Inputs], _Known]:
    """The inputs alone: the compiler leaves out what of the layer comes after them.

    Returns:
      `(inputs, ends)`: those of the last kernel of each branch are also given as they are.
    """
    seen = _run(cfg, block, paths, weights[0], x.stream, known[0])[1]
    wanted: dict[str, Seen] = {}
    if x.original is not None:
        wanted = _run(cfg, block, paths, weights[1], x.original, known[1])[1]
    inputs = {path: _summary(seen[path], wanted.get(path)) for path in paths}
    ends = [path for path in paths if path.endswith(_ENDS)]
    return inputs, tuple({path: of[path].x for path in ends if path in of} for of in (seen, wanted))  # type: ignore[return-value]


def _summary(seen: Seen, wanted: Seen | None) -> Inputs:
    x_MI = seen.rows_MI.astype(jnp.float32)
    size = jnp.abs(x_MI)
    if seen.groups is not None:
        return _summary_by_expert(x_MI, size, seen.groups)
    drift = None
    if wanted is not None:
        drift = _product(wanted.rows_MI.astype(jnp.float32) - x_MI, x_MI)
    count = jnp.asarray(x_MI.shape[0], jnp.float32)
    return Inputs(_gram(x_MI), size.sum(0), size.max(0), count, x_MI[:: _stride(x_MI)], drift)


def _gram(x_MI: Array) -> Array:
    """`sum x x'`; it is symmetric, so three eighths of a large one are not computed."""
    half = x_MI.shape[1] // 2
    if half < _LEAST_HALF:
        return _product(x_MI, x_MI)
    first, second = x_MI[:, :half], x_MI[:, half:]
    beside = _product(first, second)
    return jnp.block([[_gram(first), beside], [beside.T, _gram(second)]])


def _product(x_MI: Array, y_MJ: Array) -> Array:
    return jax.lax.dot_general(x_MI, y_MJ, (((0,), (0,)), ((), ())), precision="highest")


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
    count, stride = groups.sizes_E.astype(jnp.float32), _stride(x_MI)
    return Inputs(hessian, total, jnp.maximum(largest, 0.0), count, x_MI[::stride], None, expert_M[::stride])


def _stride(x_MI: Array) -> int:
    return -(-x_MI.shape[0] // _SAMPLE) | 1  # odd: rows of text are seldom, and positions are to be of all kinds


@jax.jit
def _added(a: dict[str, Inputs], b: dict[str, Inputs]) -> dict[str, Inputs]:
    def added(path: tuple, x: Array, y: Array) -> Array:
        match path[-1].name:
            case "abs_max":
                return jnp.maximum(x, y)
            case "sample_SI" | "expert_S":
                return jnp.concatenate([x, y])
        return x + y

    return jax.tree_util.tree_map_with_path(added, a, b)


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
