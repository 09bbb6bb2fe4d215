"""Flags of the text on which a method sees what a model's kernels are multiplied with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from absl import flags, logging

if TYPE_CHECKING:
    from gptjax.model import Model
    from gptjax.types import Array

_SOURCE = flags.DEFINE_string("calibration", None, "Text file, token store, or source as in prepare_data --source.")
_ROWS = flags.DEFINE_integer("calibration_rows", 128, "Rows of calibration text.", lower_bound=1)
_LENGTH = flags.DEFINE_integer(
    "calibration_length", None, "Tokens of such a row; the model's context, at most 512, unless told.", lower_bound=2
)
_BATCH = flags.DEFINE_integer("calibration_batch", 16, "Rows that a layer takes at once.", lower_bound=1)


def is_given() -> bool:
    """Whether there is text."""
    return _SOURCE.value is not None


def check(method: str, *, needed: bool) -> None:
    """Whether there is text where it is needed, before anything is read.

    Raises:
      ValueError: without it, and for these flags where nothing looks at text.
    """
    if needed and _SOURCE.value is None:
        raise ValueError(f"{method} looks at text: give --calibration, one like those that the model is for")
    unread = [f"--{flag.name}" for flag in (_SOURCE, _ROWS, _LENGTH, _BATCH) if flag.present]
    if unread and not needed:
        raise ValueError(f"{method} looks at no text; leave out {', '.join(unread)}")


def batches(model: Model) -> tuple[list[Array], dict[str, Any]]:
    """The text as batches of tokens, and what the lineage keeps of it.

    Raises:
      ValueError: without a tokenizer, for a text that is too short, and for rows beyond the model's context.
    """
    from gptjax.compress import text
    from gptjax.model import check_length

    assert _SOURCE.value is not None, "`check` has seen to that"
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer to read the calibration text with")
    length = _LENGTH.value or min(model.config.seq_len, 512)
    check_length(model.config, length)
    found = text.calibration(_SOURCE.value, model.tokenizer, rows=_ROWS.value, length=length)
    if _ROWS.value * length < model.config.d_model:
        logging.warning(
            "%d calibration tokens say little of kernels with %d inputs and more; give some thousands.",
            _ROWS.value * length,
            model.config.d_model,
        )
    return found.batches(rows_at_once=_BATCH.value), found.facts()
