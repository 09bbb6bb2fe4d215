"""One live line on long work: written over on a terminal, elsewhere a new one every ten seconds."""

from __future__ import annotations

import sys
import time

_PLAIN_SECONDS = 10
_STEADY_SECONDS = 2


class Line:
    """A line on standard error."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._next = 0.0

    def show(self, text: str) -> None:
        on_terminal = sys.stderr.isatty()
        if not on_terminal and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _PLAIN_SECONDS
        line = f"{self._label}: {text}"
        print(f"\r{line}\033[K" if on_terminal else line, end="" if on_terminal else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the line on the terminal."""
        if sys.stderr.isatty():
            print(file=sys.stderr, flush=True)


class BytesLine(Line):
    """How much of a known number of bytes is done, at which rate, and how long the rest will take."""

    def __init__(self, label: str, num_bytes: int) -> None:
        super().__init__(label)
        self._num_bytes = num_bytes
        self._done = self._before = 0
        self._began = time.monotonic()

    def skip(self, num_bytes: int) -> None:
        """Counts bytes that were done before, which took no time now."""
        self._done += num_bytes
        self._before += num_bytes

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        rate = (self._done - self._before) / max(time.monotonic() - self._began, 1e-9)
        left = (self._num_bytes - self._done) / max(rate, 1.0)
        is_known = time.monotonic() - self._began > _STEADY_SECONDS  # the first bytes wait for what is set up
        unit, name = (1e9, "GB") if self._num_bytes >= 1e9 else (1e6, "MB")
        done, total = self._done / unit, self._num_bytes / unit
        text = f"{done:,.2f} of {total:,.2f} {name}"
        self.show(text + (f", {rate / 1e6:,.0f} MB/s, {left:,.0f} s left" if is_known else ""))
