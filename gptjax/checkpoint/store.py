"""Checkpoints of a run: `<workdir>/ckpt/<step>/{params,opt_state,extra,data,meta,assets}`.

`params opt_state extra` are arrays (Orbax, OCDBT), `data` and `meta` JSON, `assets` plain
files. Saving copies the arrays to host memory and returns; a thread writes them into
`<step>.orbax-checkpoint-tmp` and commits by one rename (on gs:// by a marker file). So a
directory named by its step is complete, or was damaged later: such a one stops the reader
with its path, is never taken for absent, and never overwritten. What a kill left
uncommitted is no checkpoint; the next `CheckpointStore` on the workdir removes it.
"""

from __future__ import annotations

import dataclasses
import json
import logging as python_logging
import math
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from gptjax.checkpoint import arrays, files
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.meta import Meta
from gptjax.nn.config import ModelConfig
from gptjax.types import Params

DIRECTORY = "ckpt"
_ARRAY_ITEMS = ("params", "opt_state", "extra")
_JSON_FILE = "metadata"
_UNCOMMITTED = ".orbax-checkpoint-tmp"


class Restored(NamedTuple):
    """A checkpoint read back; `assets` maps file names to bytes."""

    meta: Meta
    params: Params
    opt_state: Any
    extra: Any
    data: dict[str, Any]
    assets: dict[str, bytes]


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
        _quiet_orbax()
        self.directory = _absolute(workdir) / DIRECTORY
        self._keep = (keep_last, keep_every, keep_best)
        if _is_lead():
            self.directory.mkdir(parents=True, exist_ok=True)
            _remove_uncommitted(self.directory)
        ocp.multihost.sync_global_processes("checkpoint_store_open")
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                **{item: arrays.handler() for item in _ARRAY_ITEMS},
                data=ocp.JsonCheckpointHandler(_JSON_FILE),
                meta=ocp.JsonCheckpointHandler(_JSON_FILE),
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
          meta: its step, checksums and score are filled in here.
          data: JSON of the data pipeline's position.
          assets: plain files by name (the tokenizer).
          score: lower is better; for `keep_best`.

        Raises:
          ValueError: if this or the previous save could not be written; older ones are untouched.
        """
        self.wait()
        if (self.directory / str(step)).exists():
            logging.info("%s is there already; not saved again.", self.directory / str(step))
            return
        trees = {"params": params, "opt_state": opt_state, "extra": extra}
        flat = {
            item: {path: arrays.as_array(path, leaf) for path, leaf in arrays.flatten(tree).items()}
            for item, tree in trees.items()
        }
        sums = {f"{item}/{path}": s for item, leaves in flat.items() for path, s in arrays.checksums(leaves).items()}
        sums |= {f"assets/{name}": zlib.crc32(content) for name, content in (assets or {}).items()}
        meta = dataclasses.replace(meta, step=step, score=score, checksums=sums)
        items: dict[str, Any] = {
            item: ocp.args.PyTreeSave(arrays.nest(leaves)) for item, leaves in flat.items() if leaves
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

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return committed_steps(self.directory)

    def latest(self) -> int | None:
        """The newest committed step, or None if the workdir has no checkpoint; the same on every process."""
        # One host's answer for all: a network file system may show them different listings.
        step = int(ocp.multihost.broadcast_one_to_all(np.int32(max(self.steps(), default=-1))))
        return step if step >= 0 else None

    def restore(
        self, step: int, *, params: Params, opt_state: Any = (), extra: Any = (), model: ModelConfig | None = None
    ) -> Restored:
        """Reads a checkpoint into trees like those given.

        Args:
          params, opt_state, extra: trees of `jax.ShapeDtypeStruct`; their shardings say where
            arrays go, their dtypes what floating-point arrays become.
          model: the config that they were made from, to explain a mismatch.

        Raises:
          ValueError: with the path, if there is none, it cannot be read, or shapes differ.
        """
        path = self.directory / str(step)
        _require_committed(path)
        trees = {"params": params, "opt_state": opt_state, "extra": extra}
        meta = read_meta(path)
        restored = {item: _read_tree(path, item, tree, meta, model) for item, tree in trees.items()}
        with _unreadable(path, "data"):
            data = json.loads((path / "data" / _JSON_FILE).read_text())
        return Restored(meta, **restored, data=data, assets=_read_assets(path, meta))

    @contextmanager
    def _reported(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._pending = None
            if _is_lead():
                _remove_uncommitted(self.directory)
            good = self.latest()
            raise ValueError(
                f"{self.directory / str(step)}: could not be written ({_first_line(error)}). "
                + (f"The last good checkpoint is {self.directory / str(good)}." if good is not None else "")
            ) from error

    def _prune(self) -> None:
        """Removes what the policy does not keep; only ever after a newer one is committed."""
        if not _is_lead():
            return
        keep_last, keep_every, keep_best = self._keep
        steps = self.steps()
        if not keep_last or len(steps) <= keep_last:
            return
        kept = set(steps[-keep_last:]) | {step for step in steps if keep_every and step % keep_every == 0}
        if keep_best:
            kept |= set(sorted(steps, key=lambda step: _score(self.directory / str(step)))[:keep_best])
        for step in sorted(set(steps) - kept):
            (self.directory / str(step)).rmtree()


def restore_params(path: epath.PathLike, *, shardings: Any = None, dtype: Any = None) -> tuple[Meta, Params]:
    """Reads parameters and meta alone; needs neither the optimizer's code nor its memory.

    Args:
      path: a checkpoint, or a workdir (its newest checkpoint); local or gs://.
      shardings: one sharding for all, or a tree like the parameters; None is the first device.
      dtype: of floating-point parameters; None keeps the stored one.

    Raises:
      ValueError: with the path, if there is no checkpoint or it cannot be read.
    """
    _quiet_orbax()
    directory = find(path)
    meta = read_meta(directory)
    with _unreadable(directory, "params"):
        stored = arrays.stored_shapes(directory / "params")
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        places = dict.fromkeys(stored, shardings)
    else:
        places = arrays.flatten(shardings)
    wanted = {
        name: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.dtype(dtype) if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype,
            sharding=places[name],
        )
        for name, leaf in stored.items()
    }
    return meta, arrays.nest(_read_flat(directory, "params", wanted, meta))


def find(path: epath.PathLike) -> epath.Path:
    """The checkpoint directory that `path` means: itself, or the newest of a workdir.

    Raises:
      ValueError: if there is none.
    """
    path = _absolute(path)
    if path.name.isdigit() or (path / "meta").exists() or (path / "params").exists():
        _require_committed(path)
        return path
    for directory in (path / DIRECTORY, path):
        steps = committed_steps(directory)
        if steps:
            return directory / str(steps[-1])
    raise ValueError(
        f"{path}: no checkpoint there; expected a checkpoint directory or a workdir with {DIRECTORY}/<step>"
    )


def read_meta(directory: epath.PathLike) -> Meta:
    """The meta of a checkpoint directory.

    Raises:
      ValueError: with the path, if it cannot be read or has unknown, missing or mistyped keys.
    """
    file = epath.Path(directory) / "meta" / _JSON_FILE
    with _unreadable(epath.Path(directory), "meta"):
        values = json.loads(file.read_text())
    return meta_lib.from_json(values, path=str(file))


def read_assets(directory: epath.PathLike) -> dict[str, bytes]:
    """The plain files of a checkpoint directory, by name.

    Raises:
      ValueError: with the path, if they cannot be read or are not what was saved.
    """
    return _read_assets(epath.Path(directory), read_meta(directory))


def committed_steps(directory: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a `ckpt` directory, ascending."""
    if not directory.exists():
        return []
    names = [path for path in directory.iterdir() if path.name.isdigit() and _is_committed(path)]
    return sorted(int(path.name) for path in names)


def _read_tree(path: epath.Path, item: str, tree: Any, meta: Meta, model: ModelConfig | None) -> Any:
    wanted = arrays.flatten(tree)
    stored: Mapping[str, Any] = {}
    if wanted or (path / item).exists():
        with _unreadable(path, item):
            stored = arrays.stored_shapes(path / item)
    lines = list(arrays.mismatches(wanted, stored))
    if lines:
        changes = meta_lib.model_differences(meta.model, model) if model is not None else []
        raise ValueError(
            f"{item}/{lines[0]} in {path}"
            + (f" ({len(lines) - 1} more differ)" if len(lines) > 1 else "")
            + (f"; checkpoint -> config: {', '.join(changes[:6])}; which is right?" if changes else "")
        )
    found = _read_flat(path, item, wanted, meta) if wanted else {}
    return jax.tree.unflatten(jax.tree.structure(tree), found.values())


def _read_flat(path: epath.Path, item: str, wanted: Mapping[str, Any], meta: Meta) -> dict[str, Any]:
    with _unreadable(path, item):
        return arrays.read(path / item, wanted, expected_checksums=_item_checksums(meta, item))


def _read_assets(path: epath.Path, meta: Meta) -> dict[str, bytes]:
    sums = _item_checksums(meta, "assets")
    with _unreadable(path, "assets"):
        found = files.read(path / "assets")
        damaged = [name for name in sums.keys() | found.keys() if sums.get(name) != zlib.crc32(found.get(name, b""))]
        if damaged:
            raise ValueError(f"{', '.join(sorted(damaged))}: not what was saved (checksum)")
    return found


def _item_checksums(meta: Meta, item: str) -> dict[str, int]:
    prefix = f"{item}/"
    return {name.removeprefix(prefix): s for name, s in meta.checksums.items() if name.startswith(prefix)}


@contextmanager
def _unreadable(path: epath.Path, item: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
            raise  # Too little memory says nothing about the files.
        others = [step for step in committed_steps(path.parent) if str(step) != path.name]
        raise ValueError(
            f"{path}: the checkpoint exists but its {item!r} cannot be read ({_first_line(error)}). "
            "It was left as it is; restore the files from a copy, or move the directory away"
            + (f" to go on from step {others[-1]}." if others else ".")
        ) from error


def _absolute(path: epath.PathLike) -> epath.Path:
    """As Orbax wants local paths; `absolute` would spoil one with a scheme."""
    return epath.Path(path) if "://" in str(path) else epath.Path(path).absolute()


def _require_committed(path: epath.Path) -> None:
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint; committed steps are {committed_steps(path.parent)}")
    if not _is_committed(path):
        raise ValueError(f"{path}: saving was interrupted before the checkpoint was complete; use another step")


def _is_committed(path: epath.Path) -> bool:
    # Elsewhere than on gs:// a directory gets its name when it is complete, so whatever is missing
    # from it was lost later: that is a damaged checkpoint, and not an uncommitted one to be removed.
    return not str(path).startswith("gs://") or (path / ocp.path.atomicity.COMMIT_SUCCESS_FILE).exists()


def _remove_uncommitted(directory: epath.Path) -> None:
    for path in directory.iterdir():
        if _UNCOMMITTED in path.name or (path.name.isdigit() and not _is_committed(path)):
            logging.warning("%s: saving was interrupted before it was complete; removed.", path)
            path.rmtree()


def _score(path: epath.Path) -> float:
    score = read_meta(path).score
    return math.inf if score is None else score


def _is_lead() -> bool:
    return jax.process_index() == 0


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]


def _quiet_orbax() -> None:
    """Drops Orbax's narration of every thread; its warnings pass."""
    logger = python_logging.getLogger("absl")
    if _is_not_narration not in logger.filters:
        logger.addFilter(_is_not_narration)


def _is_not_narration(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.WARNING or "/orbax/" not in record.pathname
