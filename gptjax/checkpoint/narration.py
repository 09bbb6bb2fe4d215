"""What Orbax says: its log and its errors, cut to what a user needs."""

from __future__ import annotations

import errno
import logging
import os
import traceback

_FULL = os.strerror(errno.ENOSPC)


def first_line(error: Exception) -> str:
    """The error's first line; TensorStore's go on for pages, with the cause at their end."""
    text = str(error).strip() or type(error).__name__
    return (
        f"{_FULL}: make room, and start it again"
        if _FULL in text
        else text.splitlines()[0].partition(" See full TensorStore details")[0][:300]
    )


def quiet_orbax() -> None:
    """Drops Orbax's narration of every thread, and tracebacks of errors that it raises too; its warnings pass."""
    for name, keep in (("absl", _is_not_orbax), ("asyncio", _is_not_unretrieved)):
        logger = logging.getLogger(name)
        if keep not in logger.filters:
            logger.addFilter(keep)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    if "/orbax/checkpoint/" not in record.pathname:
        return True
    raised_too = record.pathname.endswith(("/future.py", "/async_checkpointer.py"))
    return record.levelno == logging.WARNING or (record.levelno > logging.WARNING and not raised_too)


def _is_not_unretrieved(record: logging.LogRecord) -> bool:
    # Of several writes that fail alike, one is reported.
    if "exception was never retrieved" not in record.getMessage() or not record.exc_info:
        return True
    frames = traceback.extract_tb(record.exc_info[2])
    return not any("/orbax/checkpoint/" in frame.filename for frame in frames)
