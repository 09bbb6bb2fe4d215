"""Fewer experts in the mixtures of a trained model: the least dropped, or merged into those that stay.

An expert is worth `sum_t weight_te |expert_e(x_t)|`, the saliency of Lasby et al. 2025 (REAP), arXiv:2510.13999, summed
over tokens instead of averaged: an expert that is seldom asked does little. Merged is as in Li et al. 2024 (M-SMoE),
arXiv:2310.01334: an expert goes into the one whose column of the router is most like its own, its hidden units in the
order in which they are most like those of the other, all weighed by their worth. The router keeps the columns of those
that stay. REAP argues that merging loses to dropping, as the router can no longer choose between what was merged.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from gptjax.compress import calibrate
from gptjax.nn import taps, transformer
from gptjax.nn.block import Block, Stream
from gptjax.nn.config import BlockConfig, ModelConfig, MoEConfig
from gptjax.nn.mlp import activate
from gptjax.nn.moe import route
from gptjax.parallel import rules
from gptjax.types import Array, Params

_LEAVES = (
    ("experts_gate/kernel", -3, -1),
    ("experts_up/kernel", -3, -1),
    ("experts_down/kernel", -3, -2),
    ("experts_gate/bias", -2, -1),
    ("experts_up/bias", -2, -1),
    ("experts_down/bias", -2, None),
)
"""Of the parameters of experts the dimension that counts experts, and that of hidden units."""


def dropped(cfg: ModelConfig, params: Params, batches: Sequence[Array], size: int) -> Params:
    """The parameters with the `size` experts of each mixture that are worth most; in groups, each keeps as many."""
    for path, score in scores(cfg, params, batches).items():
        params = _with_experts(params, path, _kept(score, _mixture(cfg, path), size))
    return params


def merged(cfg: ModelConfig, params: Params, batches: Sequence[Array], size: int) -> Params:
    """The parameters with the same experts as `dropped` keeps, and the others of their group merged into these."""
    for path, score in scores(cfg, params, batches).items():
        moe = _mixture(cfg, path)
        index = _kept(score, moe, size)
        stack = score.shape[:-1]
        names = [name for name, *_ in _LEAVES if _has(params, f"{path}/moe/{name}")]
        own = {name: np.array(calibrate.at(params, f"{path}/moe/{name}"), np.float32) for name in names}
        router = np.asarray(calibrate.at(params, f"{path}/moe/router/kernel"), np.float32)
        for layer in np.ndindex(*stack):
            one = {name: leaf[layer] for name, leaf in own.items()}
            _merge(one, router[layer], score[layer], index[layer], moe.num_groups)
        for name, leaf in own.items():
            params = calibrate.replaced(
                params, f"{path}/moe/{name}", jnp.asarray(leaf, calibrate.at(params, f"{path}/moe/{name}").dtype)
            )
        params = _with_experts(params, path, index)
    return params


def scores(cfg: ModelConfig, params: Params, batches: Sequence[Array]) -> dict[str, np.ndarray]:
    """By block, `sum_t weight_te |expert_e(x_t)|` of each expert: `[E]`, behind the layers where those are stacked."""
    states = [Stream(_embedded(cfg, params, tokens)) for tokens in batches]
    paths = [
        f"group_{i}/block_{j}"
        for i, g in enumerate(cfg.groups)
        for _ in range(g.repeats)
        for j in range(len(g.pattern))
    ]
    found: dict[str, list[np.ndarray]] = {}
    for path, (block, weights) in zip(paths, transformer.layers(cfg, params), strict=True):
        done = [_scored_layer(cfg, block, weights, x) for x in states]
        states = [x for x, _ in done]
        if isinstance(block.mlp, MoEConfig):
            found.setdefault(path, []).append(np.sum([np.asarray(score) for _, score in done], axis=0))
    shared = {f"group_{i}" for i, group in enumerate(cfg.groups) if group.shared}
    return {
        path: np.sum(scores, axis=0) if path.partition("/")[0] in shared else np.stack(scores)
        for path, scores in found.items()
    }


@functools.partial(jax.jit, static_argnums=0)
def _embedded(cfg: ModelConfig, params: Params, tokens_BT: Array) -> Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    return transformer.Embedding(cfg).apply({"params": params["embed"]}, tokens_BT, positions_BT)  # type: ignore[return-value]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scored_layer(cfg: ModelConfig, block: BlockConfig, weights: Params, stream: Stream) -> tuple[Stream, Array]:
    x_BTD = stream.x_BTD
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
    moe, seen = block.mlp, weights
    if isinstance(moe, MoEConfig):  # what the router sees is what the experts see
        router = weights["moe"]["router"]
        tapped = {**router, "kernel": taps.Tapped(router["kernel"], "router")}
        seen = {**weights, "moe": {**weights["moe"], "router": tapped}}
    with rules.unsplit(), taps.collect() as found:
        ctx = transformer.context(cfg, positions_BT, None)
        after, _, _ = Block(block, out_scale=1.0).apply({"params": seen}, stream, ctx, None)  # type: ignore[misc]
    if not isinstance(moe, MoEConfig):
        return after, jnp.zeros(())
    return after, _routed_lengths(moe, weights["moe"], found["router"].rows_MI)


def _routed_lengths(moe: MoEConfig, weights: Params, x_MD: Array) -> Array:
    logits_ME = x_MD @ weights["router"]["kernel"].astype(jnp.float32) + weights["router"].get("bias", 0.0)
    index, weight, _ = route(moe, logits_ME[None], weights.get("balance_bias"))
    rows = jnp.arange(x_MD.shape[0])[:, None]
    weight_ME = jnp.zeros(logits_ME.shape).at[rows, index[0]].add(weight[0])

    def length_M(one: Params) -> Array:
        def product(name: str, x: Array) -> Array:
            return x @ one[name]["kernel"].astype(x.dtype) + one[name].get("bias", 0.0)

        gate = product("experts_gate", x_MD) if "experts_gate" in one else None
        return jnp.linalg.norm(
            product("experts_down", activate(moe.activation, product("experts_up", x_MD), gate)), axis=-1
        )

    stacked = {name: leaf for name, leaf in weights.items() if name.startswith("experts_")}
    return (weight_ME.T * jax.lax.map(length_M, stacked)).sum(-1)


def cut(tree: Params, path: str, index: np.ndarray, dim: int) -> Params:
    """The tree with only `index` `[*lead, kept]` of a dimension of the parameter at `path`, if it has it."""
    name, _, rest = path.partition("/")
    if name not in tree:
        return tree
    if rest:
        return {**tree, name: cut(tree[name], rest, index, dim)}
    leaf = tree[name]
    shape = [1] * leaf.ndim
    shape[: index.ndim - 1], shape[dim] = index.shape[:-1], index.shape[-1]
    return {**tree, name: jnp.take_along_axis(leaf, index.reshape(shape), axis=dim)}


def blocks(cfg: ModelConfig) -> dict[str, BlockConfig]:
    """By where their parameters are."""
    return {f"group_{i}/block_{j}": b for i, group in enumerate(cfg.groups) for j, b in enumerate(group.pattern)}


def _merge(
    one: dict[str, np.ndarray], router_DE: np.ndarray, worth_E: np.ndarray, kept: np.ndarray, num_groups: int
) -> None:
    """Writes into the experts `kept` of one layer the means of themselves and what is merged into them."""
    group_size = len(worth_E) // num_groups
    unit_DE = router_DE / np.maximum(np.linalg.norm(router_DE, axis=0), 1e-30)
    total = {name: np.zeros_like(leaf) for name, leaf in one.items()}
    weight_E = np.zeros(len(worth_E))
    for expert, worth in enumerate(np.maximum(worth_E, 1e-6 * worth_E.max() + 1e-30)):
        near = kept[kept // group_size == expert // group_size]
        target = expert if expert in kept else int(near[np.argmax(unit_DE[:, near].T @ unit_DE[:, expert])])
        order = None if target == expert else _matching(one, expert, target)
        weight_E[target] += worth
        for name, _, units in _LEAVES:
            if name in one:
                own = one[name][expert]
                moved = own if units is None or order is None else np.take(own, order, axis=units)
                total[name][target] += worth * moved
    for name, leaf in one.items():
        for target in kept:
            leaf[target] = total[name][target] / weight_E[target]


def _matching(one: dict[str, np.ndarray], expert: int, target: int) -> np.ndarray:
    """Which hidden unit of `expert` stands for each of `target`: the products of their weights are largest."""
    alike_FF: np.ndarray | float = 0.0
    for name, _, units in _LEAVES:
        if name in one and units is not None and name.endswith("kernel"):
            a, b = (np.moveaxis(one[name][e], units, 0) for e in (target, expert))
            alike_FF = alike_FF + a @ b.T
    return optimize.linear_sum_assignment(alike_FF, maximize=True)[1]


def _kept(score: np.ndarray, moe: MoEConfig, size: int) -> np.ndarray:
    """The experts that stay, `[*stack, size]`, in their order."""
    grouped = score.reshape(*score.shape[:-1], moe.num_groups, -1)
    best = np.argsort(-grouped, axis=-1, kind="stable")[..., : size // moe.num_groups]
    index = np.sort(best + np.arange(moe.num_groups)[:, None] * grouped.shape[-1], axis=-1)
    return index.reshape(*score.shape[:-1], -1)


def _with_experts(params: Params, path: str, index: np.ndarray) -> Params:
    for name, experts, _ in _LEAVES:
        params = cut(params, f"{path}/moe/{name}", index, experts)
    for name in ("router/kernel", "router/bias", "balance_bias"):
        params = cut(params, f"{path}/moe/{name}", index, -1)
    return params


def _has(tree: Params, path: str) -> bool:
    name, _, rest = path.partition("/")
    return name in tree and (not rest or _has(tree[name], rest))


def _mixture(cfg: ModelConfig, path: str) -> MoEConfig:
    moe = blocks(cfg)[path].mlp
    assert isinstance(moe, MoEConfig), "scores are of mixtures"
    return moe
