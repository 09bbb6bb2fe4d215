"""From `OptimConfig` to one optax transformation.

    guard( clip by global norm -> direction -> update -> prune ) skips bad steps
    keep_zeros( ... )                                            if zeros are kept or weights pruned
    ema( ... )                                                   if ema_decay > 0

    direction   by kind of parameter: the chosen optimizer; for Muon, matrices by Muon and the
                rest (embeddings, head, norms, biases, sinks) by Adam
    update      -lr(step) * lr_scale * (direction + weight_decay * parameter)

Decay is decoupled (arXiv:1711.05101) and, as in PyTorch, multiplied by the learning rate.
The routers' `balance_bias` takes `-balance_rate * sign(gradient)` instead, its "gradient"
being the load's excess (arXiv:2408.15664); it is outside the norm, clipping and decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.kernels.rows import norm
from gptjax.optim import adafactor, adam, ema, groups, guard, muon, schedule, zeros
from gptjax.optim.groups import GroupConfig, Treatment
from gptjax.optim.zeros import GradualConfig
from gptjax.types import Array, Params


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters are updated.

    Attributes:
      learning_rate: the schedule's peak. Muon's update has the RMS of Adam's, so one rate
        serves all parameters; use `groups` for embeddings that want another.
      schedule: see `optim.schedule` for formulas.
      warmup_steps: steps until the peak.
      final_lr_scale: the last learning rate over the peak.
      weight_decay: on matrices and the head; see `groups`.
      clip_norm: gradients are scaled down to this global norm; None does not.
      b1: momentum of AdamW, of Lion, and of the AdamW part of Muon (whose own is 0.95); for
        Adafactor, 0 saves its memory.
      b2: decay of the second moment (of Lion's momentum); Adafactor's cap on it.
      decay_fraction: the last part of the run in which `wsd`, `wsd_sqrt` and `rsqrt` come down.
      ema_decay: of the average of the parameters; 0 keeps none.
      skip_sigma: a step whose loss or gradient norm is that many deviations above the recent
        mean is skipped; None skips non-finite steps only.
      groups: in the order of matching; see `optim.groups`.
      zeros: `kept` leaves weights of kernels that are 0 at 0, as recovery after pruning needs.
      prune: removes weights during training, and keeps zeros; see `optim.zeros`.
    """

    name: Literal["adamw", "adafactor", "lion", "muon"]
    learning_rate: float
    schedule: schedule.Shape
    warmup_steps: int
    final_lr_scale: float
    weight_decay: float
    clip_norm: float | None
    b1: float
    b2: float
    decay_fraction: float = 0.2
    ema_decay: float = 0.0
    skip_sigma: float | None = None
    groups: tuple[GroupConfig, ...] = groups.EVERYTHING
    zeros: Literal["trained", "kept"] = "trained"
    prune: GradualConfig | None = None

    def __post_init__(self) -> None:
        for name in ("b1", "b2", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0 and below 1")
        # Written so that NaN, of which every comparison is false, is refused.
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate}: expected above 0 and finite")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay}: expected at least 0 and finite")
        for name in ("clip_norm", "skip_sigma"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"{name}={value}: expected above 0; None switches it off")
        if self.prune is not None and self.ema_decay:
            raise ValueError(
                f"ema_decay={self.ema_decay}: an average over steps that remove weights has no zeros; "
                "expected 0 with prune"
            )


class Optimizer(NamedTuple):
    """The transformation, and the learning rate that it applies at each step."""

    tx: optax.GradientTransformationExtraArgs
    schedule: schedule.Schedule


def build(
    cfg: OptimConfig, abstract_params: Params, param_axes: Params, *, num_steps: int, balance_rate: float | None = None
) -> Optimizer:
    """The optimizer of a run of `num_steps` updates.

    `tx.update(grads, state, params, loss=loss)` returns updates to add to the parameters;
    `guard.stats(state)` and `ema.averaged_params(state, params)` read the state.

    Args:
      abstract_params: only paths and shapes are read.
      param_axes: the same tree with tuples of logical axis names.
      balance_rate: step of the routers' `balance_bias`; needed where there are any.

    Raises:
      ValueError: if a parameter has no group, a group no parameter, or `balance_rate` is missing.
    """
    treatments = groups.assign(cfg.groups, abstract_params, param_axes, weight_decay=cfg.weight_decay)
    balanced = [path for path, t in treatments.items() if t.kind == "balance_bias" and not t.freeze]
    if balanced and balance_rate is None:
        raise ValueError(f"balance_rate: missing, but {balanced[0]!r} is moved by it; pass the model's balance_rate")
    rate = schedule.make(
        cfg.schedule,
        cfg.learning_rate,
        num_steps=num_steps,
        warmup_steps=cfg.warmup_steps,
        final_scale=cfg.final_lr_scale,
        decay_fraction=cfg.decay_fraction,
    )
    parts = [_clip(cfg.clip_norm, treatments), _directions(cfg, treatments, balance_rate), _descend(rate, treatments)]
    pruned = zeros.pruned_layouts(treatments)
    if cfg.prune is not None:
        if cfg.prune.last_step >= num_steps:
            raise ValueError(f"prune.last_step={cfg.prune.last_step}: expected below num_steps={num_steps}")
        shapes = {groups.path_of(path): p.shape for path, p in jax.tree_util.tree_leaves_with_path(abstract_params)}
        parts.append(zeros.prune_gradually(cfg.prune, pruned, shapes))
    inner = optax.chain(*parts)
    tx = guard.guard(
        inner,
        sigma=cfg.skip_sigma,
        norm_fn=lambda grads: norm(_clipped_leaves(grads, treatments)),
        # Gradients of frozen parameters are not read, so that XLA need not compute them.
        finite_fn=lambda grads: jnp.isfinite(norm(_leaves(grads, lambda p: not treatments[p].freeze))),
    )
    if cfg.zeros == "kept" or cfg.prune is not None:
        tx = zeros.keep_zeros(tx, kept_fn=pruned.__contains__)
    if cfg.ema_decay:
        tx = ema.ema(tx, decay=cfg.ema_decay, averaged_fn=lambda path: not treatments[path].freeze)
    return Optimizer(tx, rate)


def _clip(clip_norm: float | None, treatments: Mapping[str, Treatment]) -> optax.GradientTransformation:
    def clip(grads: Params, params: Params | None) -> Params:
        del params
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        if clip_norm is None:
            return grads
        factor = clip_norm / jnp.maximum(norm(_clipped_leaves(grads, treatments)), clip_norm)
        return _map_with_path(lambda path, g: g * factor if _is_clipped(treatments[path]) else g, grads)

    return optax.stateless(clip)


def _directions(
    cfg: OptimConfig, treatments: Mapping[str, Treatment], balance_rate: float | None
) -> optax.GradientTransformation:
    layouts = {path: t.layout for path, t in treatments.items()}
    matrices = {path: t.layout for path, t in treatments.items() if t.kind == "matrix" and t.layout}
    main = {
        "adamw": lambda: adam.scale_by_adam(cfg.b1, cfg.b2),
        "muon": lambda: adam.scale_by_adam(cfg.b1, cfg.b2),
        "lion": lambda: guard.keeping(optax.scale_by_lion(cfg.b1, cfg.b2)),
        "adafactor": lambda: guard.keeping(_adafactor(cfg, layouts)),
    }[cfg.name]()

    def label(path: str) -> str:
        treatment = treatments[path]
        if treatment.freeze:
            return "frozen"
        if treatment.kind == "balance_bias":
            return "balance"
        return "muon" if cfg.name == "muon" and treatment.kind == "matrix" else "main"

    return optax.partition(
        {
            "main": main,
            "muon": muon.scale_by_muon(matrices),
            "balance": optax.stateless(
                lambda grads, params: jax.tree.map(lambda g: -(balance_rate or 0.0) * jnp.sign(g), grads)
            ),
            "frozen": optax.set_to_zero(),
        },
        lambda params: _map_with_path(lambda path, p: label(path), params),
    )


def _adafactor(cfg: OptimConfig, layouts: Mapping[str, Any]) -> optax.GradientTransformation:
    direction = adafactor.scale_by_adafactor(layouts, b2=cfg.b2)
    return optax.chain(direction, optax.ema(cfg.b1, debias=False)) if cfg.b1 else direction


def _descend(rate: schedule.Schedule, treatments: Mapping[str, Treatment]) -> optax.GradientTransformationExtraArgs:
    def update(
        directions: Params, state: optax.EmptyState, params: Params | None = None, *, step: Array, **extra: Any
    ) -> tuple[Params, optax.EmptyState]:
        lr = rate(step)

        def descend(key_path: tuple[Any, ...], u: Array, p: Array) -> Array:
            treatment = treatments[groups.path_of(key_path)]
            if treatment.freeze or treatment.kind == "balance_bias":
                return u
            return -lr * treatment.lr_scale * (u + treatment.weight_decay * p if treatment.weight_decay else u)

        return jax.tree_util.tree_map_with_path(descend, directions, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _is_clipped(treatment: Treatment) -> bool:
    return not treatment.freeze and treatment.kind != "balance_bias"


def _clipped_leaves(grads: Params, treatments: Mapping[str, Treatment]) -> list[Array]:
    return _leaves(grads, lambda path: _is_clipped(treatments[path]))


def _leaves(tree: Params, wanted_fn: Callable[[str], bool]) -> list[Array]:
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if wanted_fn(groups.path_of(path))]


def _map_with_path(fn: Callable[[str, Any], Any], tree: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(groups.path_of(path), leaf), tree)
