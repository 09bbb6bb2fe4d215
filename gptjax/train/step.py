"""One optimizer step, and one evaluation step, as pure functions of what they read.

    loss     = sum over microbatches of objective.total / sum over microbatches of objective.weight
    gradient = d loss / d params

An objective is a sum over target tokens, so the gradient of a large batch is the same whether
it is computed at once, over microbatches or over devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from gptjax.kernels import rows
from gptjax.optim import guard
from gptjax.parallel import rules
from gptjax.train.state import TrainState, shardings_of
from gptjax.train.task import MixFn
from gptjax.types import Array, Batch, Mean, Metrics, Objective, Params

StepFn = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]
EvalFn = Callable[[Params, Any, Batch, Array], Metrics]


class OptimizerLike(Protocol):
    """What a step needs of `optim.build.Optimizer`; there is a guard somewhere in `tx`."""

    @property
    def tx(self) -> optax.GradientTransformation: ...

    @property
    def schedule(self) -> Callable[[Array], Array]: ...


class _Sums(NamedTuple):
    """What adds up over microbatches."""

    grads: Params
    total: Array
    weight: Array
    metrics: Metrics
    tokens: Array


def train_step(
    objective: Objective,
    optimizer: OptimizerLike,
    *,
    accumulate_steps: int = 1,
    seed: int = 0,
    param_shardings: Any = None,
    mix_fn: MixFn | None = None,
) -> StepFn:
    """The function `(state, frozen, batch) -> (state, metrics)` of one optimizer step; not jitted.

    Microbatch `i` of step `k` draws from `fold_in(fold_in(key(seed), k), i)`. Metrics, besides the
    objective's own: `learning_rate`, `tokens` (those of a document, padding aside), the 2-norms
    `grad_norm` (before clipping, of what is clipped) and `param_norm`, and from the
    guard `skipped` (1 if this step changed nothing) and `skipped_steps` (so far).

    Args:
      param_shardings: pins the gradients to the parameters' layout, so that sharded parameters get
        reduce-scattered gradients and never a whole copy; None leaves that to the compiler.
      mix_fn: of `Carried`; None leaves batches as they are.
    """
    tx = optax.with_extra_args_support(optimizer.tx)

    def run(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = batch if mix_fn is None else mix_fn(batch, state.extra, state.step)

        def sums_of(microbatch: Batch, index: Array | int) -> _Sums:
            return _loss_and_grads(objective, state, frozen, microbatch, jax.random.fold_in(rng, index))

        sums = sums_of(batch, 0) if accumulate_steps == 1 else _accumulate(sums_of, batch, accumulate_steps)
        # A batch without targets has sums of zero: it must leave the gradient zero, not 0 / 0.
        weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
        grads = jax.tree.map(lambda g: (g / weight).astype(g.dtype), sums.grads)
        if param_shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, param_shardings)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, loss=sums.total / weight)
        params = optax.apply_updates(state.params, updates)
        before, after = guard.stats(state.opt_state), guard.stats(opt_state)
        figures = {
            "tokens": sums.tokens,
            "learning_rate": optimizer.schedule(state.step),
            "grad_norm": after.grad_norm,
            "param_norm": rows.norm(params),
            "skipped": 1 - (after.applied - before.applied),
            "skipped_steps": after.nonfinite + after.spikes,
        }
        metrics = sums.metrics | {name: _single(value) for name, value in figures.items()}
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return run


def jit_train_step(
    objective: Objective,
    optimizer: OptimizerLike,
    state: TrainState,
    *,
    accumulate_steps: int = 1,
    seed: int = 0,
    mix_fn: MixFn | None = None,
) -> StepFn:
    """`train_step` compiled for the layout of `state`, whose buffers each call takes over.

    Call it under the mesh and the partitioning rules that laid the state out.
    """
    shardings = shardings_of(state)
    run = train_step(
        objective,
        optimizer,
        accumulate_steps=accumulate_steps,
        seed=seed,
        param_shardings=shardings.params,
        mix_fn=mix_fn,
    )
    # Without the input layout a fresh state, committed to no device yet, and the state that the first
    # step returns would be two signatures, and compile twice.
    return jax.jit(run, donate_argnums=0, in_shardings=(shardings, None, None), out_shardings=(shardings, None))


def eval_step(objective: Objective) -> EvalFn:
    """The function `(params, frozen, batch, rng) -> metrics` of one evaluation batch; not jitted."""

    def run(params: Params, frozen: Any, batch: Batch, rng: Array) -> Metrics:
        return objective(params, frozen, batch, rng, jnp.zeros((), jnp.int32)).metrics

    return run


def _loss_and_grads(objective: Objective, state: TrainState, frozen: Any, batch: Batch, rng: Array) -> _Sums:
    def loss_fn(params: Params) -> tuple[Array, tuple[Array, Metrics]]:
        loss = objective(params, frozen, batch, rng, state.step)
        return loss.total, (loss.weight, loss.metrics)

    (total, (weight, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    tokens = jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)
    return _Sums(grads, total, weight, metrics, tokens)


def _accumulate(sums_of: Callable[[Batch, Array], _Sums], batch: Batch, num: int) -> _Sums:
    microbatches = jax.tree.map(lambda x: _split(x, num), batch)
    first = jax.eval_shape(sums_of, jax.tree.map(lambda x: x[0], microbatches), jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

    def add(sums: _Sums, item: tuple[Array, Batch]) -> tuple[_Sums, None]:
        index, microbatch = item
        return jax.tree.map(jnp.add, sums, sums_of(microbatch, index)), None

    return jax.lax.scan(add, zeros, (jnp.arange(num), microbatches))[0]


def _split(x_BT: Array, num: int) -> Array:
    """`[B, T, ...] -> [num, B / num, T, ...]`, microbatch `i` having the rows `i, i + num, i + 2 num, ...`.

    Strided rows keep every microbatch spread over all devices: a device's rows are contiguous, so a
    contiguous microbatch would belong to a few devices and have to be moved.
    """
    batch_size = x_BT.shape[0]
    if batch_size % num:
        raise ValueError(
            f"accumulate_steps={num} does not divide the batch of {batch_size} rows; "
            f"choose a batch_size that is a multiple of it"
        )
    split = x_BT.reshape(batch_size // num, num, *x_BT.shape[1:]).swapaxes(0, 1)
    return rules.constrain(split, None, "act_batch", "act_length", *[None] * (split.ndim - 3))


def _single(value: Array) -> Mean:
    return Mean(jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32))
