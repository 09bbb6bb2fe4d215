"""The live line while text is tokenised."""

from __future__ import annotations

from typing import NamedTuple

from gptjax.progress import Line


class Progress(NamedTuple):
    """How far writing a store has come; the rate is of this run only, found shards cost no time."""

    num_documents: int
    num_bytes: int
    num_tokens: int
    tokens_per_second: float


class ProgressLine(Line):
    """Shows `Progress`."""

    def __init__(self, label: str, expected_bytes: float | None):
        """With the bytes of text to expect, the time left is shown."""
        super().__init__(label)
        self._expected_bytes = expected_bytes

    def __call__(self, progress: Progress) -> None:
        self.show(self.text(progress))

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
