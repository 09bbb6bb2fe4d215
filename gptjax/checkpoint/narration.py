"""What Orbax says: its log and its errors, cut to what a user needs."""

from __future__ import annotations

import errno
import logging
import os

_FULL = os.strerror(errno.ENOSPC)


def first_line(error: Exception) -> str:
    """The error's first line; TensorStore's go on for pages, with the cause at their end."""
    text = str(error).strip() or type(error).__name__
    return f"{_FULL}: make room, and start it again" if _FULL in text else text.splitlines()[0][:300]


def quiet_orbax() -> None:
    """Drops Orbax's narration of every thread, and tracebacks of errors that it raises too; its warnings pass."""
    for name, keep in (("absl", _is_not_orbax), ("asyncio", _is_not_unretrieved)):
        logger = logging.getLogger(name)
        if keep not in logger.filters:
            logger.addFilter(keep)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return record.levelno == logging.WARNING or "/orbax/" not in record.pathname


def _is_not_unretrieved(record: logging.LogRecord) -> bool:
    # Of several writes that fail alike, one is reported.
    return "exception was never retrieved" not in record.getMessage()
