"""Tiny models, one for each kind of layer."""

import dataclasses

from gptjax.nn.config import ModelConfig, MoEConfig, RopeScaling
from gptjax.nn.spec import MLASpec
from tests.tiny import TINY

MOE = MoEConfig(num_experts=4, num_experts_per_token=2, d_ff=16, activation="swiglu", shared_d_ff=8, z_loss=1e-3)
GROUPED_MOE = MoEConfig(
    num_experts=8,
    num_experts_per_token=2,
    d_ff=8,
    activation="swiglu_clamped",
    router="sigmoid",
    normalize=False,
    routed_scale=1.5,
    num_groups=4,
    groups_per_token=2,
    balancing="bias",
    router_bias=True,
    bias=True,
)
CAPACITY_MOE = dataclasses.replace(MOE, capacity_factor=0.75, balance_rate=0.1)

ZOO = {
    "dense": {},
    "gpt2": {
        "position": "learned", "norm": "layernorm", "bias": True, "activation": "gelu_tanh", "num_kv_heads": 4,
    },
    "window": {"num_layers": 3, "window": 4, "global_every": 3, "local_rope_theta": 50.0, "qk_norm": True},
    "sandwich": {
        "norm_placement": "sandwich", "attn_softcap": 5.0, "logit_softcap": 3.0, "attn_sinks": True,
        "activation": "geglu_tanh", "embed_scale": 4.0, "num_kv_heads": 1, "tie_embeddings": False,
    },
    "kv_shared": {"num_layers": 4, "kv_every": 2, "window": 6, "global_every": 0, "qk_norm": True},
    "post": {"norm_placement": "post", "activation": "relu2", "rope_fraction": 0.5},
    "mla": {
        "mla": MLASpec(kv_latent=8, nope_head_dim=8, rope_head_dim=4, v_head_dim=6, q_latent=12),
        "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_seq_len=8),
    },
    "mla_window": {
        "mla": MLASpec(kv_latent=8, nope_head_dim=8, rope_head_dim=4, v_head_dim=6),
        "num_layers": 2, "window": 4, "global_every": 2,
    },
    "moe": {"moe": MOE, "first_k_dense": 1},
    "moe_grouped": {"moe": GROUPED_MOE},
    "moe_capacity": {"moe": CAPACITY_MOE},
}  # fmt: skip


def build(name: str, **changes) -> ModelConfig:
    return dataclasses.replace(TINY, **{**ZOO[name], **changes}).build()
