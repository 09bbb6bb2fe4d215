"""What Orbax says: its log and its errors, cut to what a user needs."""

from __future__ import annotations

import logging


def first_line(error: Exception) -> str:
    """The error's first line; TensorStore's go on for pages."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def quiet_orbax() -> None:
    """Drops Orbax's narration of every thread; its warnings pass."""
    logger = logging.getLogger("absl")
    if _is_not_narration not in logger.filters:
        logger.addFilter(_is_not_narration)


def _is_not_narration(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "/orbax/" not in record.pathname
