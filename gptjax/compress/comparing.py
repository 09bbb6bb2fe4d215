"""What models are put through to be compared: the same text, the same questions, the same prompt."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from gptjax.checkpoint import meta as meta_lib
from gptjax.compress import measure
from gptjax.compress.report import Variant
from gptjax.data.tokenizer import Tokenizer
from gptjax.eval import heldout, tasks
from gptjax.eval.heldout import HeldOut
from gptjax.eval.task_files import Question
from gptjax.eval.tasks import Answers
from gptjax.nn.config import ModelConfig
from gptjax.types import Params

_MAX_ROW, _MAX_PROMPT = 512, 256


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to be measured.

    Attributes:
      disk_bytes: of its checkpoint's files.
      lineage: what was done to it, oldest first; see `checkpoint.meta.Meta`.
    """

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    disk_bytes: int
    lineage: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The original, and what every model is measured on.

    Attributes:
      reference: the original on the text.
      answers: the original's, by task.
    """

    original: Candidate
    text: HeldOut
    reference: measure.Reference
    questions: Mapping[str, Sequence[Question]]
    answers: Mapping[str, Answers]

    @property
    def facts(self) -> dict[str, Any]:
        """What the figures are made of, in words."""
        asked = {f"questions of {name}": len(found) for name, found in self.questions.items()}
        device, versions = jax.devices()[0], meta_lib.versions()
        return {
            "text": self.text.name,
            "targets": self.text.num_targets,
            "bytes": self.text.num_bytes,
            **asked,
            "measured": meta_lib.now(),
            "device": f"{device.device_kind}, {platform.machine()}, {os.cpu_count()} processors",
            "versions": ", ".join(f"{name} {versions[name]}" for name in ("gptjax", "jax", "python")),
        }


def prepare(
    original: Candidate,
    *,
    text: str,
    seq_len: int | None,
    num_tokens: int,
    questions: Mapping[str, Sequence[Question]],
) -> Exam:
    """The exam that an original sets.

    Args:
      text: held-out; see `eval.heldout.read`.
      seq_len: of its rows; None is the context, at most 512.
      num_tokens: of it, at most.
      questions: of each task.

    Raises:
      ValueError: if the text cannot be read or has only one row, whose error nobody knows, the original has no
        tokenizer to read it with, or rows are longer than its context.
    """
    if original.tokenizer is None:
        raise ValueError(f"{original.name}: has no tokenizer to read text with")
    cfg = original.config
    if seq_len is not None and seq_len > cfg.seq_len:
        raise ValueError(f"seq_len={seq_len}: expected at most {cfg.seq_len}, the context of {original.name}")
    rows = heldout.read(text, original.tokenizer, seq_len=seq_len or min(cfg.seq_len, _MAX_ROW), num_tokens=num_tokens)
    if sum(int(batch.loss_mask.any(-1).sum()) for batch in rows.batches) < 2:
        raise ValueError(
            f"{text}: has one row of {seq_len or min(cfg.seq_len, _MAX_ROW)} tokens, whose error nobody knows; "
            "expected two at least: give more text, or a larger --num_tokens or smaller --seq_len"
        )
    answers = {name: tasks.answer(cfg, original.params, original.tokenizer, found) for name, found in questions.items()}
    reference = measure.reference(cfg, original.params, rows.batches, num_bytes=rows.num_bytes)
    return Exam(original=original, text=rows, reference=reference, questions=questions, answers=answers)


def take(exam: Exam, candidate: Candidate) -> Variant:
    """All figures of a model.

    Raises:
      ValueError: if it has another tokenizer or vocabulary than the original.
    """
    original = exam.original
    assert original.tokenizer is not None, "the exam was read with it"
    _check_tokenizer(candidate, original.name, original.tokenizer)
    pair = (candidate.config, candidate.params)
    scores = {}
    for name, questions in exam.questions.items():
        answers = tasks.answer(*pair, original.tokenizer, questions)
        scores[name] = tasks.score(answers, exam.answers[name])
    return Variant(
        name=candidate.name,
        quality=measure.quality(exam.reference, *pair),
        size=measure.size(*pair),
        speed=measure.speed(*pair, prompt_len=min(candidate.config.seq_len // 2, _MAX_PROMPT)),
        disk_bytes=candidate.disk_bytes,
        tasks=scores,
        lineage=candidate.lineage,
    )


def _check_tokenizer(candidate: Candidate, name: str, wanted: Tokenizer) -> None:
    """Its ids have to mean what the original's do; text is read with the original's, which other formats may change."""
    found = candidate.tokenizer
    if found is not None and (found.fingerprint == wanted.fingerprint or found.pieces == wanted.pieces):
        return
    raise ValueError(
        f"{candidate.name}: has {'no tokenizer' if found is None else 'another tokenizer'}, where {name}'s is needed: "
        "tokens are what the figures are of; compare models of one tokenizer"
    )
