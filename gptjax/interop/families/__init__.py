"""Model families, each a table and a config map that drive both directions."""

from __future__ import annotations

from gptjax.interop.families import deepseek_v3, gemma3, gpt2, gpt_oss, llama, mixtral, qwen3, qwen3_moe
from gptjax.interop.multimodal import Multimodal
from gptjax.interop.table import Family

_ALL = (
    gpt2.GPT2,
    llama.LLAMA,
    llama.MISTRAL,
    qwen3.QWEN3,
    gemma3.GEMMA3,
    mixtral.MIXTRAL,
    qwen3_moe.QWEN3_MOE,
    deepseek_v3.DEEPSEEK_V3,
    gpt_oss.GPT_OSS,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
"""By Hugging Face's `model_type`; the first that expresses a model is the one it is exported as."""
MULTIMODAL: dict[str, Multimodal] = {gemma3.GEMMA3_MULTIMODAL.name: gemma3.GEMMA3_MULTIMODAL}
"""By `model_type`: folders with the text model of a family in them. They are read, and not written."""
