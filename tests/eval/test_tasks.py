"""Multiple choice: the forms of questions, and scores by hand."""

import dataclasses
import gzip
import json
import math

import numpy as np
import pytest

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.eval import task_files, tasks
from gptjax.eval.task_files import Question
from gptjax.eval.tasks import Answers
from gptjax.nn import transformer
from tests.tiny import TINY, random_params

BYTES = tokenizer_lib.byte_level()
FORMS = [
    (
        {"question": "Which?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"},
        Question(tuple(("Question: Which?\nAnswer:", f" {x}") for x in "abc"), 2),
    ),
    (
        {"question_stem": "It is", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        Question((("It is", " a"), ("It is", " b")), 0),
    ),
    (
        {"passage": "P.", "question": "is it", "answer": True},
        Question((("P.\nQuestion: is it?\nAnswer:", " no"), ("P.\nQuestion: is it?\nAnswer:", " yes")), 1),
    ),
    (
        {"ctx": "A man", "endings": ["runs", "eats"], "label": "1"},
        Question((("A man", " runs"), ("A man", " eats")), 1),
    ),
    (
        {"goal": "Boil", "sol1": "fire", "sol2": "ice", "label": 0},
        Question((("Question: Boil\nAnswer:", " fire"), ("Question: Boil\nAnswer:", " ice")), 0),
    ),
    (
        {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I sang.", "question": "effect", "label": 0},
        Question((("It rained therefore", " i got wet."), ("It rained therefore", " i sang.")), 0),
    ),
    (
        {"premise": "下雨了。", "choice1": "湿", "choice2": "干", "question": "cause", "label": 1},
        Question((("下雨了 因为", " 湿"), ("下雨了 因为", " 干")), 1),
    ),
    (
        {"sentence": "The cup hit the _ and it broke.", "option1": "wall", "option2": "sea", "answer": "1"},
        Question((("The cup hit the wall", " and it broke."), ("The cup hit the sea", " and it broke.")), 0),
    ),
    ({"sentence_good": "I am.", "sentence_bad": "I is."}, Question((("", "I am."), ("", "I is.")), 0)),
    ({"query": "1 + 1 =", "choices": ["2", "3"], "gold": 0}, Question((("1 + 1 =", " 2"), ("1 + 1 =", " 3")), 0)),
]


@pytest.mark.parametrize("row, question", FORMS)
def test_the_forms_of_questions(tmp_path, row, question):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n")
    assert task_files.read(str(tmp_path / "a.jsonl")) == [question]


def test_requests_are_a_line_for_each_choice(tmp_path):
    def line(document, native, context, continuation):
        request = {"context": context, "continuation": continuation}
        return json.dumps({"doc_id": document, "native_id": native, "label": 1, "request": request})

    lines = [line(0, "x", "Q", " a"), line(0, "x", "Q", " b"), line(10**6, "x", "Answer:", " a")]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    assert task_files.read(str(tmp_path / "a.jsonl.gz")) == [Question((("Q", " a"), ("Q", " b")), 1)]


def test_some_questions_are_from_all_over_the_file(tmp_path):
    rows = [json.dumps({"query": str(i), "choices": ["a", "b"], "gold": 0}) for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = task_files.read(str(tmp_path / "a.jsonl"), max_questions=4)
    assert [question.choices[0][0] for question in found] == ["0", "2", "5", "7"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "a.jsonl: no question in it"),
        ("{", "a.jsonl:1: no JSON"),
        ("[1]", "a.jsonl:1: expected an object of JSON, got list"),
        ('{"goal": "x", "sol1": "y"}', "a.jsonl:1: no known form of question has the keys goal, sol1"),
        ('{"query": "x", "choices": ["a", "b"], "gold": 2}', "2 choices, of which 2 is said to be right"),
        ('{"ctx": "x", "endings": null, "label": 0}', "a.jsonl:1: damaged: TypeError"),
        ('{"sentence_good": "a", "sentence_bad": ""}', "a choice is empty"),
    ],
)
def test_what_is_no_file_of_questions_is_refused_by_its_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        task_files.read(str(tmp_path / "a.jsonl"))


def test_the_most_likely_choice_is_taken():
    """By hand: the sum of log-probabilities of the choice's bytes, one text at a time."""
    cfg = dataclasses.replace(TINY, vocab_size=BYTES.vocab_size, seq_len=48).build()
    params = random_params(cfg)
    questions = [
        Question((("the cat", " sat"), ("the cat", " flew away")), 0),
        Question((("", "a bird"), ("", "birds a")), 1),
        Question((("x" * 80, " y"), ("x" * 80, " zz")), 1),  # longer than the context
        Question((("a ", "b"), ("a ", "c")), 0),
    ]
    found = tasks.answer(cfg, params, BYTES, questions)
    right, by_bytes = [], []
    for question in questions:
        scores, sizes = [], []
        for prompt, choice in question.choices:
            whole = BYTES.encode_prompt(prompt + choice)
            num = len(whole) - len(BYTES.encode_prompt(prompt.rstrip(" ")))
            whole = whole[-(cfg.seq_len + 1) :]
            tokens = np.array([whole[:-1]], np.int32)
            logits = np.asarray(
                transformer.logits(cfg, params, transformer.forward(cfg, params, tokens).hidden_BTD)[0], float
            )
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            scores.append(sum(log_p[t, whole[t + 1]] for t in range(len(whole) - 1 - num, len(whole) - 1)))
            sizes.append(len(choice.encode()))
        right.append(int(np.argmax(scores)) == question.gold)
        by_bytes.append(int(np.argmax(np.array(scores) / sizes)) == question.gold)
    assert found == Answers(right=tuple(right), right_by_bytes=tuple(by_bytes))
    assert len(set(right)) == 2  # or nothing is tested


def test_scores_and_their_errors():
    one = Answers(right=(True, True, False, True), right_by_bytes=(True,) * 4)
    other = Answers(right=(True, False, False, True), right_by_bytes=(False,) * 4)
    found = tasks.score(one, other)
    assert (found.num_questions, found.accuracy, found.accuracy_by_bytes, found.difference) == (4, 0.75, 1.0, 0.25)
    assert found.accuracy_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert found.difference_error == pytest.approx(math.sqrt((0.75**2 + 3 * 0.25**2) / 3 / 4))
    assert tasks.score(one, one).difference_error == 0
