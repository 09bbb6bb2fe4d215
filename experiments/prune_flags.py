"""Flags of pruning: what is taken out, how much of it, and the text by which it is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from gptjax.compress.prune import Method
    from gptjax.model import Model
    from gptjax.optim.sparsity import Sparsity

_METHOD = flags.DEFINE_enum(
    "method", "sparsegpt", ["magnitude", "wanda", "sparsegpt"], "How weights are chosen; sparsegpt also moves the rest."
)
_SPARSITY = flags.DEFINE_string("sparsity", None, "Fraction of weights that become 0, or n:m that stay, as 0.5 or 2:4.")
_WIDTH = flags.DEFINE_float("width", None, "Part of each feed-forward layer's hidden units that stays, as 0.75.")
_HEADS = flags.DEFINE_integer("heads", None, "Attention heads that stay, by groups that share a key/value head.")
_DEPTH = flags.DEFINE_integer("depth", None, "Layers that stay.")
_EXPERTS = flags.DEFINE_integer("experts", None, "Experts of a mixture that stay.")
_CALIBRATION = flags.DEFINE_string("calibration", None, "Text file, or source as in prepare_data --source.")
_ROWS = flags.DEFINE_integer("rows", 64, "Rows of calibration text.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a row; at most the model's context.", lower_bound=2)
_AT_ONCE = flags.DEFINE_integer("rows_at_once", 8, "Rows in work at a time.", lower_bound=1)


def method() -> Method:
    """How single weights are chosen."""
    return _METHOD.value  # type: ignore[return-value]


def sparsity() -> Sparsity | None:
    """How many single weights go; None for none."""
    from gptjax.optim import sparsity as sparsity_lib

    return None if _SPARSITY.value is None else sparsity_lib.parse(_SPARSITY.value)


def cut() -> dict[str, float]:
    """What whole parts stay, in the order in which the others go: layers that go need not be cut first."""
    given = {"depth": _DEPTH.value, "experts": _EXPERTS.value, "heads": _HEADS.value, "width": _WIDTH.value}
    return {name: value for name, value in given.items() if value is not None}


def calibration(model: Model, *, needed: bool) -> tuple[list[Any], dict[str, Any] | None]:
    """Batches of tokens, and what the lineage keeps of them."""
    from gptjax.compress import text

    if not needed:
        return [], None
    if _CALIBRATION.value is None:
        raise ValueError("--calibration is missing: the text by which is chosen what goes")
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer to read the calibration text with")
    length = min(_LENGTH.value, model.config.seq_len) if not flags.FLAGS["length"].present else _LENGTH.value
    found = text.calibration(
        _CALIBRATION.value, model.tokenizer, rows=_ROWS.value, length=length, context=model.config.seq_len
    )
    return found.batches(rows_at_once=_AT_ONCE.value), found.facts()
