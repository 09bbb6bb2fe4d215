"""One directory, one run: whose it is, and what may change when the run goes on."""

from __future__ import annotations

from typing import Any

from absl import logging
from etils import epath

from gptjax import config as config_lib
from gptjax.checkpoint import store as store_lib
from gptjax.json_files import read_json, write_json
from gptjax.parallel import hosts
from gptjax.train.setup import RunConfig

CONFIG_FILE = "config.json"

FREE_KEYS = (
    "mesh",
    "model.remat",
    "data.eval",
    "data.tokenizer",
    "data.prefetch",
    "train.num_steps",
    "train.accumulate_steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.profile_steps",
)
"""Keys that may change when a run goes on: they say where and in how many parts it is computed, what is
written down, and how long it lasts. All but `train.num_steps` leave the losses as they were, to
rounding; a schedule that ends with the run is stretched. The tokenizer's file may move,
its content is compared with the checkpoint's."""


def claim(path: epath.PathLike, cfg: RunConfig) -> None:
    """Makes `path` the workdir of `cfg`, or finds that it is.

    Raises:
      ValueError: when it holds a run of another config; the message has the differences.
    """
    path = epath.Path(path)
    new = config_lib.to_dict(cfg)
    old = _config_of(path)
    changes = [] if old is None else config_lib.diff(old, new)
    blocking = [line for line in changes if not _is_free(line.split(":", 1)[0])]
    if blocking:
        raise ValueError(
            f"{path} holds a run of another config (old -> new):\n  " + "\n  ".join(blocking) + "\n"
            f"Choose another --workdir, or go on with the old values; free to change are {', '.join(FREE_KEYS)}."
        )
    for line in changes:
        logging.info("%s: changed since the run was last started: %s", path, line)
    if hosts.is_lead() and (old is None or changes):
        write_json(path / CONFIG_FILE, new)


def _config_of(path: epath.Path) -> dict[str, Any] | None:
    """The config of the run in a workdir: its file's or, where that is gone, its newest checkpoint's."""
    file = path / CONFIG_FILE
    if file.exists():
        return read_json(file)
    if store_lib.committed_steps(path / store_lib.DIRECTORY):
        return store_lib.read_meta(store_lib.find(path)).run
    return None


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
