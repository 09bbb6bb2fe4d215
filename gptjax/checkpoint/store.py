"""Checkpoints of a run: `<workdir>/ckpt/<step>/{params,opt_state,extra,data,meta,assets}`.

`params opt_state extra` are arrays (Orbax, OCDBT; parameters with many zeros as `checkpoint.sparse`
says), `data` and `meta` JSON, `assets` plain files. Saving copies the arrays to host memory and
returns; a thread writes them into
`<step>.orbax-checkpoint-tmp` and commits by one rename (on gs:// by a marker file). So a
directory named by its step is complete, or was damaged later: such a one stops the reader
with its path, is never taken for absent, and never overwritten. What a kill left
uncommitted is no checkpoint; the next `CheckpointStore` on the workdir removes it.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from gptjax.checkpoint import arrays, files, reading, sparse, stream
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.directory import DIRECTORY, absolute, committed_steps, remove, remove_uncommitted
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.narration import first_line, quiet_orbax
from gptjax.checkpoint.reading import Restored, Weights, find, read_assets, read_meta, restore_params
from gptjax.nn.config import ModelConfig
from gptjax.parallel import hosts
from gptjax.types import Params

__all__ = [
    "CheckpointStore",
    "Restored",
    "Weights",
    "find_agreed",
    "find",
    "read_assets",
    "read_meta",
    "restore_params",
]

_ARRAY_ITEMS = ("params", "opt_state", "extra")


class CheckpointStore:
    """Saves and restores the checkpoints of one workdir; every process calls every method.

    One store may write to a workdir at a time. To read another run's checkpoints, use
    `restore_params`, which changes nothing.

    Args:
      workdir: local or gs://; checkpoints go to its `ckpt` directory.
      keep_last: newest checkpoints that are kept; 0 keeps all.
      keep_every: checkpoints whose step is a multiple are kept too; 0 for none.
      keep_best: checkpoints with the lowest `score` given to `save` that are kept too.
    """

    def __init__(self, workdir: epath.PathLike, *, keep_last: int = 1, keep_every: int = 0, keep_best: int = 0) -> None:
        quiet_orbax()
        self.directory = absolute(workdir) / DIRECTORY
        self._keep = (keep_last, keep_every, keep_best)
        if hosts.is_lead():
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{workdir}: cannot be made ({error.strerror}); name another place") from error
            remove_uncommitted(self.directory)
        ocp.multihost.sync_global_processes("checkpoint_store_open")
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                **{item: arrays.handler() for item in _ARRAY_ITEMS},
                data=ocp.JsonCheckpointHandler(reading.JSON_FILE),
                meta=ocp.JsonCheckpointHandler(reading.JSON_FILE),
                assets=files.FilesHandler(),
            )
        )
        self._pending: int | None = None

    def save(
        self,
        step: int,
        *,
        meta: Meta,
        params: Params,
        opt_state: Any = (),
        extra: Any = (),
        data: Mapping[str, Any] | None = None,
        assets: Mapping[str, bytes] | None = None,
        score: float | None = None,
    ) -> None:
        """Starts writing a checkpoint; the arrays may be changed or donated as soon as it returns.

        A step that is saved already is left as it is.

        Args:
          meta: its step, time, checksums and score are filled in here.
          data: JSON of the data pipeline's position.
          assets: plain files by name (the tokenizer).
          score: lower is better; for `keep_best`.

        Raises:
          ValueError: if this or the previous save could not be written; older ones are untouched.
        """
        self.wait()
        if _agreed(int((self.directory / str(step)).exists())):
            logging.info("%s is there already; not saved again.", self.directory / str(step))
            return
        trees = {"params": params, "opt_state": opt_state, "extra": extra}
        flat = {
            item: {path: arrays.as_array(path, leaf) for path, leaf in arrays.flatten(tree).items()}
            for item, tree in trees.items()
        }
        sums = {f"{item}/{path}": s for item, leaves in flat.items() for path, s in arrays.checksums(leaves).items()}
        flat["params"] = sparse.stored(flat["params"])
        bitmaps = sparse.bitmaps(flat["params"]).values()
        sums |= {f"params/{path}": stream.bit_sum(np.asarray(flat["params"][path])) for path in bitmaps}
        sums |= {f"assets/{name}": zlib.crc32(content) for name, content in (assets or {}).items()}
        meta = dataclasses.replace(meta, step=step, created=meta_lib.now(), score=score, checksums=sums)
        items: dict[str, Any] = {
            item: ocp.args.PyTreeSave(arrays.nest(leaves), save_args=arrays.nest(arrays.save_args(leaves)))
            for item, leaves in flat.items()
            if leaves
        }
        items["data"] = ocp.args.JsonSave(dict(data or {}))
        items["meta"] = ocp.args.JsonSave(meta_lib.to_json(meta))
        items["assets"] = files.FilesSave(dict(assets or {}))
        self._pending = step
        with self._reported(step):
            self._writer.save(self.directory / str(step), args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when everything saved is committed, and removes what the policy does not keep.

        Raises:
          ValueError: if it could not be written; older checkpoints are untouched.
        """
        if self._pending is None:
            return
        step = self._pending
        with self._reported(step):
            self._writer.wait_until_finished()
        self._pending = None
        self._prune()

    def close(self) -> None:
        """Waits and frees the writer's threads."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return committed_steps(self.directory)

    def latest(self) -> int | None:
        """The newest committed step, or None if the workdir has no checkpoint; the same on every process."""
        step = _agreed(max(self.steps(), default=-1))
        return step if step >= 0 else None

    def restore(
        self, step: int, *, params: Params, opt_state: Any = (), extra: Any = (), model: ModelConfig | None = None
    ) -> Restored:
        """Reads the checkpoint of a step; see `reading.restore`."""
        path = self.directory / str(step)
        return reading.restore(path, params=params, opt_state=opt_state, extra=extra, model=model)

    @contextmanager
    def _reported(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._pending = None
            if hosts.is_lead():
                remove_uncommitted(self.directory)
            good = max(self.steps(), default=None)  # not `latest`: the other processes may be well
            raise ValueError(
                f"{self.directory / str(step)}: could not be written ({first_line(error)})"
                + (f". The last good checkpoint is {self.directory / str(good)}." if good is not None else "")
            ) from error

    def _prune(self) -> None:
        """Removes what the policy does not keep; only ever after a newer one is committed."""
        if not hosts.is_lead():
            return
        keep_last, keep_every, keep_best = self._keep
        steps = self.steps()
        if not keep_last or len(steps) <= keep_last:
            return
        kept = set(steps[-keep_last:]) | {step for step in steps if keep_every and step % keep_every == 0}
        if keep_best:
            scores = {step: _score(self.directory / str(step)) for step in steps}
            kept |= set(sorted((step for step in steps if scores[step] < math.inf), key=scores.__getitem__)[:keep_best])
        for step in sorted(set(steps) - kept):
            remove(self.directory / str(step))


def _score(path: epath.Path) -> float:
    try:
        score = read_meta(path).score
    except ValueError as error:
        logging.warning("%s", error)  # A damaged old checkpoint must not end the run that writes new ones.
        return math.inf
    return math.inf if score is None else score


def find_agreed(path: epath.PathLike) -> epath.Path:
    """As `find`, the same on every process also while the other run goes on."""
    found = find(path)
    return found.parent / str(_agreed(int(found.name))) if found.name.isdigit() else found


def _agreed(value: int) -> int:
    """The lead host's value on all: a network file system may show them different listings."""
    return int(ocp.multihost.broadcast_one_to_all(np.int32(value)))
