"""Runs other entry points one after the other in one directory, and adds up what they took."""

from __future__ import annotations

import fcntl
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from experiments import common
from gptjax.json_files import read_json, write_json
from gptjax.kernels import cpu
from gptjax.process import peak_memory_bytes


class Stages:
    """The stages of a job in `directory`, whose costs are kept in its `costs.json` over restarts.

    A lock makes sure that only one job works there. Its stages inherit it, so that after a `kill -9` of
    the job alone the next one waits for the stage that goes on.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = open(directory / "job.lock", "w", encoding="utf-8")  # noqa: SIM115
        _take(self._lock)
        self._path = directory / "costs.json"
        self._costs: dict[str, dict[str, float]] = read_json(self._path)

    def run(self, name: str, *arguments: str, label: str | None = None) -> None:
        """Runs `python -m experiments.<name>`; ends this process with its status if it is not 0.

        Its costs are kept under `label`, by default the name.
        """
        command = [sys.executable, "-m", f"experiments.{name}", *arguments]
        print(f"\n--- {shlex.join(command[1:])}", flush=True)
        began = time.perf_counter()
        environment, lock = cpu.start_environment(), [self._lock.fileno()]
        with subprocess.Popen(command, pass_fds=lock, env=environment) as process, _signals_to(process):
            status = process.wait()
        if status:
            hint = "" if status == common.FAILED else "; start the same command again to go on"
            print(f"{name} ended with status {status}{hint}", file=sys.stderr)
            sys.exit(status if status > 0 else 128 - status)
        peak = peak_memory_bytes(resource.RUSAGE_CHILDREN)
        self.add(label or name, seconds=time.perf_counter() - began, peak_memory_bytes=peak)

    def add(self, name: str, **costs: float) -> None:
        """Notes costs of a stage; of two notes the larger stays."""
        known = self._costs.get(name, {})
        self._costs[name] = known | {key: max(value, known.get(key, 0.0)) for key, value in costs.items()}
        write_json(self._path, self._costs)

    def total(self) -> dict[str, float]:
        """Of all stages: the sum of their `wall_seconds`, and the largest `peak_memory_bytes`."""
        return {
            "wall_seconds": sum(costs.get("seconds", 0.0) for costs in self._costs.values()),
            "peak_memory_bytes": max(costs.get("peak_memory_bytes", 0) for costs in self._costs.values()),
        }


def plan(directory: Path, *, minutes: float, make_fn: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make_fn` planned for so many minutes of training; made once and kept, since a machine's speed varies.

    Raises:
      ValueError: if it was made for another time.
    """
    path = directory / "plan.json"
    if not path.exists():
        write_json(path, {"train_minutes": minutes, **make_fn()})
    found = read_json(path)
    if found["train_minutes"] != minutes:
        raise ValueError(
            f"{path}: this was planned for {found['train_minutes']:g} minutes, got --train_minutes={minutes:g}; "
            "choose another --workdir"
        )
    return found


def _take(lock: TextIO) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting: another process works in this directory ({lock.name} is locked)", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


@contextmanager
def _signals_to(process: subprocess.Popen) -> Iterator[None]:
    """Leaves stopping to the stage: it has got Ctrl-C itself, and a SIGTERM is passed on."""

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGTERM:
            process.terminate()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
