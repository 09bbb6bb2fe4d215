"""One directory, one run: whose it is, and what may change when the run goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import logging
from etils import epath

from gptjax import config as config_lib
from gptjax.checkpoint import store as store_lib
from gptjax.json_files import read_json, write_json
from gptjax.parallel import hosts
from gptjax.train.setup import RunConfig

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"

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
    "train.keep_every",
    "train.keep_best",
    "train.profile_steps",
    "distill.teacher",
    "distill.cache",
)
"""Keys that may change when a run goes on: they say where and in how many parts it is computed, what is
written down, and how long it lasts. All but `train.num_steps` leave the losses as they were, to
rounding; a schedule that ends with the run is stretched. The tokenizer's file and a teacher may
move, their contents are compared with the checkpoint's."""


# What makes the scores comparable by which `train.keep_best` chooses.
_SCORE_KEYS = ("data.eval", "train.eval_batches")


def claim(path: epath.PathLike, cfg: RunConfig) -> None:
    """Makes `path` the workdir of `cfg`, or finds that it is.

    A config that was started without coming to a checkpoint leaves nothing that could be lost, and gives way.

    Raises:
      ValueError: when it holds a run of another config, whose differences the message has, or one that
        has lost its checkpoints.
    """
    path = epath.Path(path)
    steps = store_lib.committed_steps(path / store_lib.DIRECTORY)
    if not steps and (path / SUMMARY_FILE).exists():
        raise ValueError(
            f"{path}: has the {SUMMARY_FILE} of a run, but no checkpoint in {store_lib.DIRECTORY}; put the checkpoints "
            f"back to go on, or choose another --workdir"
        )
    new = config_lib.to_dict(cfg)
    old = _config_of(path, steps, type(cfg))
    changes = [] if old is None else config_lib.diff(old, new)
    free = [key for key in FREE_KEYS if not (cfg.train.keep_best and key in _SCORE_KEYS)]
    blocking = [line for line in changes if not _is_one_of(free, line.split(":", 1)[0])]
    if blocking and steps:
        raise ValueError(
            f"{path} holds a run of another config (old -> new):\n  " + "\n  ".join(blocking) + "\n"
            f"Choose another --workdir, or go on with the old values; free to change are {', '.join(free)}."
        )
    for line in changes:
        logging.info("%s: changed since the run was last started: %s", path, line)
    if hosts.is_lead() and (old is None or changes):
        write_json(path / CONFIG_FILE, new)


def _config_of(path: epath.Path, steps: Sequence[int], kind: type[RunConfig]) -> dict[str, Any] | None:
    """The config of the run in a workdir: its file's or, where that is gone, its newest checkpoint's."""
    file = path / CONFIG_FILE
    if file.exists():
        found = read_json(file)
    elif steps:
        file = path / store_lib.DIRECTORY / str(steps[-1])
        found = store_lib.read_meta(file).run
    else:
        return None
    if not isinstance(found, dict) or not {field.name for field in dataclasses.fields(RunConfig)} <= found.keys():
        raise ValueError(f"{file}: has no config of a pretraining run; choose another --workdir")
    try:
        # A key that came later had its default.
        return config_lib.to_dict(config_lib.from_dict(kind, found))
    except ValueError:
        return found


def _is_one_of(keys: Sequence[str], key: str) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in keys)
