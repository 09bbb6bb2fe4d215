"""The live line while text is tokenised."""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

_PLAIN_SECONDS = 10


class Progress(NamedTuple):
    """How far writing a store has come; the rate is of this run only, found shards cost no time."""

    num_documents: int
    num_bytes: int
    num_tokens: int
    tokens_per_second: float


class ProgressLine:
    """Prints `Progress`: one line written over on a terminal, elsewhere a new one every ten seconds."""

    def __init__(self, label: str, expected_bytes: float | None):
        """With the bytes of text to expect, the time left is shown."""
        self._label = label
        self._expected_bytes = expected_bytes
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        on_terminal = sys.stderr.isatty()
        if not on_terminal and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _PLAIN_SECONDS
        line = f"{self._label}: {self.text(progress)}"
        print(f"\r{line}\033[K" if on_terminal else line, end="" if on_terminal else "\n", file=sys.stderr, flush=True)

    def text(self, progress: Progress) -> str:
        """The line without its label."""
        parts = [
            f"{progress.num_documents:,} documents",
            f"{progress.num_bytes / 1e6:,.1f} MB",
            f"{progress.num_tokens:,} tokens",
            f"{progress.tokens_per_second:,.0f} tokens/s",
        ]
        if self._expected_bytes and progress.tokens_per_second:
            bytes_per_second = progress.tokens_per_second * progress.num_bytes / progress.num_tokens
            parts.append(f"{max(0.0, self._expected_bytes - progress.num_bytes) / bytes_per_second:,.0f} s left")
        return ", ".join(parts)

    def close(self) -> None:
        """Leaves the line on the terminal."""
        if sys.stderr.isatty():
            print(file=sys.stderr, flush=True)
