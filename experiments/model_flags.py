"""Flags of the commands that read a trained model: which one, and where their summary goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from absl import flags

from gptjax.json_files import write_json

if TYPE_CHECKING:
    from gptjax.model import Model

_CKPT = flags.DEFINE_string("ckpt", None, "Checkpoint directory, or workdir (its newest checkpoint); only read.")
_WORKDIR = flags.DEFINE_string("workdir", None, "As --ckpt, and the summary goes to a folder in it.")
_AVERAGE = flags.DEFINE_bool("average", False, "Take the average of the parameters that optim.ema_decay kept.")
_OUT = flags.DEFINE_string("out", None, "File for the summary, as JSON; with --workdir another place for it.")


def path() -> str:
    """The checkpoint or workdir to read.

    Raises:
      ValueError: unless it was given once.
    """
    if (_CKPT.value is None) == (_WORKDIR.value is None):
        raise ValueError("give one of --ckpt and --workdir")
    return _CKPT.value or _WORKDIR.value


def load() -> Model:
    """The model there."""
    import gptjax

    return gptjax.load(path(), average=_AVERAGE.value)


def write_summary(folder: str, summary: dict[str, Any]) -> None:
    """Writes `summary.json` to a folder of the workdir, or the file that --out names; from the lead host.

    Args:
      folder: the command's.
      summary: what it found; what model it was is added.
    """
    from gptjax.parallel import hosts

    out = _OUT.value or (_WORKDIR.value and f"{_WORKDIR.value}/{folder}/summary.json")
    if out and hosts.is_lead():
        write_json(out, {"checkpoint": path(), "average": _AVERAGE.value} | summary)
