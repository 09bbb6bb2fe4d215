"""Tiny models for generation tests."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax.nn import transformer
from gptjax.nn.config import MoEConfig
from gptjax.nn.spec import MLASpec, ModelSpec

TINY = ModelSpec(
    vocab_size=67,
    seq_len=64,
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=32,
    activation="swiglu",
    position="rope",
    rope_theta=100.0,
    tie_embeddings=False,
    dtype="float32",
    remat="none",
)

MOE = MoEConfig(num_experts=4, num_experts_per_token=2, d_ff=16, activation="swiglu", shared_d_ff=8)

VARIANTS = {
    "gqa": {"qk_norm": True},
    "mqa_partial_rope": {"num_kv_heads": 1, "rope_fraction": 0.5},
    "window": {"window": 5, "global_every": 2},
    "mla": {"mla": MLASpec(kv_latent=8, nope_head_dim=8, rope_head_dim=4, v_head_dim=8)},
    "learned": {"position": "learned", "norm": "layernorm", "bias": True, "activation": "gelu", "tie_embeddings": True},
    "softcap_sinks": {"attn_softcap": 5.0, "attn_sinks": True, "logit_softcap": 4.0, "norm_placement": "sandwich"},
    "moe": {"moe": MOE, "first_k_dense": 1},
}


def build(**changes):
    """A tiny model with random weights; drawn by numpy, which compiles nothing."""
    cfg = dataclasses.replace(TINY, **changes).build()
    return cfg, random_params(cfg)


def random_params(cfg):
    """Weights large enough for peaked predictions, so that greedy choices are no near-ties."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape, scale=0.5).astype(np.float32), transformer.abstract_params(cfg)
    )


@pytest.fixture(params=list(VARIANTS))
def variant(request):
    return build(**VARIANTS[request.param])


@pytest.fixture(scope="session")
def tiny():
    return build()
