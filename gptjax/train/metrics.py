"""Writing a run's figures: `metrics.jsonl`, the record, and TensorBoard, the picture.

A resumed run continues the record where its checkpoint was taken: lines of later steps, written
before the run was killed, are dropped, because they are about to be computed again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from gptjax.train.hooks import Hook, Values

FLUSH_SECONDS = 60.0


class MetricsWriter(Hook):
    """Appends one JSON object a line, `{"step": ..., name: value, ...}`, and TensorBoard scalars.

    Numbers that JSON has no word for (NaN, infinities) are written as null.

    Args:
      workdir: gets `metrics.jsonl` and `tensorboard/`.
      start_step: the step that the run starts or resumes after.
    """

    def __init__(self, workdir: epath.PathLike, *, start_step: int) -> None:
        path = epath.Path(workdir) / "metrics.jsonl"
        kept = [line for line in _lines(path) if line["step"] <= start_step]
        self._file = _RemoteLines(path, kept) if "://" in str(path) else _LocalLines(path, kept)
        self._tensorboard = _tensorboard(str(epath.Path(workdir) / "tensorboard"), start_step)

    def on_values(self, step: int, values: Values) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.append({"step": step} | numbers)
        if self._tensorboard is not None:
            self._tensorboard.append(step, values)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line cut short by a kill is left out."""
    return _lines(epath.Path(workdir) / "metrics.jsonl")


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a JSON file that is never seen half-written."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


class _LocalLines:
    """Each line is handed to the operating system at once, so that a killed process loses none."""

    def __init__(self, path: epath.Path, kept: list[dict[str, Any]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.parent / f"{path.name}.partial"
        partial.write_text("".join(map(_text, kept)))
        partial.replace(path)
        self._stream = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def append(self, line: Mapping[str, Any]) -> None:
        self._stream.write(_text(line))

    def close(self) -> None:
        self._stream.close()


class _RemoteLines:
    """Object stores cannot append, so the whole file is rewritten, at most once a minute."""

    def __init__(self, path: epath.Path, kept: list[dict[str, Any]]) -> None:
        self._path = path
        self._lines = [_text(line) for line in kept]
        self._written_at = -math.inf

    def append(self, line: Mapping[str, Any]) -> None:
        self._lines.append(_text(line))
        if time.monotonic() - self._written_at > FLUSH_SECONDS:
            self.close()

    def close(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("".join(self._lines))
        self._written_at = time.monotonic()


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _lines(path: epath.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    texts = path.read_text().splitlines(keepends=True)
    if texts and not texts[-1].endswith("\n"):
        texts.pop()
    return [json.loads(text) for text in texts]


class _TensorBoard:
    """TensorBoard's event files, written in the thread that asks.

    `tensorboardX.SummaryWriter` hands events to a thread through a bounded queue: once a full disk has ended
    the thread, the run waits for it forever.
    """

    def __init__(self, directory: str, start_step: int) -> None:
        from tensorboardX import event_file_writer, record_writer  # noqa: PLC0415  (slow; only the lead host needs it)
        from tensorboardX.proto import event_pb2, summary_pb2  # noqa: PLC0415

        self._event, self._summary = event_pb2, summary_pb2
        record_writer.directory_check(directory)
        self._writer = event_file_writer.EventsWriter(os.path.join(directory, "events"))
        # Hides what an interrupted run wrote past `start_step`.
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(step=start_step + 1, session_log=started))
        self._flushed_at = -math.inf

    def append(self, step: int, values: Values) -> None:
        scalars = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(self._event.Event(step=step, summary=self._summary.Summary(value=scalars)))
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self._writer.flush()
            self._flushed_at = time.monotonic()

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)


def _tensorboard(directory: str, start_step: int) -> _TensorBoard | None:
    """A writer; None where tensorboardX cannot write, such as to gs:// without its extra."""
    try:
        return _TensorBoard(directory, start_step)
    except ImportError as error:
        logging.warning("no TensorBoard files in %s: %s; metrics.jsonl has the same figures", directory, error)
        return None
