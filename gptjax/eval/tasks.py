"""Multiple choice: of a question's choices a model takes the one that it finds most likely after the prompt.

    score = sum over the tokens of a choice of log p(token | prompt and the tokens before)

By bytes it is divided by the choice's length in UTF-8, so that long choices are not worse for being long.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.data import packing
from gptjax.data.tokenizer import Tokenizer
from gptjax.eval import perplexity
from gptjax.eval.task_files import Question
from gptjax.nn.config import ModelConfig
from gptjax.types import Batch, Params

_BATCH_TOKENS = 1024
# Rows of one program: lengths are rounded up to a few.
_LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model made of a task.

    Attributes:
      right: of each question, whether the most likely choice was right, and `right_by_bytes` by bytes.
    """

    right: tuple[bool, ...]
    right_by_bytes: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares of questions; errors are standard errors, questions being independent.

    Attributes:
      difference: to the original's accuracy; its error is that over the same questions, and so far smaller than what
        the errors of both would make.
    """

    num_questions: int
    accuracy: float
    accuracy_error: float
    accuracy_by_bytes: float
    difference: float
    difference_error: float


def answer(cfg: ModelConfig, params: Params, tokenizer: Tokenizer, questions: Sequence[Question]) -> Answers:
    """Has a model answer, by the evaluator of `eval.perplexity`.

    A prompt that is too long for the context loses its beginning.
    """
    rows = [_row(tokenizer, *choice, seq_len=cfg.seq_len) for question in questions for choice in question.choices]
    scores = _scores(cfg, params, rows)
    sizes = np.array([len(text.encode()) for question in questions for _, text in question.choices])
    right, by_bytes, at = [], [], 0
    for question in questions:
        own = slice(at, at + len(question.choices))
        at = own.stop
        right.append(bool(scores[own].argmax() == question.gold))
        by_bytes.append(bool((scores[own] / sizes[own]).argmax() == question.gold))
    return Answers(right=tuple(right), right_by_bytes=tuple(by_bytes))


def score(answers: Answers, original: Answers) -> Score:
    """The shares, beside those of the original on the same questions."""
    right, other = np.array(answers.right, float), np.array(original.right, float)
    return Score(
        num_questions=len(right),
        accuracy=float(right.mean()),
        accuracy_error=_error(right),
        accuracy_by_bytes=float(np.mean(answers.right_by_bytes)),
        difference=float((right - other).mean()),
        difference_error=_error(right - other),
    )


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _row(tokenizer: Tokenizer, prompt: str, choice: str, *, seq_len: int) -> tuple[list[int], int]:
    """The tokens, and how many of the last are the choice's; a space between the two belongs to the choice."""
    kept = prompt.rstrip(" ")
    whole = tokenizer.encode_prompt(prompt + choice)
    size = max(1, len(whole) - max(1, len(tokenizer.encode_prompt(kept))))
    whole = whole[-(seq_len + 1) :]
    return whole, min(size, len(whole) - 1)


def _scores(cfg: ModelConfig, params: Params, rows: Sequence[tuple[list[int], int]]) -> np.ndarray:
    """The log-likelihood of each row's choice, `[R]`."""
    found = np.zeros(len(rows))
    lengths = [next((n for n in _LENGTHS if n >= len(tokens) - 1), cfg.seq_len) for tokens, _ in rows]
    lengths = [min(length, cfg.seq_len) for length in lengths]
    for length in sorted(set(lengths)):
        own = [number for number, size in enumerate(lengths) if size == length]
        rows_at_once = max(1, _BATCH_TOKENS // length)
        for start in range(0, len(own), rows_at_once):
            numbers = own[start : start + rows_at_once]
            batch = _batch([rows[number] for number in numbers], num_rows=rows_at_once, length=length)
            nll_BT, _ = perplexity.token_nll(cfg, params, batch)
            nats = np.where(batch.loss_mask > 0, np.asarray(nll_BT, np.float64), 0.0).sum(-1)
            found[numbers] = -nats[: len(numbers)]
    return found


def _batch(rows: Sequence[tuple[list[int], int]], *, num_rows: int, length: int) -> Batch:
    batch = packing.empty_batch(num_rows, length)
    arrays = {name: np.asarray(value) for name, value in dataclasses.asdict(batch).items() if name != "teacher"}
    for at, (tokens, size) in enumerate(rows):
        end = len(tokens) - 1
        arrays["tokens"][at, :end], arrays["targets"][at, :end] = tokens[:-1], tokens[1:]
        arrays["loss_mask"][at, end - size : end] = 1.0
        arrays["segment_ids"][at, :end] = 1
        arrays["positions"][at, :end] = np.arange(end)
    return Batch(**arrays)  # type: ignore[arg-type]
