"""Model families, each a table and a config map that drive both directions."""

from __future__ import annotations

from gptjax.interop.families import llama
from gptjax.interop.table import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (llama.LLAMA, llama.MISTRAL)}
"""By Hugging Face's `model_type`; the first that expresses a model is the one it is exported as."""
