"""One codebase for the whole life of a GPT: data, pretraining, evaluation, generation.

The public names; each is imported on first use, so that `import gptjax` is immediate.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DataCollatorForLanguageModeling": "gptjax.api",
    "GPT4LMHeadModel": "gptjax.api",
    "GPT4Tokenizer": "gptjax.api",
    "TextDataset": "gptjax.api",
    "Trainer": "gptjax.api",
    "TrainingArguments": "gptjax.api",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
