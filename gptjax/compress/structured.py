"""Whole parts of a trained model left out: a smaller model of the same kind.

width     hidden units of feed-forward layers, of experts too
heads     attention heads, in groups that share a key/value head
depth     layers
experts   of mixtures, dropped or merged

Each takes `(cfg, params, batches, size)` and gives `(cfg, params)`. A hidden unit or group of heads is worth what it
adds to the layer's output, `tr(W_g H_gg W_g')` with `H = sum x x'` of the output projection's inputs and `W_g` its
weights for them. What stays of that projection is then fitted to the whole's outputs,

    W_S += W_R H_RS (H_SS + damping)^-1

(S stays, R goes), a layer at a time, so that later layers see the errors of earlier ones.

Sources: width and heads by activations, Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2; depth, Men et
al. 2024 (ShortGPT), arXiv:2403.03853; experts, see `mixtures`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from gptjax.compress import calibrate, mixtures
from gptjax.compress.calibrate import Inputs, Site
from gptjax.nn import storage, transformer
from gptjax.nn.config import AttentionConfig, BlockConfig, LayerGroup, ModelConfig, MoEConfig, uses_others_kv
from gptjax.types import Array, Params

DAMPING = 0.01


def width(cfg: ModelConfig, params: Params, batches: Sequence[Array], size: float) -> tuple[ModelConfig, Params]:
    """Keeps the part `size` of each feed-forward layer's hidden units, rounded to a multiple of 8 unless there are few.

    Raises:
      ValueError: for a size that is not between 0 and 1.
    """
    check(cfg, {"width": size})

    def kept_units(path: str, units: int) -> int:
        return _kept_width(units, size)

    kernels = ("mlp/down/kernel", "moe/experts_down/kernel", "moe/shared/down/kernel")
    fitted, chosen = _fit(cfg, params, batches, kernels, kept_units, unit_size=lambda site: 1)
    for path, index in chosen.items():
        stem = path.removesuffix("down/kernel")
        for name, dim in (
            ("up/kernel", -1),
            ("gate/kernel", -1),
            ("up/bias", -1),
            ("gate/bias", -1),
            ("down/kernel", -2),
        ):
            fitted = mixtures.cut(fitted, stem + name, index, dim)
    return changed(cfg, {"width": size}), fitted


def heads(cfg: ModelConfig, params: Params, batches: Sequence[Array], size: float) -> tuple[ModelConfig, Params]:
    """Keeps `size` heads of each layer, whole groups that share a key/value head.

    Raises:
      ValueError: for more heads than there are, or a number that is no whole number of groups.
    """
    check(cfg, {"heads": size})
    blocks = mixtures.blocks(cfg)

    def per_group(path: str) -> int:
        attention = blocks[path.partition("/attention/")[0]].attention
        return attention.num_heads // attention.num_kv_heads if isinstance(attention, AttentionConfig) else 1

    def unit_size(site: Site) -> int:
        return per_group(site.path) * site.layout.in_shape[1]

    fitted, chosen = _fit(
        cfg, params, batches, ("attention/out/kernel",), lambda path, units: int(size) // per_group(path), unit_size
    )
    for path, groups in chosen.items():
        stem, num = path.removesuffix("out/kernel"), per_group(path)
        own = (groups[..., None] * num + np.arange(num)).reshape(*groups.shape[:-1], -1)
        for name in ("query", "query_up", "key_up", "value_up", "key", "value"):
            index = groups if name in ("key", "value") else own
            fitted = mixtures.cut(
                mixtures.cut(fitted, f"{stem}{name}/kernel", index, -2), f"{stem}{name}/bias", index, -2
            )
        fitted = mixtures.cut(mixtures.cut(fitted, f"{stem}out/kernel", own, -3), f"{stem}sinks", own, -1)
    return changed(cfg, {"heads": size}), fitted


def depth(cfg: ModelConfig, params: Params, batches: Sequence[Array], size: float) -> tuple[ModelConfig, Params]:
    """Keeps the `size` layers that turn the residual stream most: by `1 - cos` of what goes in and what comes out.

    Raises:
      ValueError: for more layers than there are, or a model that shares weights between layers.
    """
    check(cfg, {"depth": size})
    influence = block_influence(cfg, params, batches)
    stay = sorted(np.argsort(-influence, kind="stable")[: int(size)].tolist())
    logging.info("layers that stay, of 0 to %d: %s", cfg.num_layers - 1, ", ".join(map(str, stay)))
    layers = list(transformer.layers(cfg, params))
    runs: list[list[tuple[BlockConfig, Params]]] = []
    for block, weights in (layers[i] for i in stay):
        if runs and runs[-1][0][0] == block:
            runs[-1].append((block, weights))
        else:
            runs.append([(block, weights)])
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("group_")}
    stacked = {
        f"group_{i}": {"block_0": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(weights for _, weights in run))}
        for i, run in enumerate(runs)
    }
    groups = tuple(LayerGroup(pattern=(run[0][0],), repeats=len(run)) for run in runs)
    return dataclasses.replace(cfg, groups=groups), rest | stacked


def block_influence(cfg: ModelConfig, params: Params, batches: Sequence[Array]) -> np.ndarray:
    """Of each layer the mean over tokens of `1 - cos(input, output)`."""

    @jax.jit
    def of_batch(params: Params, tokens_BT: Array) -> Array:
        xs = [x.astype(jnp.float32) for x in transformer.residuals(cfg, params, tokens_BT)]
        lengths = [jnp.linalg.norm(x, axis=-1) for x in xs]
        pairs = zip(xs, xs[1:], lengths, lengths[1:], strict=False)
        return jnp.stack([1 - jnp.mean((x * y).sum(-1) / jnp.maximum(a * b, 1e-30)) for x, y, a, b in pairs])

    return np.mean([np.asarray(of_batch(params, tokens)) for tokens in batches], axis=0)


def experts(cfg: ModelConfig, params: Params, batches: Sequence[Array], size: float) -> tuple[ModelConfig, Params]:
    """Keeps the `size` experts of each mixture that `mixtures.dropped` says.

    Raises:
      ValueError: without mixtures, or for a number that they cannot have.
    """
    check(cfg, {"experts": size})
    return changed(cfg, {"experts": size}), mixtures.dropped(cfg, params, batches, int(size))


def merged_experts(
    cfg: ModelConfig, params: Params, batches: Sequence[Array], size: float
) -> tuple[ModelConfig, Params]:
    """Keeps the same experts as `experts`, the others merged into them by `mixtures.merged`.

    Raises:
      ValueError: without mixtures, or for a number that they cannot have.
    """
    check(cfg, {"experts": size})
    return changed(cfg, {"experts": size}), mixtures.merged(cfg, params, batches, int(size))


Cut = Callable[[ModelConfig, Params, Sequence[Array], float], tuple[ModelConfig, Params]]
METHODS: Mapping[str, Cut] = {
    "depth": depth, "experts": experts, "heads": heads, "merged_experts": merged_experts, "width": width,
}  # fmt: skip


def check(cfg: ModelConfig, cut: Mapping[str, float]) -> None:
    """Raises:
    ValueError: if parts of the model cannot be left out so; `cut` is by the names of `METHODS`.
    """
    if cut:
        storage.check_whole_floats(cfg, wanted="cut")
    if cut.keys() & {"depth", "heads"} and any(map(uses_others_kv, cfg.blocks)):
        raise ValueError(
            f"{', '.join(sorted(cut.keys() & {'depth', 'heads'}))}: layers use the keys and values of others, which "
            "would go; cut the model before they are shared, or its width"
        )
    if "width" in cut and not 0.0 < cut["width"] < 1.0:
        raise ValueError(
            f"width={cut['width']:g}: expected above 0 and below 1, the part of the hidden units that stays"
        )
    if "depth" in cut:
        if not 1 <= cut["depth"] < cfg.num_layers:
            raise ValueError(f"depth={cut['depth']:g}: expected 1 to {cfg.num_layers - 1}, the layers that stay")
        if any(group.shared for group in cfg.groups):
            raise ValueError("depth: the model shares weights between layers, which would come apart; cut others")
    for block in cfg.blocks:
        if "heads" in cut:
            _check_heads(block, cut["heads"])
        if "experts" in cut and isinstance(block.mlp, MoEConfig):
            _check_experts(block.mlp, cut["experts"])
    if "experts" in cut and not any(isinstance(block.mlp, MoEConfig) for block in cfg.blocks):
        raise ValueError(f"experts={cut['experts']:g}: the model has none; leave it out")


def changed(cfg: ModelConfig, cut: Mapping[str, float]) -> ModelConfig:
    """The config after widths, heads and experts were left out; layers are as many as before."""

    def of_block(block: BlockConfig) -> BlockConfig:
        attention, mlp = block.attention, block.mlp
        if "heads" in cut:
            num = int(cut["heads"])
            if isinstance(attention, AttentionConfig):
                kv = num * attention.num_kv_heads // attention.num_heads
                attention = dataclasses.replace(attention, num_heads=num, num_kv_heads=kv)
            else:
                attention = dataclasses.replace(attention, num_heads=num)
        if "experts" in cut and isinstance(mlp, MoEConfig):
            mlp = dataclasses.replace(mlp, num_experts=int(cut["experts"]))
        if "width" in cut:
            mlp = dataclasses.replace(mlp, d_ff=_kept_width(mlp.d_ff, cut["width"]))
            if isinstance(mlp, MoEConfig) and mlp.shared_d_ff:
                mlp = dataclasses.replace(mlp, shared_d_ff=_kept_width(mlp.shared_d_ff, cut["width"]))
        return dataclasses.replace(block, attention=attention, mlp=mlp)

    groups = tuple(dataclasses.replace(g, pattern=tuple(map(of_block, g.pattern))) for g in cfg.groups)
    return dataclasses.replace(cfg, groups=groups)


def _fit(
    cfg: ModelConfig,
    params: Params,
    batches: Sequence[Array],
    kernels: tuple[str, ...],
    kept_units: Callable[[str, int], int],
    unit_size: Callable[[Site], int],
) -> tuple[Params, dict[str, np.ndarray]]:
    """Kernels with the inputs of some units at zero and the others fitted, and which stay: by path `[*lead, kept]`."""
    found: dict[str, list[np.ndarray]] = {}

    def treat(site: Site, kernel: Array, inputs: Inputs) -> Array:
        if not site.path.endswith(kernels):
            return kernel
        rows, unit = site.layout.to_rows(kernel), unit_size(site)
        fitted, stay = _fit_rows(rows, inputs.hessian, unit, kept_units(site.path, rows.shape[-1] // unit))
        found.setdefault(site.path, []).append(np.asarray(stay))
        return site.layout.from_rows(fitted)

    plain = storage.with_float_kernels(cfg)  # kernels that training rounds are floats
    fitted = calibrate.walk(plain, params, batches, treat)
    shared = {f"group_{i}" for i, group in enumerate(cfg.groups) if group.shared}
    return fitted, {
        path: stays[0] if path.partition("/")[0] in shared else np.stack(stays) for path, stays in found.items()
    }


@functools.partial(jax.jit, static_argnums=(2, 3))
def _fit_rows(rows: Array, hessian: Array, unit: int, num_kept: int) -> tuple[Array, Array]:
    if rows.ndim > 2:  # experts
        return jax.vmap(lambda w, h: _fit_rows(w, h, unit, num_kept))(rows, hessian)
    num_units = rows.shape[1] // unit
    # An expert that the text never reached is judged by its weights.
    hessian = jnp.where(jnp.diagonal(hessian).any(), hessian, jnp.eye(len(hessian)))
    units = jnp.arange(num_units)
    own = hessian.reshape(num_units, unit, num_units, unit)[units, :, units, :]
    split = rows.astype(jnp.float32).reshape(-1, num_units, unit)
    worth = jnp.einsum("dua,uab,dub->u", split, own, split)
    stay = jnp.sort(jnp.argsort(-worth)[:num_kept])
    inputs = (stay[:, None] * unit + jnp.arange(unit)).reshape(-1)
    gone = rows.astype(jnp.float32).at[:, inputs].set(0.0)
    kept = hessian[inputs][:, inputs]
    damped = kept + DAMPING * jnp.mean(jnp.diagonal(kept)) * jnp.eye(len(inputs))
    change = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), (gone @ hessian[:, inputs]).T).T
    return jnp.zeros_like(rows).at[:, inputs].set(rows[:, inputs] + change.astype(rows.dtype)), stay


def _kept_width(units: int, part: float) -> int:
    """Multiples of 8, which numbers of few bits are packed by, unless there are hardly any."""
    return max(8, 8 * round(units * part / 8)) if units >= 16 else max(1, round(units * part))


def _check_heads(block: BlockConfig, size: float) -> None:
    num = block.attention.num_heads
    per_group = num // block.attention.num_kv_heads if isinstance(block.attention, AttentionConfig) else 1
    if not per_group <= size < num or size % per_group:
        groups = f"{num} heads are in groups of {per_group} that share a key/value head; " if per_group > 1 else ""
        raise ValueError(
            f"heads={size:g}: {groups}expected a multiple of {per_group} from {per_group} to {num - per_group}"
        )


def _check_experts(moe: MoEConfig, size: float) -> None:
    if not size < moe.num_experts or size % moe.num_groups:
        raise ValueError(
            f"experts={size:g}: expected a multiple of num_groups={moe.num_groups} below {moe.num_experts}, "
            "the experts of a mixture"
        )
    if size // moe.num_groups * moe.groups_per_token < moe.num_experts_per_token:
        raise ValueError(
            f"experts={size:g}: a token is sent to {moe.num_experts_per_token} of {moe.groups_per_token} group(s); "
            "expected enough for it"
        )
