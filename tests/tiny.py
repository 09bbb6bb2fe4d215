"""The tiny model that tests start from, and weights for it that no program has to be compiled for."""

from __future__ import annotations

import jax
import numpy as np

from gptjax.nn import transformer
from gptjax.nn.config import ModelConfig
from gptjax.nn.spec import ModelSpec
from gptjax.types import Params

TINY = ModelSpec(
    vocab_size=64, seq_len=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=32,
    activation="swiglu", position="rope", rope_theta=100.0, tie_embeddings=True, dtype="float32", remat="none",
)  # fmt: skip


def random_params(cfg: ModelConfig, *, seed: int = 0, scale: float = 0.4) -> Params:
    """Weights large enough for peaked predictions, so that greedy choices are no near-ties."""
    rng = np.random.default_rng(seed)
    shapes = transformer.abstract_params(cfg)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=scale).astype(leaf.dtype), shapes)
