"""Models known by name, and what a name or path given to `from_pretrained` means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NoReturn

from gptjax.data import tokenizer
from gptjax.nn.config import MoEConfig
from gptjax.nn.spec import ModelSpec

PRESETS: Mapping[str, ModelSpec] = {
    # The reported shape of GPT-4, experts of which two see each token, at a size that a laptop trains.
    "gpt4": ModelSpec(
        vocab_size=tokenizer.byte_level().vocab_size,
        seq_len=1024,
        d_model=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        d_ff=384,
        activation="swiglu",
        position="rope",
        rope_theta=10_000.0,
        tie_embeddings=True,
        dtype="auto",
        remat="none",
        moe=MoEConfig(num_experts=4, num_experts_per_token=2, d_ff=384, activation="swiglu"),
    ),
}


_NAMES = ", ".join(PRESETS)


def is_preset(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is a preset's; a file or directory of that name goes before it."""
    return name in PRESETS and not os.path.exists(name)


def check_there(name: str | os.PathLike[str]) -> None:
    """Raises ValueError for what is neither a preset's name nor a path that exists (gs:// may)."""
    if name not in PRESETS and "://" not in os.fspath(name) and not os.path.exists(name):
        raise ValueError(f"{os.fspath(name)!r}: neither a file or directory nor a preset, of which there are {_NAMES}")


def refuse_weights(name: str) -> NoReturn:
    """Raises: ValueError: a preset has no trained weights; the message says what to do."""
    raise ValueError(
        f"{name!r} is a preset: an architecture without trained weights. "
        f"Start from random ones with GPT4LMHeadModel.from_config({name!r}), "
        f"or give the directory of a checkpoint, such as one that save_pretrained wrote."
    )
