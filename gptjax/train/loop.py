"""The one training loop.

Order of a step: hooks hear of it, a batch is taken, the step is dispatched, and only then are
the figures of the *previous* step read, so that an accelerator always has the next
step queued while the host logs. Hooks that need the state (evaluation, checkpoints) wait for the
step they asked for, and see it only after its figures were found healthy; where they were not
finite, after the next step whose are.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from gptjax.train.health import DivergedError, Health, describe
from gptjax.train.hooks import Hook
from gptjax.train.state import TrainState
from gptjax.train.step import OptimizerLike, StepFn, jit_train_step
from gptjax.train.stop import StopRequest
from gptjax.train.task import MixFn, RenewFn
from gptjax.train.throughput import Throughput
from gptjax.types import Batch, Metrics, Objective

Outcome = Literal["finished", "stopped", "out_of_data"]


class FitResult(NamedTuple):
    """How a run ended.

    Attributes:
      state: after the last step.
      step: the last step, from 1.
      outcome: `finished` all steps, `stopped` by a signal, or `out_of_data`.
      values: the newest figures, by name.
    """

    state: TrainState
    step: int
    outcome: Outcome
    values: Mapping[str, float]


def fit(
    objective: Objective,
    optimizer: OptimizerLike,
    state: TrainState,
    batches: Iterator[Batch],
    *,
    num_steps: int,
    seed: int = 0,
    frozen: Any = (),
    accumulate_steps: int = 1,
    log_every: int = 1,
    hooks: Sequence[Hook] = (),
    throughput: Throughput | None = None,
    mix_fn: MixFn | None = None,
    renew_fn: RenewFn | None = None,
) -> FitResult:
    """Trains until `num_steps`, counted from the beginning of the run, not from `state.step`.

    Call it under the mesh and the rules that laid out `state`, whose buffers it takes over.

    Args:
      batches: those of the steps after `state.step`; global arrays, or numpy on a single host.
      frozen: passed to the objective untouched, such as a teacher's parameters.
      log_every: steps between the figures given to the hooks; step 1 and the last are too.
      mix_fn, renew_fn: see `train.task`; None of them leaves batches and state as they are.

    Raises:
      DivergedError: when the run no longer trains; no hook saw a state from after it went wrong.
    """
    step_fn = jit_train_step(objective, optimizer, state, accumulate_steps=accumulate_steps, seed=seed, mix_fn=mix_fn)
    return run_steps(
        step_fn,
        state,
        batches,
        num_steps=num_steps,
        frozen=frozen,
        log_every=log_every,
        hooks=hooks,
        throughput=throughput,
        renew_fn=renew_fn,
    )


def run_steps(
    step_fn: StepFn,
    state: TrainState,
    batches: Iterator[Batch],
    *,
    num_steps: int,
    frozen: Any = (),
    log_every: int = 1,
    hooks: Sequence[Hook] = (),
    throughput: Throughput | None = None,
    renew_fn: RenewFn | None = None,
) -> FitResult:
    """`fit` for a step function that is already made."""
    step = int(state.step)
    outcome: Outcome = "finished"
    report = _Report(hooks, throughput or Throughput(), log_every=log_every, num_steps=num_steps)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        for hook in hooks:
            stack.callback(hook.close)
        while step < num_steps:
            for hook in hooks:
                hook.before_step(step + 1)
            batch = report.take(batches)
            if batch is None:
                outcome = "out_of_data"
                break
            state = state if renew_fn is None else renew_fn(step, state)
            state, metrics = step_fn(state, frozen, batch)
            step += 1
            with _located(state):
                report.dispatched(step, metrics)
                report.show_state(step, state)
            if step < num_steps and stop.agreed(step):
                outcome = "stopped"
                break
        with _located(state):
            report.finish(step, state, outcome)
    return FitResult(state, step, outcome, report.values)


@contextlib.contextmanager
def _located(state: TrainState) -> Iterator[None]:
    """Adds to a divergence which parameters it has reached."""
    try:
        yield
    except DivergedError as error:
        raise DivergedError(f"{error} {describe(state.params)}") from None


class _Report:
    """What the loop has yet to read, and whom it tells."""

    def __init__(self, hooks: Sequence[Hook], throughput: Throughput, *, log_every: int, num_steps: int) -> None:
        self.values: dict[str, float] = {}
        self._hooks = hooks
        self._throughput = throughput
        self._log_every = log_every
        self._num_steps = num_steps
        self._health = Health()
        self._pending: tuple[int, Metrics] | None = None
        self._unshown: tuple[int, dict[str, float]] | None = None
        self._due: list[Hook] = []
        self._loader_seconds = 0.0
        self._num_loads = 0

    def take(self, batches: Iterator[Batch]) -> Batch | None:
        started = time.perf_counter()
        batch = next(batches, None)
        self._loader_seconds += time.perf_counter() - started
        self._num_loads += 1
        return batch

    def dispatched(self, step: int, metrics: Metrics) -> None:
        """Reads the figures of the step before, now that the device has `step` to work on."""
        for leaf in jax.tree.leaves(metrics):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        previous, self._pending = self._pending, (step, metrics)
        if previous is not None:
            self._read(*previous)

    def drain(self) -> None:
        """Waits for the newest step's figures."""
        if self._pending is not None:
            self._read(*self._pending)
            self._pending = None

    def show_state(self, step: int, state: TrainState) -> None:
        self._due += [hook for hook in self._hooks if hook not in self._due and hook.wants_state(step)]
        if not self._due:
            return
        self.drain()
        if self._health.num_doubtful:
            return
        due, self._due = self._due, []
        started = time.perf_counter()
        for hook in due:
            self._publish(step, hook.on_state(step, state))
        self._throughput.skip(time.perf_counter() - started)

    def finish(self, step: int, state: TrainState, outcome: Outcome) -> None:
        self.drain()
        self._health.check_end(step)
        if self._unshown is not None:
            self._show(*self._unshown)
        for hook in self._hooks:
            self._publish(step, hook.on_end(step, state, outcome))

    def _read(self, step: int, metrics: Metrics) -> None:
        values = _values(jax.device_get(metrics))
        self._health.check(step, values)
        self._throughput.step_done(values.get("tokens", 0.0))
        for hook in self._hooks:
            hook.on_step(step, values)
        values.pop("skipped", None)  # of this step alone; `skipped_steps` is the figure to log
        if step == 1 or step == self._num_steps or step % self._log_every == 0:
            self._show(step, values)
        else:
            self._unshown = (step, values)

    def _show(self, step: int, values: dict[str, float]) -> None:
        self._unshown = None
        values |= self._throughput.read()
        values["loader_wait_seconds"] = self._loader_seconds / max(self._num_loads, 1)
        self._loader_seconds, self._num_loads = 0.0, 0
        self._publish(step, values)

    def _publish(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            self.values |= values
            for hook in self._hooks:
                hook.on_values(step, values)


def _values(metrics: Metrics) -> dict[str, float]:
    """Scalars by name; an array of means becomes its extremes, a mean over nothing is left out."""
    values: dict[str, float] = {}
    for name, mean in metrics.items():
        if np.ndim(mean.total):
            means = mean.total / np.maximum(mean.count, 1.0)
            values |= {f"{name}/min": float(np.min(means)), f"{name}/max": float(np.max(means))}
        elif mean.count:
            values[name] = float(mean.value)
    return values
