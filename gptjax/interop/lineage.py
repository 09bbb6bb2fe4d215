"""What was done to a model, told where other frameworks keep such things: a model card, a GGUF file's metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gptjax.checkpoint.meta import Meta

CARD_FILE = "README.md"
GGUF_KEY = "gptjax.lineage"
_MAX_FACTS, _MAX_CHARACTERS = 12, 120


def gguf_facts(meta: Meta) -> dict[str, str]:
    """Metadata of a GGUF file: the lineage as JSON, and in words as its description."""
    if not meta.lineage:
        return {}
    words = "; ".join(_in_words(entry) for entry in meta.lineage)
    return {"general.description": words, GGUF_KEY: json.dumps(list(meta.lineage))}


def model_card(meta: Meta) -> str:
    """A `README.md` as Hugging Face has them: what the model is and what was done to it, oldest first."""
    lines = ["---", "library_name: transformers", "tags:", "- gptjax", "---", "", "# Model card", ""]
    lines.append(f"Exported by gptjax from a checkpoint of step {meta.step}; `certificate.json` has the proof.")
    if meta.lineage:
        lines += ["", "## What was done to it", ""]
        lines += [f"{number}. {_in_words(entry)}" for number, entry in enumerate(meta.lineage, 1)]
    if meta.model.quant is not None:
        lines += ["", "Kernels that were in few bits are here the floats that those stand for."]
    return "\n".join(lines) + "\n"


def _in_words(entry: Mapping[str, Any]) -> str:
    """`stage: fact value, ...`, the details left to the JSON."""
    facts = [f"{name} {value}"[:_MAX_CHARACTERS] for name, value in _flat(entry) if name != "stage"]
    return f"{entry.get('stage', 'unknown')}: {', '.join(facts[:_MAX_FACTS])}".replace("\n", " ").rstrip(": ")


def _flat(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value
