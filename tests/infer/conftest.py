"""Tiny models for generation tests."""

import dataclasses

import pytest

from gptjax.nn.config import MoEConfig
from gptjax.nn.spec import MLASpec
from tests.tiny import TINY, random_params

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
    cfg = dataclasses.replace(TINY, **{"vocab_size": 67, "seq_len": 64, "tie_embeddings": False, **changes}).build()
    return cfg, random_params(cfg, scale=0.5)


@pytest.fixture(params=list(VARIANTS))
def variant(request):
    return build(**VARIANTS[request.param])


@pytest.fixture(scope="session")
def tiny():
    return build()
