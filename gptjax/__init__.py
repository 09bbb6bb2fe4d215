"""gptjax: GPT-class language models in JAX, from data to generation.

The public names below are imported when first used, so `import gptjax` costs nothing and a
program may set JAX up before it is loaded.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Model": "gptjax.model",
    "load": "gptjax.model",
    "GPT4LMHeadModel": "gptjax.api",
    "GPT4Tokenizer": "gptjax.api",
    "TextDataset": "gptjax.api",
    "DataCollatorForLanguageModeling": "gptjax.api",
    "Trainer": "gptjax.api",
    "TrainingArguments": "gptjax.api",
    "knowledge_distillation": "gptjax.api",
    "prune_model": "gptjax.api",
    "quantize_model": "gptjax.api",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptjax' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOMES.keys())
