"""Writes transformers.json: logits of tiny models as the transformers library computes them.

    python tests/golden/make_transformers.py        # in an environment with torch and transformers

Weights are not stored: both sides draw them from the parameter's name (`weight`), and the test builds our models
from the same draws. Run it again only when a model is added; the logits of the others must not change.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

LENGTH = 12
KEPT = np.s_[:, ::3, ::4]  # of the logits [2, LENGTH, 48], to keep the file small
TOKENS = [[(7 * row + 5 * column) % 48 for column in range(LENGTH)] for row in range(2)]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values that depend on the name and the shape alone; scales of norms are around 1."""
    draw = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if "norm" in name and name.endswith("weight"):
        return (1 + 0.2 * draw).astype(np.float32)
    return (draw * (0.3 if len(shape) < 2 else 0.25)).astype(np.float32)


_SIZES = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              max_position_embeddings=64, tie_word_embeddings=False)  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "Llama": _SIZES
    | dict(
        num_key_value_heads=2,
        rope_parameters={"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "Qwen3": _SIZES | dict(num_key_value_heads=2, head_dim=16, rope_parameters=_YARN),
    "Gemma2": _SIZES
    | dict(num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=24, sliding_window=4, attn_logit_softcapping=5.0,
           final_logit_softcapping=3.0, tie_word_embeddings=True, pad_token_id=None),
    "Mixtral": _SIZES
    | dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
           rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}),
    "GptOss": _SIZES
    | dict(num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
           attention_bias=True, rope_parameters=_YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}),
    "DeepseekV3": _SIZES
    | dict(num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3, n_group=4,
           topk_group=2, n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=2.5,
           q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12,
           rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}),
    "DeepseekV2": _SIZES
    | dict(num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3, n_group=4,
           topk_group=2, topk_method="group_limited_greedy", n_shared_experts=1, first_k_dense_replace=1,
           norm_topk_prob=False, routed_scaling_factor=2.0, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8,
           qk_rope_head_dim=8, v_head_dim=12,
           rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}),
    "GPT2": dict(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}  # fmt: skip


def logits(name: str) -> np.ndarray:
    import torch
    import transformers

    family = "" if name == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**MODELS[name], attn_implementation="eager")
    model = getattr(transformers, f"{name}{family or 'LMHeadModel'}")(config).float().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(torch.from_numpy(weight(key, tuple(tensor.shape))))
        return model(torch.tensor(TOKENS)).logits.numpy()


if __name__ == "__main__":
    import transformers

    found = {name: np.round(logits(name)[KEPT].astype(float), 5).tolist() for name in MODELS}
    file = Path(__file__).with_name("transformers.json")
    file.write_text(json.dumps({"transformers": transformers.__version__} | found) + "\n")
