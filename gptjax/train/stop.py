"""Stopping on request: SIGTERM (a preempted machine) and SIGINT (Ctrl-C) end a run after the current step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils


class StopRequest:
    """A context in which the two signals set a flag that every host reads alike.

    Alone, a process handles both signals itself. In a job of several processes they must all
    stop after the same step, or the ones that go on wait for the others forever: there
    JAX's preemption service catches SIGTERM on any host and picks a step that none has
    passed, and SIGINT is turned into SIGTERM. A second SIGINT aborts at once.

    Outside the main thread Python allows no signal handlers, and only a job of several
    processes can be stopped.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._install(signal.SIGINT)
            if jax.process_count() == 1:
                self._install(signal.SIGTERM)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def agreed(self, step: int) -> bool:
        """True when every host is to stop after `step`; each must ask after every step."""
        if jax.process_count() == 1:
            return self._signal is not None
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def _install(self, number: int) -> None:
        self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        again = "; again to abort without saving" if number == signal.SIGINT else ""
        logging.warning("%s: saving and stopping after this step%s", signal.Signals(number).name, again)
        self._signal = number
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
