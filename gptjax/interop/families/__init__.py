"""Model families, each a table and a config map that drive both directions."""

from __future__ import annotations

from gptjax.interop.families import gemma3, gpt2, llama, qwen3
from gptjax.interop.table import Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (gpt2.GPT2, llama.LLAMA, llama.MISTRAL, qwen3.QWEN3, gemma3.GEMMA3)
}
"""By Hugging Face's `model_type`; the first that expresses a model is the one it is exported as."""
