"""Files of multiple-choice questions, in the forms that their authors publish, as prompts and what may follow them.

One question a line, as JSON; told by its keys are ARC, OpenBookQA, BoolQ, HellaSwag, PIQA, COPA (and XCOPA in Chinese),
WinoGrande, BLiMP, requests of the LM Evaluation Harness's kind, and the plain form
`{"query": ..., "choices": [...], "gold": 0}`. The wording is that of the harness.

Source: https://github.com/EleutherAI/lm-evaluation-harness, `lm_eval/tasks`.
"""

from __future__ import annotations

import gzip
import json
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Choice = tuple[str, str]
"""What is there, and what may follow it."""


@dataclass(frozen=True)
class Question:
    """Of its choices the one numbered `gold` is right."""

    choices: tuple[Choice, ...]
    gold: int


def read(path: str, *, max_questions: int | None = None) -> list[Question]:
    """The questions of a file; some evenly from all over it if there are more.

    Args:
      path: of JSON lines, `.gz` perhaps.

    Raises:
      ValueError: naming the file and the line that is none of the known forms.
    """
    file = pathlib.Path(path).expanduser()
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        lines = content.decode().splitlines()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as lines of JSON: {error}") from error
    rows = [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if rows and "request" in rows[0][1]:
        questions = _of_requests(rows)
    else:
        questions = [_question(row, where) for where, row in rows]
    if not questions:
        raise ValueError(f"{path}: no question in it; expected one a line")
    if max_questions is None or max_questions >= len(questions):
        return questions
    return [questions[number * len(questions) // max_questions] for number in range(max_questions)]


def _parsed(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object of JSON, got {type(row).__name__}")
    return where, row


def _question(row: Mapping[str, Any], where: str) -> Question:
    form = next((form for keys, form in _FORMS.items() if row.keys() >= set(keys)), None)
    if form is None:
        raise ValueError(f"{where}: no known form of question has the keys {', '.join(sorted(row))}")
    try:
        return _checked(form(row), where)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{where}: damaged: {type(error).__name__} {error}") from error


def _checked(question: Question, where: str) -> Question:
    if len(question.choices) < 2 or not 0 <= question.gold < len(question.choices):
        raise ValueError(f"{where}: {len(question.choices)} choices, of which {question.gold} is said to be right")
    if not all(text for _, text in question.choices):
        raise ValueError(f"{where}: a choice is empty")
    return question


def _of_requests(rows: list[tuple[str, dict[str, Any]]]) -> list[Question]:
    """A line for each choice. A question's second set of lines asks for its choices without it, and is left out."""
    groups: dict[Any, list[tuple[str, dict[str, Any]]]] = {}
    first_of: dict[Any, Any] = {}
    for where, row in rows:
        document = row.get("doc_id")
        if first_of.setdefault(row.get("native_id"), document) == document:
            groups.setdefault(document, []).append((where, row))
    found = []
    for group in groups.values():
        where, first = group[0]
        try:
            choices = tuple((row["request"]["context"], row["request"]["continuation"]) for _, row in group)
            found.append(_checked(Question(choices, int(first["label"])), where))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: damaged request: {type(error).__name__} {error}") from error
    return found


def _after(query: str, choices: list[str], gold: Any) -> Question:
    return Question(tuple((query, f" {choice}") for choice in choices), int(gold))


def _labelled(query: str, row: Mapping[str, Any]) -> Question:
    return _after(query, row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


def _copa(row: Mapping[str, Any]) -> Question:
    is_chinese = any("\u4e00" <= character <= "\u9fff" for character in row["premise"])
    because, therefore = ("因为", "所以") if is_chinese else ("because", "therefore")
    connective = {"cause": because, "effect": therefore}[row["question"]]
    query = f"{row['premise'].strip().rstrip('.。')} {connective}"
    choices = [row["choice1"], row["choice2"]]
    return _after(query, [text[:1].lower() + text[1:] for text in choices], row["label"])


def _winogrande(row: Mapping[str, Any]) -> Question:
    """The same words follow, after one name or the other."""
    before, after = row["sentence"].split("_", 1)
    names = (row["option1"], row["option2"])
    return Question(tuple((before + name, f" {after.strip()}") for name in names), int(row["answer"]) - 1)


_FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Question]] = {
    ("query", "choices", "gold"): lambda row: _after(row["query"], row["choices"], row["gold"]),
    ("question_stem", "choices", "answerKey"): lambda row: _labelled(row["question_stem"], row),
    ("question", "choices", "answerKey"): lambda row: _labelled(f"Question: {row['question']}\nAnswer:", row),
    ("passage", "question", "answer"): lambda row: _after(
        f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], row["answer"]
    ),
    ("ctx", "endings", "label"): lambda row: _after(row["ctx"], row["endings"], row["label"]),
    ("goal", "sol1", "sol2", "label"): lambda row: _after(
        f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"]
    ),
    ("premise", "choice1", "choice2", "question", "label"): _copa,
    ("sentence", "option1", "option2", "answer"): _winogrande,
    ("sentence_good", "sentence_bad"): lambda row: Question((("", row["sentence_good"]), ("", row["sentence_bad"])), 0),
}
