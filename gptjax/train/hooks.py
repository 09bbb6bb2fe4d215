"""What may happen between steps: progress line, profiler window, evaluation, checkpoints."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import jax
from absl import logging

from gptjax.train.state import TrainState

Values = Mapping[str, float]


def _log(text: str) -> None:
    logging.info("%s", text)


class Hook:
    """Does nothing; a hook overrides what it is for. Every host calls every hook alike."""

    def before_step(self, step: int) -> None:
        """Called before `step` (from 1) is dispatched."""

    def on_step(self, step: int, values: Values) -> None:
        """Given the figures of every step, one step late."""

    def on_values(self, step: int, values: Values) -> None:
        """Given the figures that are to be shown: those of every nth step, and those that hooks return."""

    def wants_state(self, step: int) -> bool:
        """Whether `on_state` is to be called after `step`; it makes the loop wait for the device."""
        return False

    def on_state(self, step: int, state: TrainState) -> Values:
        """Given the state after a healthy step, which may be a later one than the hook asked for.

        It must not keep the state: the next step reuses its memory.
        """
        return {}

    def on_end(self, step: int, state: TrainState, outcome: str) -> Values:
        """Given the last state of a run that ended well or was asked to stop."""
        return {}

    def close(self) -> None:
        """Called once, however the run ended."""


class ProgressLine(Hook):
    """Step of total, loss, gradient norm, learning rate, tokens/s, MFU and time left.

    On a terminal it is one live line, cut to its width; elsewhere a line each time.

    Args:
      log_fn: takes the lines that go elsewhere.
    """

    def __init__(self, *, num_steps: int, stream: TextIO | None = None, log_fn: Callable[[str], None] = _log) -> None:
        self._num_steps = num_steps
        self._log_fn = log_fn
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._open = False

    def on_values(self, step: int, values: Values) -> None:
        if "loss" not in values:
            self._line(evaluation_text(step, values))
            return
        if not self._live:
            self._log_fn(progress_text(step, self._num_steps, values))
            return
        # One column stays free: some terminals wrap after the last one, and a wrapped line cannot be erased.
        text = progress_text(step, self._num_steps, values, width=_columns(self._stream) - 1)
        # Carriage return and "erase line": a shorter text leaves no tail of the longer one before.
        self._stream.write(f"\r\x1b[2K{text}")
        self._stream.flush()
        self._open = True

    def close(self) -> None:
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False

    def _line(self, text: str) -> None:
        if not self._live:
            self._log_fn(text)
            return
        self._stream.write(f"\r\x1b[2K{text}\n")
        self._stream.flush()
        self._open = False


def progress_text(step: int, num_steps: int, values: Values, *, width: int | None = None) -> str:
    """The progress line's text; figures that are not known yet are left out, and those that find no room.

    Args:
      width: columns that it may take; None is no limit.
    """
    parts = {"step": f"step {step:>{len(str(num_steps))}}/{num_steps}", "loss": f"loss {values['loss']:.4f}"}
    if "grad_norm" in values:
        parts["grad"] = f"grad {values['grad_norm']:.3g}"
    if "learning_rate" in values:
        parts["lr"] = f"lr {values['learning_rate']:.2e}"
    if "tokens_per_second" in values:
        parts["speed"] = f"{values['tokens_per_second']:,.0f} tok/s"
    if "mfu" in values:
        parts["mfu"] = f"MFU {100 * values['mfu']:.1f} %"
    if "step_seconds" in values:
        parts["eta"] = f"ETA {_clock_text((num_steps - step) * values['step_seconds'])}"
    for name in ("lr", "grad", "mfu", "speed", "eta"):
        if width is not None and len("  ".join(parts.values())) > width:
            parts.pop(name, None)
    return "  ".join(parts.values())[:width]


def evaluation_text(step: int, values: Values) -> str:
    """One line for figures that are not a training step's."""
    return f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in values.items())


class Profiler(Hook):
    """Records a `jax.profiler` trace of the steps `first` to `last`, both included, and of no other."""

    def __init__(self, directory: str, *, first: int, last: int) -> None:
        self._directory = directory
        self._first, self._last = first, last
        self._recording = False

    def before_step(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._directory)
            self._recording = True

    def wants_state(self, step: int) -> bool:
        # The device may still be at work on the step before the window when the host is past it.
        return step == self._first - 1 or (self._recording and step == self._last)

    def on_state(self, step: int, state: TrainState) -> Values:
        jax.block_until_ready(state.params)
        if step == self._last:
            self.close()
        return {}

    def close(self) -> None:
        if self._recording:
            jax.profiler.stop_trace()
            self._recording = False
            logging.info("profile of steps %d to %d in %s", self._first, self._last, self._directory)


class Evaluation(Hook):
    """Figures of the parameters on held-out data, every `every` steps and at the end.

    Args:
      evaluate: state -> figures by name, such as `eval/loss`.
      every: 0 evaluates at the end only.
    """

    def __init__(self, evaluate: Callable[[TrainState], Values], *, every: int) -> None:
        self._evaluate = evaluate
        self._every = every
        self._last_step = -1

    def wants_state(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0

    def on_state(self, step: int, state: TrainState) -> Values:
        self._last_step = step
        started = time.perf_counter()
        values = dict(self._evaluate(state))
        return values | {"eval/seconds": time.perf_counter() - started}

    def on_end(self, step: int, state: TrainState, outcome: str) -> Values:
        # A preempted machine has seconds left, which belong to the checkpoint.
        if outcome == "stopped" or step == self._last_step:
            return {}
        return self.on_state(step, state)


class Checkpoints(Hook):
    """Saves the state every `every` steps, at the end, and when asked to stop.

    Args:
      save: `(step, state)`; may return before the checkpoint is on disk.
      wait: returns when everything saved is on disk.
      every: 0 saves at the end only.
    """

    def __init__(
        self, save: Callable[[int, TrainState], Any], wait: Callable[[], Any], *, every: int, last_step: int = 0
    ) -> None:
        self._save = save
        self._wait = wait
        self._every = every
        self._last_step = last_step

    def wants_state(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0

    def on_state(self, step: int, state: TrainState) -> Values:
        started = time.perf_counter()
        self._save(step, state)
        self._last_step = step
        return {"checkpoint/seconds": time.perf_counter() - started}

    def on_end(self, step: int, state: TrainState, outcome: str) -> Values:
        del outcome
        return {} if step == self._last_step else self.on_state(step, state)

    def close(self) -> None:
        self._wait()


def _columns(stream: TextIO) -> int:
    """Of the terminal now, as it may have been resized; 80 where it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _clock_text(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
