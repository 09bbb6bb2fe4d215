"""Compares models that were made from one: quality, size and speed on one page.

    python -m experiments.compress_report --ckpts=runs/demo,runs/int8,runs/int4 --data=novel.txt --out=runs/report

The first is the original. Every model is scored by the evaluator of experiments.evaluate on the same tokens, taken
from all over the text, and runs on the same prompt. The folder gets compress.html and compress.json.
"""

from __future__ import annotations

import pathlib
import tempfile
from typing import TYPE_CHECKING

from absl import flags

from experiments import common

if TYPE_CHECKING:
    from etils import epath

    from gptjax.compress.report import Variant
    from gptjax.model import Model
    from gptjax.types import Batch

_CKPTS = flags.DEFINE_list("ckpts", None, "Checkpoints or workdirs (their newest), the original first.", required=True)
_NAMES = flags.DEFINE_list("names", None, "What they are called; the names of their directories unless told.")
_DATA = flags.DEFINE_string("data", None, "Held-out token store, text file, or source of prepare_data.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for the page and its figures.", required=True)
_TOKENS = flags.DEFINE_integer("num_tokens", 65_536, "Of the text, at most.", lower_bound=512)
_SEQ_LEN = flags.DEFINE_integer("seq_len", None, "Tokens of a row; the model's context, at most 512, unless told.")


def main() -> None:
    """Measures every checkpoint, and writes the page."""
    import gptjax
    from gptjax.compress import report

    names = _NAMES.value or [pathlib.Path(path.rstrip("/")).name for path in _CKPTS.value]
    if len(names) != len(_CKPTS.value):
        raise ValueError(f"--names has {len(names)} names, expected one for each of {len(_CKPTS.value)} --ckpts")
    original = gptjax.load(_CKPTS.value[0])
    with tempfile.TemporaryDirectory() as scratch:
        batches, num_bytes = _batches(original, pathlib.Path(scratch) / "store")
    variants = []
    for name, path in zip(names, _CKPTS.value, strict=True):
        variants.append(_measure(name, path, original, batches, num_bytes))
        head, *_, row = report.rows(variants)
        print(", ".join(f"{key} {value}" for key, value in zip(head, row, strict=True)), flush=True)
    facts = {"text": _DATA.value, "targets": int(sum(batch.loss_mask.sum() for batch in batches)), "bytes": num_bytes}
    report.write(report.Comparison(title=names[0], variants=variants, facts=facts), _OUT.value)
    print(f"{_OUT.value}/compress.html")


def _batches(model: Model, scratch: pathlib.Path) -> tuple[list[Batch], int]:
    """Rows of the text, and the bytes that their targets spell."""
    from gptjax.data import loader, writer

    if model.tokenizer is None:
        raise ValueError(f"{_CKPTS.value[0]}: has no tokenizer to read text with")
    seq_len = min(model.config.seq_len, 512) if _SEQ_LEN.value is None else _SEQ_LEN.value
    store = writer.store_of(_DATA.value, model.tokenizer, scratch=scratch)
    found = loader.eval_batches(
        store, batch_size=1, seq_len=seq_len, stride=seq_len, max_batches=max(1, _TOKENS.value // seq_len)
    )
    return list(found), found.num_bytes


def _measure(name: str, path: str, original: Model, batches: list[Batch], num_bytes: int) -> Variant:
    import gptjax
    from gptjax.checkpoint import store
    from gptjax.compress import measure, report

    model = gptjax.load(path)
    pair = (model.config, model.params)
    (quality,) = measure.quality((original.config, original.params), [pair], batches, num_bytes=num_bytes)
    return report.Variant(
        name=name,
        quality=quality,
        size=measure.size(*pair),
        speed=measure.speed(*pair, prompt_len=min(model.config.seq_len // 2, 256)),
        disk_bytes=_num_bytes(store.find(path) / "params"),
        lineage=() if model.meta is None else model.meta.lineage,
    )


def _num_bytes(path: epath.Path) -> int:
    return sum(map(_num_bytes, path.iterdir())) if path.is_dir() else path.stat().length


if __name__ == "__main__":
    common.start(main)
