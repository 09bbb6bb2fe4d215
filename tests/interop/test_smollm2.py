"""A language model of others that chats: SmolLM2-135M-Instruct in Q4_1, beside llama.cpp.

Set GPTJAX_SMOLLM2 to the file that `python -m tools.fetch_smollm2` gets.
"""

import os
import pathlib

import numpy as np
import pytest

from gptjax.interop import certificate, checkpoint, gguf
from gptjax.interop.runner import GptjaxRunner

pytest.importorskip("gptjax.data.huggingface")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")

QUESTIONS = (
    "Who are you?",
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child.",
    "List three prime numbers.",
)
BEGINNINGS = ("The quick brown fox", "Once upon a time", "def fibonacci(n):\n", "In 1969, humans", "Water boils at")


@pytest.fixture(scope="module")
def source():
    file = os.environ.get("GPTJAX_SMOLLM2")
    if not file or not pathlib.Path(file).is_file():
        pytest.skip("no SmolLM2: run tools.fetch_smollm2 and set GPTJAX_SMOLLM2 to its file")
    return gguf.open_source(pathlib.Path(file))


def test_it_says_what_llama_cpp_says(source, tmp_path):
    """llama.cpp is given the file's values in float32.

    Given the file it rounds activations to 8 bits, and parts with itself: of these 10 prompts it then goes on for 64
    tokens as it does with the same values in float32 in 2, its logits being off by up to 2.6.
    """
    from gptjax.interop.referees import llama_cpp

    checkpoint.write(source, tmp_path / "ckpt")
    ours, theirs = GptjaxRunner.load(tmp_path / "ckpt"), llama_cpp.of_source(source)
    tokenizer = source.tokenizer
    assert all(tokenizer.encode(text) == theirs.encode(text) for text in certificate.STRINGS)
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        for text in QUESTIONS
    ]
    equal, worst = 0, 0.0
    for text in (*chats, *BEGINNINGS):
        tokens = tokenizer.encode(text)
        worst = max(worst, float(np.abs(ours.logits(tokens) - theirs.logits(tokens)).max()))
        equal += ours.greedy(tokens, 64) == theirs.greedy(tokens, 64)
    assert worst < 2e-3 and equal >= 9
    theirs.close()
    quantised = llama_cpp.of_file(source.path)
    tokens = tokenizer.encode(chats[1])
    assert 0.01 < np.abs(ours.logits(tokens) - quantised.logits(tokens)).max() < 5
