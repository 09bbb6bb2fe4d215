"""Layers of a trained model that come to use the same weights, keys and values, or one table for both ends.

Each takes `(cfg, params, ...)` and gives them with the lines of a table. What they make is a start for training
(`train.init_from`, or a student of the original), not a model to use: its function is another, unless what shares was
equal before.

first        the first of the layers that share
influential  the one of them that turns the residual stream most (`structured.block_influence`)
average      the mean of them, which begins near nothing and stays behind: layers differ too much
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.compress import structured
from gptjax.nn import sharing, storage, transformer
from gptjax.nn.config import AttentionConfig, BlockConfig, LayerGroup, ModelConfig
from gptjax.nn.sharing import SharingConfig
from gptjax.types import Array, Params

Init = Literal["first", "influential", "average"]
Kept = Literal["input", "output", "average"]


class Line(NamedTuple):
    """A line of the table: a part of the model, what became of it, and its parameters before and after."""

    part: str
    how: str
    before: int
    after: int


class Shared(NamedTuple):
    """A model with something shared, and what."""

    model: ModelConfig
    params: Params
    lines: tuple[Line, ...]


def layers(
    cfg: ModelConfig, params: Params, config: SharingConfig, *, init: Init = "first", batches: Sequence[Array] = ()
) -> Shared:
    """Layers with the weights that `nn.sharing` says.

    Args:
      batches: calibration tokens `[B, T]` each, for `influential`.

    Raises:
      ValueError: for a pattern that does not come out even, layers of unequal shapes, a model in few bits or factors.
    """
    storage.check_whole_floats(cfg, wanted="share in")
    if init not in get_args(Init):
        raise ValueError(f"init={init!r}: expected one of {', '.join(get_args(Init))}")
    if init == "influential" and not batches:
        raise ValueError("init='influential': needs calibration text; give some, or use first")
    made = dataclasses.replace(cfg, groups=sharing.groups(cfg.blocks, config))
    worth = structured.block_influence(cfg, params, batches) if init == "influential" else None
    own = [weights for _, weights in transformer.layers(cfg, params)]
    out = {name: leaf for name, leaf in params.items() if not name.startswith("group_")}
    lines, start = [], 0
    for i, group in enumerate(made.groups):
        blocks = {}
        for j in range(len(group.pattern)):
            members = list(range(start + j, start + group.num_layers, len(group.pattern)))
            name, found = f"group_{i}/block_{j}", [own[layer] for layer in members]
            if not group.shared:
                blocks[f"block_{j}"] = _stacked(found)
                how = "left: used once"
            else:
                chosen = 0 if worth is None else int(np.argmax(worth[members]))
                blocks[f"block_{j}"] = found[chosen] if init != "average" else _mean(found)
                how = f"one layer, {init}" + (f" ({members[chosen] + 1})" if worth is not None else "")
            numbers = ", ".join(str(layer + 1) for layer in members)
            lines.append(Line(f"{name}: layers {numbers}", how, _count(found), _count(blocks[f"block_{j}"])))
        out[f"group_{i}"] = blocks
        start += group.num_layers
    return Shared(made, out, (*lines, *_left(params, "not of a layer")))


def keys_and_values(
    cfg: ModelConfig, params: Params, every: int, *, init: Literal["average", "first"] = "first"
) -> Shared:
    """Of `every` layers in a row the first has keys and values, which the others attend to.

    Args:
      init: of their kernels; `average` is over the layers that use them.

    Raises:
      ValueError: where layers in a row are not alike, or their number is not a multiple.
    """
    storage.check_whole_floats(cfg, wanted="share in")
    if every < 2:
        raise ValueError(f"kv_every={every}: expected at least 2, the layers that use one's keys and values")
    out = {name: leaf for name, leaf in params.items() if not name.startswith("group_")}
    lines, groups, number = [], [], 0
    per_layer = list(transformer.layers(cfg, params))
    for i, group in enumerate(cfg.groups):
        length = _pattern_length(group, every)
        found = per_layer[number : number + (length if group.shared else group.num_layers)]
        changed = [_kv_layer(found, layer, every, init) for layer in range(len(found))]
        blocks = tuple(block for block, _ in changed[:length])
        groups.append(LayerGroup(pattern=blocks, repeats=group.num_layers // length, shared=group.shared))
        stacks = {f"block_{j}": [weights for _, weights in changed[j::length]] for j in range(length)}
        out[f"group_{i}"] = {name: stack[0] if group.shared else _stacked(stack) for name, stack in stacks.items()}
        for layer in range(len(found)):
            is_own = layer % every == 0
            how = f"keys and values, {init if is_own else 'of the layer before'}"
            sizes = _count([found[layer][1]]), _count([changed[layer][1]])
            lines.append(Line(f"layer {number + layer + 1}", how, *sizes))
        number += group.num_layers
    lines += _left(params, "not of a layer")
    return Shared(dataclasses.replace(cfg, groups=tuple(groups)), out, tuple(lines))


def embeddings(cfg: ModelConfig, params: Params, keep: Kept) -> Shared:
    """One table for tokens and logits, of the size of the tokens' own; the final norm takes over the head's size.

    Raises:
      ValueError: if they are tied already.
    """
    storage.check_whole_floats(cfg, wanted="share in")
    if cfg.tie_embeddings:
        raise ValueError(f"tie={keep}: the model has one table for both ends already; leave it out")
    table_VD, head_VD = params["embed"]["tokens"], params["head"]["kernel"].T
    table_size, head_size = jnp.linalg.norm(table_VD), jnp.linalg.norm(head_VD)
    tied = {
        "input": table_VD / table_size,
        "output": head_VD / head_size,
        "average": table_VD / table_size + head_VD / head_size,
    }[keep]
    tied = tied * table_size / jnp.linalg.norm(tied)
    gain, norm = head_size / table_size, dict(params["final_norm"])
    norm["scale"] = gain * (1 + norm["scale"]) - 1 if cfg.final_norm.zero_centered else gain * norm["scale"]
    if "bias" in norm:
        norm["bias"] = gain * norm["bias"]
    rest = {name: leaf for name, leaf in params.items() if name != "head"}
    made = {**rest, "embed": {**params["embed"], "tokens": tied}, "final_norm": norm}
    line = Line("embed/tokens and head/kernel", f"one table, {keep}", table_VD.size + head_VD.size, table_VD.size)
    return Shared(dataclasses.replace(cfg, tie_embeddings=True), made, (line,))


def _mean(members: Sequence[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0), *members)


def _stacked(members: Sequence[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def _left(params: Params, why: str) -> list[Line]:
    """Lines for what is outside of the layers."""
    outside = {name: leaf for name, leaf in params.items() if not name.startswith("group_")}
    leaves = jax.tree_util.tree_leaves_with_path(outside)
    return [Line(storage.name(path), f"left: {why}", leaf.size, leaf.size) for path, leaf in leaves]


def _count(trees: object) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trees))


def _pattern_length(group: LayerGroup, every: int) -> int:
    """Of the pattern, as short as it can be, in which each layer knows whose keys and values it uses."""
    own, total = len(group.pattern), group.num_layers
    if (own if group.shared else total) % every:
        raise ValueError(
            f"kv_every={every}: does not divide the {own if group.shared else total} layers of a group"
            f"{' whose weights are shared' if group.shared else ''} evenly; expected a number that does"
        )
    if group.shared:
        return own
    length = math.lcm(own, every)
    return length if total % length == 0 else total


def _kv_layer(
    found: Sequence[tuple[BlockConfig, Params]], layer: int, every: int, init: Literal["average", "first"]
) -> tuple[BlockConfig, Params]:
    """One layer with keys and values for those after it, or without."""
    block, weights = found[layer]
    attention = block.attention
    if not isinstance(attention, AttentionConfig) or attention.kv == "previous":
        kind = "has none of its own already" if isinstance(attention, AttentionConfig) else "has latents instead"
        raise ValueError(f"kv_every={every}: layer {layer + 1} of a group {kind}; expected plain attention")
    names = ("key", "value", "key_norm")
    if layer % every:
        kept = {name: leaf for name, leaf in weights["attention"].items() if name not in names}
        block = dataclasses.replace(block, attention=dataclasses.replace(attention, kv="previous"))
        return block, {**weights, "attention": kept}
    if init == "first":
        return block, weights
    users = [own["attention"] for _, own in found[layer : layer + every]]
    averaged = {name: _mean([user[name] for user in users]) for name in names if name in users[0]}
    return block, {**weights, "attention": {**weights["attention"], **averaged}}
