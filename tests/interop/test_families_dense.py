"""Dense families beside transformers: what comes in computes the same, and what goes out is what came in."""

import pytest

from tests.interop import peers
from tests.interop.peers import transformers

SMALL = dict(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=96,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, original_max_position_embeddings=24, low_freq_factor=1.0, high_freq_factor=4.0
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=24)


def llama(**keys):
    return transformers.LlamaConfig(**SMALL | keys)


def mistral(**keys):
    return transformers.MistralConfig(**SMALL | keys)


def qwen3(**keys):
    return transformers.Qwen3Config(**SMALL | dict(head_dim=16) | keys)


def gemma3(**keys):
    defaults = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=7, sliding_window_pattern=3)
    return transformers.Gemma3TextConfig(**SMALL | defaults | keys)


def gpt2(**keys):
    defaults = dict(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=96)
    return transformers.GPT2Config(**defaults | keys)


CONFIGS = {
    "gpt2": gpt2,
    "gpt2 untied, exact gelu": lambda: gpt2(tie_word_embeddings=False, activation_function="gelu", n_inner=40),
    "gpt2 one head, relu": lambda: gpt2(n_head=1, n_layer=1, activation_function="relu", layer_norm_epsilon=1e-3),
    "llama": llama,
    "llama multi-head, tied, biases": lambda: llama(
        num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5
    ),
    "llama ratio 8, wide heads": lambda: llama(
        num_attention_heads=8, num_key_value_heads=1, head_dim=6, mlp_bias=True, num_hidden_layers=2
    ),
    "llama, llama3 scaling": lambda: llama(rope_parameters=LLAMA3 | dict(rope_theta=500_000.0)),
    "llama, linear scaling": lambda: llama(rope_scaling=dict(type="linear", factor=4.0), rope_theta=100.0),
    "llama, yarn": lambda: llama(rope_parameters=YARN | dict(rope_theta=10_000.0, attention_factor=1.3)),
    "mistral": lambda: mistral(sliding_window=7),
    "mistral without a window, tied": lambda: mistral(sliding_window=None, tie_word_embeddings=True, head_dim=6),
    "mistral, yarn": lambda: mistral(sliding_window=30, rope_parameters=YARN | dict(rope_theta=1000.0, beta_fast=16.0)),
    "qwen3": qwen3,
    "qwen3 multi-head, tied, biases": lambda: qwen3(
        num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, rms_norm_eps=1e-5
    ),
    "qwen3 ratio 8, last layers local": lambda: qwen3(
        num_attention_heads=8, num_key_value_heads=1, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3 layer types, yarn": lambda: qwen3(
        num_hidden_layers=4, use_sliding_window=True, sliding_window=9, max_window_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters=YARN | dict(rope_theta=1e6),
    ),
    "gemma3": gemma3,
    "gemma3 untied, soft-capped, biases": lambda: gemma3(
        tie_word_embeddings=False, final_logit_softcapping=3.0, attention_bias=True, query_pre_attn_scalar=24,
        num_key_value_heads=4,
    ),
    "gemma3 ratio 8, scaled globally": lambda: gemma3(
        num_attention_heads=8, num_key_value_heads=1, num_hidden_layers=4,
        rope_scaling=dict(rope_type="linear", factor=8.0), rope_theta=1e5, rope_local_base_freq=1e3,
    ),
    "gemma3 scaled by type of layer": lambda: gemma3(
        num_hidden_layers=4, layer_types=["full_attention", "sliding_attention"] * 2,
        rope_parameters={
            "full_attention": YARN | dict(rope_theta=1e5),
            "sliding_attention": dict(rope_type="linear", factor=2.0, rope_theta=1e3),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_random_model_computes_the_same_and_goes_out_as_it_came(tmp_path, name):
    config = CONFIGS[name]()
    # Without a window, Mistral is Llama, which comes first.
    found = peers.check_family(tmp_path, peers.make(config), family_name=config.model_type)
    print(f"{name}: max |dlogit| {found.max_logit_difference:.2g}")
