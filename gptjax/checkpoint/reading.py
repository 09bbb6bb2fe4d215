"""Reading a checkpoint directory, by whoever: nothing in it or beside it is ever changed.

Whatever keeps a complete checkpoint from being read, a missing file, a cut one, one other
value, ends in a ValueError with its path.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from gptjax.checkpoint import arrays, files
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.directory import DIRECTORY, absolute, committed_steps, require_committed
from gptjax.checkpoint.meta import Meta
from gptjax.checkpoint.narration import first_line, quiet_orbax
from gptjax.nn import storage, transformer
from gptjax.nn.config import ModelConfig
from gptjax.types import Params

JSON_FILE = "metadata"

# The field of `optim.ema.EmaState` that is like the parameters; no other optimizer has one of that name.
_AVERAGES = "/average/"


Weights = Literal["last", "average"]


class Restored(NamedTuple):
    """A checkpoint read back; `assets` maps file names to bytes."""

    meta: Meta
    params: Params
    opt_state: Any
    extra: Any
    data: dict[str, Any]
    assets: dict[str, bytes]


def restore(
    path: epath.Path, *, params: Params, opt_state: Any = (), extra: Any = (), model: ModelConfig | None = None
) -> Restored:
    """Reads a checkpoint directory into trees like those given.

    Args:
      params, opt_state, extra: trees of `jax.ShapeDtypeStruct`; their shardings say where
        arrays go, their dtypes what floating-point arrays become.
      model: the config that they were made from, to explain a mismatch.

    Raises:
      ValueError: with the path, if there is none, it cannot be read, or shapes differ.
    """
    quiet_orbax()
    require_committed(path)
    trees = {"params": params, "opt_state": opt_state, "extra": extra}
    meta = read_meta(path)
    restored = {item: _read_tree(path, item, tree, meta, model) for item, tree in trees.items()}
    with _unreadable(path, "data"):
        data = json.loads((path / "data" / JSON_FILE).read_text())
    return Restored(meta, **restored, data=data, assets=_read_assets(path, meta))


def restore_params(
    path: epath.PathLike, *, shardings: Any = None, dtype: Any = None, weights: Weights = "last"
) -> tuple[Meta, Params]:
    """Reads parameters and meta alone; needs neither the optimizer's code nor its memory.

    Args:
      path: a checkpoint, or a workdir (its newest checkpoint); local or gs://.
      shardings: one sharding for all, or a tree like the parameters; None is the first device.
      dtype: of floating-point parameters; None keeps the stored one.
      weights: `average` reads the average of the parameters that the optimizer kept; those that it did not
        average, being frozen, are read as they are.

    Raises:
      ValueError: with the path, if there is no checkpoint, it cannot be read, or it has no average.
    """
    quiet_orbax()
    directory = find(path)
    meta = read_meta(directory)
    with _unreadable(directory, "params"):
        stored = arrays.stored_shapes(directory / "params")
    fixed = storage.stored_names(transformer.abstract_params(meta.model)) if meta.model.quant else frozenset()
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        places = dict.fromkeys(stored, shardings)
    else:
        places = arrays.flatten(shardings)
    wanted = {
        name: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype if dtype is None or name in fixed or not _is_float(leaf) else jnp.dtype(dtype),
            sharding=places[name],
        )
        for name, leaf in stored.items()
    }
    averages = _average_names(directory, stored) if weights == "average" else {}
    kept = _read_flat(directory, "opt_state", {path: wanted[name] for name, path in averages.items()}, meta)
    found = {name: kept[path] for name, path in averages.items()}
    found |= _read_flat(directory, "params", {n: leaf for n, leaf in wanted.items() if n not in averages}, meta)
    return meta, _tree(meta.model, {name: found[name] for name in wanted}, path=directory)


def _tree(model: ModelConfig, found: Mapping[str, Any], *, path: epath.Path) -> Params:
    """The parameters of a model as its code takes them, from arrays by name."""
    if model.quant is None:
        return arrays.nest(found)
    wanted = transformer.abstract_params(model)
    lines = list(arrays.mismatches(arrays.flatten(wanted), found))
    if lines:
        raise ValueError(f"params/{lines[0]} in {path}; was it written by another version?")
    return jax.tree.unflatten(jax.tree.structure(wanted), [found[name] for name in arrays.flatten(wanted)])


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _average_names(directory: epath.Path, params: Mapping[str, Any]) -> dict[str, str]:
    """Where in `opt_state` the averages of parameters are, by the parameters' names."""
    stored: Mapping[str, Any] = {}
    if (directory / "opt_state").exists():
        with _unreadable(directory, "opt_state"):
            stored = arrays.stored_shapes(directory / "opt_state")
    found = {}
    for path in stored:
        _, averages, name = f"/{path}".rpartition(_AVERAGES)
        if averages and name in params:
            found[name] = path
    if not found:
        raise ValueError(
            f"{directory}: has no average of the parameters; it was trained without optim.ema_decay, or saved "
            "without its optimizer's state; read the last ones"
        )
    return found


def find(path: epath.PathLike) -> epath.Path:
    """The checkpoint directory that `path` means: itself, or the newest of a workdir.

    Raises:
      ValueError: if there is none.
    """
    path = absolute(path)
    if path.exists() and not path.is_dir():
        raise ValueError(
            f"{path}: is a file; expected a checkpoint directory or a workdir with {DIRECTORY}/<step>, which "
            "experiments.import_model makes of a model of others"
        )
    for directory in (path / DIRECTORY, path):
        steps = committed_steps(directory)
        if steps:
            return directory / str(steps[-1])
    # By its name too, so that one that lost its files is reported as damaged, not as absent.
    in_store = path.name.isdigit() and path.parent.name == DIRECTORY
    if in_store or (path / "meta").exists() or (path / "params").exists():
        require_committed(path)
        return path
    raise ValueError(
        f"{path}: no checkpoint there; expected a checkpoint directory or a workdir with {DIRECTORY}/<step>"
    )


def read_meta(directory: epath.PathLike) -> Meta:
    """The meta of a checkpoint directory.

    Raises:
      ValueError: with the path, if it cannot be read or has unknown, missing or mistyped keys.
    """
    file = epath.Path(directory) / "meta" / JSON_FILE
    with _unreadable(epath.Path(directory), "meta"):
        return meta_lib.from_json(json.loads(file.read_text()), path=str(file))


def read_assets(directory: epath.PathLike) -> dict[str, bytes]:
    """The plain files of a checkpoint directory, by name.

    Raises:
      ValueError: with the path, if they cannot be read or are not what was saved.
    """
    return _read_assets(epath.Path(directory), read_meta(directory))


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
    return jax.tree.unflatten(jax.tree.structure(tree), _read_flat(path, item, wanted, meta).values())


def _read_flat(path: epath.Path, item: str, wanted: Mapping[str, Any], meta: Meta) -> dict[str, Any]:
    if not wanted:
        return {}
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
            f"{path}: the checkpoint exists but its {item!r} cannot be read ({first_line(error)}). "
            "It was left as it is; restore the files from a copy, or move the directory away"
            + (f" to go on from step {others[-1]}." if others else ".")
        ) from error
