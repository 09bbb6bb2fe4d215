"""Writes what a model continues prompts with; one prompt is streamed to the terminal as it is made.

    python -m experiments.generate --workdir=runs/demo --prompt='def read(path):' --temperature=0.8 --top_p=0.95
    echo 'import os' | python -m experiments.generate --workdir=runs/demo --max_new_tokens=256

A model that was trained to chat answers with --chat, by the template that came with its tokenizer.

Several --prompt flags are completed as one batch. The summary, completions included, goes to generate/summary.json
of the workdir, or to --out. All devices share each layer; on several hosts, start it on each with --prompt.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from experiments import common, model_flags

if TYPE_CHECKING:
    from gptjax.model import Model

_PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; repeatable. Without it, standard input is read.")
_CHAT = flags.DEFINE_bool("chat", False, "A prompt is what a user says, and the completion the assistant's answer.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "Tokens of a completion at most; 128, or as many as fit in the context, unless told.",
    lower_bound=1,
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0 is off.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the most likely tokens with this much probability; 1 is off.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Draw from tokens this likely relative to the most likely; 0 is off.")
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Over 1 discourages tokens that occurred; 1 is off.")
_STOP = flags.DEFINE_multi_string("stop", None, r"Text that ends a completion; repeatable. \n and \t are understood.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
flags.adopt_module_key_flags(model_flags)


def main() -> None:
    """Completes the prompts."""
    model_flags.path()
    if not _PROMPT.value and sys.stdin.isatty():
        print("Type a prompt, then Ctrl-D.", file=sys.stderr)
    prompts = _PROMPT.value or [sys.stdin.read()]
    if not _PROMPT.value and not prompts[0]:
        raise ValueError("no prompt: give --prompt or text on standard input")
    options: dict[str, Any] = {
        "temperature": _TEMPERATURE.value,
        "top_k": _TOP_K.value,
        "top_p": _TOP_P.value,
        "min_p": _MIN_P.value,
        "repetition_penalty": _PENALTY.value,
        "stop": [text.replace("\\n", "\n").replace("\\t", "\t") for text in _STOP.value or ()],
        "seed": _SEED.value,
    }
    if _MAX_NEW_TOKENS.value is not None:
        options["max_new_tokens"] = _MAX_NEW_TOKENS.value
    with common.all_devices("tensor"):
        model_flags.write_summary("generate", _complete(prompts, options))


def _complete(prompts: list[str], options: dict[str, Any]) -> dict[str, Any]:
    model, origin = model_flags.load()
    logging.info("%s at step %d; %s", origin["checkpoint"], origin["step"], options)
    began = time.perf_counter()
    completions = _stream(model, prompts[0], options) if len(prompts) == 1 else _batch(model, prompts, options)
    samples = [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
    seconds = time.perf_counter() - began
    return origin | {"options": options | {"chat": _CHAT.value}, "wall_seconds": seconds, "samples": samples}


def _stream(model: Model, prompt: str, options: dict) -> list[str]:
    stream = model.stream(_said(model, prompt), **options)
    _show_prompt(prompt)
    pieces = []
    for piece in stream:
        print(piece, end="", flush=True)
        pieces.append(piece)
    print(flush=True)
    return ["".join(pieces)]


def _batch(model: Model, prompts: list[str], options: dict) -> list[str]:
    found = model.complete([_said(model, prompt) for prompt in prompts], **options)
    completions = [completion.text or "" for completion in found]
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        print(f"{chr(10) if index else ''}--- {index}")
        _show_prompt(prompt)
        print(completion)
    return completions


def _said(model: Model, prompt: str) -> str | list[int]:
    return model.chat_tokens([{"role": "user", "content": prompt}]) if _CHAT.value else prompt


def _show_prompt(prompt: str) -> None:
    # Grey on a terminal, so that the model's own words stand out.
    shown = f"{prompt}\n" if _CHAT.value else prompt
    print(f"\x1b[90m{shown}\x1b[0m" if sys.stdout.isatty() else shown, end="", flush=True)


if __name__ == "__main__":
    common.start(main)
