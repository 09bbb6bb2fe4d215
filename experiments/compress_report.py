"""Compares models that were made from one: quality, size and speed on one page.

    python -m experiments.compress_report --ckpts=runs/demo,runs/int8,runs/int4 --data=novel.txt --out=runs/report
    ... --tasks=copa.jsonl,arc_easy.jsonl --num_questions=200

The first is the original. Every model is scored by the evaluator of experiments.evaluate on the same tokens, from all
over the text, and on the same questions, and runs on the same prompt. The folder gets compress.html and compress.json.
A model that cannot be read, or has another tokenizer, is named there while others go on; the status is then 1.
"""

from __future__ import annotations

import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags, logging
from etils import epath

from experiments import common

if TYPE_CHECKING:
    from gptjax.compress.comparing import Candidate
    from gptjax.compress.report import Variant

_CKPTS = flags.DEFINE_list("ckpts", None, "Checkpoints or workdirs (their newest), the original first.", required=True)
_NAMES = flags.DEFINE_list("names", None, "What they are called; the names of their directories unless told.")
_DATA = flags.DEFINE_string("data", None, "Held-out token store, text file, or source of prepare_data.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for the page and its figures; without a report yet.", required=True)
_TOKENS = flags.DEFINE_integer("num_tokens", 65_536, "Of the text, at most.", lower_bound=512)
_SEQ_LEN = flags.DEFINE_integer(
    "seq_len", None, "Tokens of a row; the model's context, at most 512, unless told.", lower_bound=2
)
_TASKS = flags.DEFINE_list("tasks", [], "Files of multiple-choice questions: ARC, COPA, PIQA, HellaSwag, BLiMP, ...")
_QUESTIONS = flags.DEFINE_integer("num_questions", None, "Of each task, at most; all unless told.", lower_bound=1)


def main() -> int:
    """Measures every checkpoint, and writes the page."""
    from gptjax.compress import comparing, report
    from gptjax.eval import task_files

    names = _NAMES.value or [pathlib.Path(path.rstrip("/")).name for path in _CKPTS.value]
    if len(names) != len(_CKPTS.value):
        raise ValueError(f"--names has {len(names)} names, expected one for each of {len(_CKPTS.value)} --ckpts")
    if len(set(names)) < len(names):
        raise ValueError(f"--names: {', '.join(names)}: some are the same; give each checkpoint its own")
    report.check_free(_OUT.value)
    questions = {
        pathlib.Path(file).name.split(".json")[0]: task_files.read(file, max_questions=_QUESTIONS.value)
        for file in _TASKS.value
    }
    original = _load(names[0], _CKPTS.value[0])
    exam = comparing.prepare(
        original, text=_DATA.value, seq_len=_SEQ_LEN.value, num_tokens=_TOKENS.value, questions=questions
    )
    variants, failures = [comparing.take(exam, original)], {}
    _tell(variants)
    for name, path in zip(names[1:], _CKPTS.value[1:], strict=True):
        try:
            variants.append(comparing.take(exam, _load(name, path)))
            _tell(variants)
        except (ValueError, OSError) as error:
            failures[name] = str(error)
            print(f"{name}: not measured: {error}", file=sys.stderr)
    comparison = report.Comparison(title=names[0], variants=variants, failures=failures, facts=exam.facts)
    report.write(comparison, _OUT.value)
    print(f"{report.as_text(variants)}\n{_OUT.value}/compress.html")
    return 1 if failures else 0


def _load(name: str, path: str) -> Candidate:
    import gptjax
    from gptjax.checkpoint import store
    from gptjax.compress.comparing import Candidate

    model = gptjax.load(path)
    return Candidate(
        name=name,
        config=model.config,
        params=model.params,
        tokenizer=model.tokenizer,
        disk_bytes=_num_bytes(store.find(path) / "params" if model.meta else epath.Path(path).expanduser()),
        lineage=() if model.meta is None else model.meta.lineage,
    )


def _tell(variants: list[Variant]) -> None:
    quality = variants[-1].quality
    logging.info(
        "%s: %.4f bits per byte, perplexity %.3f times the original's",
        variants[-1].name,
        quality.bits_per_byte,
        quality.perplexity_ratio,
    )


def _num_bytes(path: epath.Path) -> int:
    return sum(map(_num_bytes, path.iterdir())) if path.is_dir() else path.stat().length


if __name__ == "__main__":
    common.start(main)
