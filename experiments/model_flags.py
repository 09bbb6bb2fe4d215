"""Flags of the commands that read a trained model: which one, and where their summary goes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from absl import flags, logging
from etils import epath

from gptjax.json_files import write_json

if TYPE_CHECKING:
    from gptjax.model import Model

_CKPT = flags.DEFINE_string("ckpt", None, "Checkpoint directory, or workdir (its newest checkpoint); only read.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir; the summary replaces the last one in a folder in it.")
_WEIGHTS = flags.DEFINE_enum("weights", "last", ["last", "average"], "average: over the steps, by optim.ema_decay.")
_KV_CACHE = flags.DEFINE_string(
    "kv_cache", None, "none, int8, int4, or as int4:g32:asym: of keys and values; as in the checkpoint unless told."
)
_OUT = flags.DEFINE_string("out", None, "File for the summary, as JSON; with --workdir another place for it.")


def path() -> str:
    """The checkpoint or workdir to read.

    Raises:
      ValueError: unless it was given once.
    """
    given = [value for value in (_CKPT.value, _WORKDIR.value) if value is not None]
    if len(given) != 1:
        raise ValueError("give one of --ckpt and --workdir")
    return given[0]


def load() -> tuple[Model, dict[str, Any]]:
    """The model there, and what a summary says of it."""
    import gptjax
    from gptjax.checkpoint import store
    from gptjax.nn import quant_spec

    if _WORKDIR.value is not None and store.find(path()) == epath.Path(path()).absolute():
        raise ValueError(f"--workdir={path()}: is a checkpoint, in which nothing is written; use --ckpt, and --out")
    model = gptjax.load(path(), weights=_WEIGHTS.value)
    assert model.meta is not None, "it was read from a checkpoint"
    if _KV_CACHE.value is not None:
        format = quant_spec.cache_format(_KV_CACHE.value)
        model = dataclasses.replace(model, config=quant_spec.with_cache(model.config, format))
    origin = {"checkpoint": path(), "step": model.meta.step, "weights": _WEIGHTS.value}
    return model, origin | {"kv_cache": quant_spec.said(model.config.kv_cache)}


def write_summary(folder: str, summary: dict[str, Any]) -> None:
    """Writes `summary.json` to a folder of the workdir, or the file that --out names; from the lead host."""
    from gptjax.parallel import hosts

    out = _OUT.value or (_WORKDIR.value and f"{_WORKDIR.value}/{folder}/summary.json")
    if out and hosts.is_lead():
        write_json(out, summary)
        logging.info("Summary in %s.", out)
