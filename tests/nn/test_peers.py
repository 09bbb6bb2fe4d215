"""Whole models beside the transformers library's, with the same weights: its logits are in golden/transformers.json."""

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.nn import cache, transformer
from gptjax.nn.config import MoEConfig, RopeScaling
from gptjax.nn.spec import MLASpec
from tests.tiny import TINY

GOLDEN = Path(__file__).parents[1] / "golden"
LOGITS = json.loads((GOLDEN / "transformers.json").read_text())
peers = importlib.util.module_from_spec(
    spec := importlib.util.spec_from_file_location("make_transformers", GOLDEN / "make_transformers.py")
)
spec.loader.exec_module(peers)

LLAMA = dataclasses.replace(TINY, vocab_size=48, seq_len=64, d_model=32, d_ff=48, tie_embeddings=False)
YARN = RopeScaling(kind="yarn", factor=4.0, original_seq_len=16)


def gemma(spec):
    """Norms that are stored as offsets from 1, and scores scaled by another number than the head's size."""
    model = spec.build()
    norm = dataclasses.replace(model.final_norm, zero_centered=True)

    def block(old):
        return dataclasses.replace(old, norm=norm, attention=dataclasses.replace(old.attention, scale=24**-0.5))

    groups = (dataclasses.replace(g, pattern=tuple(map(block, g.pattern))) for g in model.groups)
    return dataclasses.replace(model, groups=tuple(groups), final_norm=norm)


MODELS = {
    "Llama": dataclasses.replace(
        LLAMA, rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_seq_len=32)
    ).build(),
    "Qwen3": dataclasses.replace(LLAMA, head_dim=16, qk_norm=True, rope_scaling=YARN).build(),
    "Gemma2": gemma(
        dataclasses.replace(
            LLAMA, head_dim=16, activation="geglu_tanh", rope_theta=10_000.0, tie_embeddings=True, window=4,
            global_every=2, norm_placement="sandwich", attn_softcap=5.0, logit_softcap=3.0, embed_scale=32**0.5,
        )
    ),
    "Mixtral": dataclasses.replace(
        LLAMA, rope_theta=10_000.0, norm_eps=1e-5,
        moe=MoEConfig(num_experts=4, num_experts_per_token=2, d_ff=48, activation="swiglu"),
    ).build(),
    "GptOss": dataclasses.replace(
        LLAMA, head_dim=16, bias=True, norm_eps=1e-5, window=4, global_every=2, attn_sinks=True,
        rope_scaling=dataclasses.replace(YARN, truncate=False),
        moe=MoEConfig(
            num_experts=4, num_experts_per_token=2, d_ff=48, activation="swiglu_clamped", router_bias=True, bias=True
        ),
    ).build(),
    "DeepseekV3": dataclasses.replace(
        LLAMA, first_k_dense=1, rope_scaling=dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=0.7),
        mla=MLASpec(kv_latent=16, q_latent=12, nope_head_dim=8, rope_head_dim=8, v_head_dim=12),
        moe=MoEConfig(
            num_experts=8, num_experts_per_token=3, d_ff=16, shared_d_ff=16, activation="swiglu", router="sigmoid",
            routed_scale=2.5, num_groups=4, groups_per_token=2, balancing="bias",
        ),
    ).build(),
    "DeepseekV2": dataclasses.replace(
        LLAMA, first_k_dense=1, rope_scaling=RopeScaling(kind="linear", factor=4.0),
        mla=MLASpec(kv_latent=16, nope_head_dim=8, rope_head_dim=8, v_head_dim=12),
        moe=MoEConfig(
            num_experts=8, num_experts_per_token=3, d_ff=16, shared_d_ff=16, activation="swiglu", normalize=False,
            routed_scale=2.0, num_groups=4, groups_per_token=2,
        ),
    ).build(),
    "GPT2": dataclasses.replace(
        LLAMA, num_kv_heads=4, d_ff=128, activation="gelu_tanh", position="learned", norm="layernorm", norm_eps=1e-5,
        bias=True, tie_embeddings=True,
    ).build(),
}  # fmt: skip


def drawn(name, *shape):
    return peers.weight(name, shape)


def linear(name, rows, columns, *, split=None, bias=False):
    """torch keeps `[out, in]`; `split` cuts the outputs into heads."""
    kernel = {"kernel": drawn(f"{name}.weight", rows, columns).T}
    if bias:
        kernel["bias"] = drawn(f"{name}.bias", rows)
    return {key: x.reshape(*x.shape[:-1], *split) if split else x for key, x in kernel.items()}


def output(name, rows, *, split, bias=False):
    kernel = {"kernel": drawn(f"{name}.weight", rows, split[0] * split[1]).T.reshape(*split, rows)}
    return kernel | ({"bias": drawn(f"{name}.bias", rows)} if bias else {})


def norm(name, size, *, bias=False):
    return {"scale": drawn(f"{name}.weight", size)} | ({"bias": drawn(f"{name}.bias", size)} if bias else {})


def attention(name, cfg):
    bias, heads = cfg.bias, {"q": cfg.num_heads, "k": cfg.num_kv_heads, "v": cfg.num_kv_heads}
    out = {
        long: linear(f"{name}.{s}_proj", heads[s] * cfg.head_dim, 32, split=(heads[s], cfg.head_dim), bias=bias)
        for s, long in (("q", "query"), ("k", "key"), ("v", "value"))
    }
    out["out"] = output(f"{name}.o_proj", 32, split=(cfg.num_heads, cfg.head_dim), bias=bias)
    if cfg.qk_norm:
        out |= {f"{long}_norm": norm(f"{name}.{s}_norm", cfg.head_dim) for s, long in (("q", "query"), ("k", "key"))}
    if cfg.sinks:
        out["sinks"] = drawn(f"{name}.sinks", cfg.num_heads)
    return out


def latent_attention(name, cfg):
    nope, rope, latent = cfg.nope_head_dim, cfg.rope_head_dim, cfg.kv_latent
    # DeepSeek rotates neighbours, this code the two halves: evens first, then odds.
    order = np.r_[np.arange(0, rope, 2), np.arange(1, rope, 2)]
    source, size = ("q_proj", 32) if cfg.q_latent is None else ("q_b_proj", cfg.q_latent)
    query = linear(f"{name}.{source}", 4 * (nope + rope), size, split=(4, nope + rope))["kernel"]
    query = {"kernel": np.concatenate([query[..., :nope], query[..., nope:][..., order]], -1)}
    down = linear(f"{name}.kv_a_proj_with_mqa", latent + rope, 32)["kernel"]
    up = linear(f"{name}.kv_b_proj", 4 * (nope + cfg.v_head_dim), latent, split=(4, nope + cfg.v_head_dim))["kernel"]
    queries = {"query": query}
    if cfg.q_latent is not None:
        queries = {
            "query_down": linear(f"{name}.q_a_proj", cfg.q_latent, 32),
            "query_norm": norm(f"{name}.q_a_layernorm", cfg.q_latent),
            "query_up": query,
        }
    return queries | {
        "kv_down": {"kernel": np.concatenate([down[:, :latent], down[:, latent:][:, order]], -1)},
        "kv_norm": norm(f"{name}.kv_a_layernorm", latent),
        "key_up": {"kernel": up[..., :nope]},
        "value_up": {"kernel": up[..., nope:]},
        "out": output(f"{name}.o_proj", 32, split=(4, cfg.v_head_dim)),
    }


def mlp(name, size):
    names = {"gate": (size, 32), "up": (size, 32), "down": (32, size)}
    return {key: linear(f"{name}.{key}_proj", *shape) for key, shape in names.items()}


def experts(name, cfg, *, interleaved):
    """`gate_up_proj` holds both projections, one behind the other or, in gpt-oss, in turns and untransposed."""
    num, size = cfg.num_experts, cfg.d_ff
    if not interleaved:
        both = drawn(f"{name}.gate_up_proj", num, 2 * size, 32).swapaxes(1, 2)
        down = drawn(f"{name}.down_proj", num, 32, size).swapaxes(1, 2)
        split = {"gate": both[..., :size], "up": both[..., size:], "down": down}
        return {f"experts_{key}": {"kernel": kernel} for key, kernel in split.items()}
    both, bias = drawn(f"{name}.gate_up_proj", num, 32, 2 * size), drawn(f"{name}.gate_up_proj_bias", num, 2 * size)
    down = {"kernel": drawn(f"{name}.down_proj", num, size, 32), "bias": drawn(f"{name}.down_proj_bias", num, 32)}
    halves = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}
    split = {key: {"kernel": both[..., half], "bias": bias[..., half]} for key, half in halves.items()}
    return {f"experts_{key}": value for key, value in (split | {"down": down}).items()}


def moe(name, cfg, model):
    router = "router" if model == "GptOss" else "gate"
    out = {"router": linear(f"{name}.{router}", cfg.num_experts, 32, bias=cfg.router_bias)}
    out |= experts(f"{name}.experts", cfg, interleaved=model == "GptOss")
    if cfg.balancing == "bias":
        out["balance_bias"] = drawn(f"{name}.gate.e_score_correction_bias", cfg.num_experts)
    if cfg.shared_d_ff:
        out["shared"] = mlp(f"{name}.shared_experts", cfg.shared_d_ff)
    return out


def layer(model, index, cfg):
    name = f"model.layers.{index}"
    if model == "GPT2":
        return gpt2_layer(f"transformer.h.{index}")
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if model == "Gemma2":
        norms = {"attention_norm": "input_layernorm", "attention_out_norm": "post_attention_layernorm",
                 "mlp_norm": "pre_feedforward_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}  # fmt: skip
    out = {ours: norm(f"{name}.{theirs}", 32) for ours, theirs in norms.items()}
    attend = latent_attention if cfg.attention.kind == "mla" else attention
    out["attention"] = attend(f"{name}.self_attn", cfg.attention)
    if isinstance(cfg.mlp, MoEConfig):
        return out | {"moe": moe(f"{name}.mlp", cfg.mlp, model)}
    return out | {"mlp": mlp(f"{name}.mlp", cfg.mlp.d_ff)}


def gpt2_layer(name):
    def conv(part, rows, columns):
        """GPT-2 keeps `[in, out]`."""
        return drawn(f"{name}.{part}.weight", rows, columns), drawn(f"{name}.{part}.bias", columns)

    (kernel, bias), (out, out_bias) = conv("attn.c_attn", 32, 96), conv("attn.c_proj", 32, 32)
    (up, up_bias), (down, down_bias) = conv("mlp.c_fc", 32, 128), conv("mlp.c_proj", 128, 32)
    heads = {
        long: {
            "kernel": kernel[:, 32 * i : 32 * (i + 1)].reshape(32, 4, 8),
            "bias": bias[32 * i : 32 * (i + 1)].reshape(4, 8),
        }
        for i, long in enumerate(("query", "key", "value"))
    }
    return {
        "attention": heads | {"out": {"kernel": out.reshape(4, 8, 32), "bias": out_bias}},
        "mlp": {"up": {"kernel": up, "bias": up_bias}, "down": {"kernel": down, "bias": down_bias}},
        "attention_norm": norm(f"{name}.ln_1", 32, bias=True),
        "mlp_norm": norm(f"{name}.ln_2", 32, bias=True),
    }


def params_of(model):
    cfg = MODELS[model]
    head = drawn("lm_head.weight", 48, 32)
    if model == "GPT2":
        params = {"embed": {"tokens": head, "positions": drawn("transformer.wpe.weight", 64, 32)}}
        params["final_norm"] = norm("transformer.ln_f", 32, bias=True)
    else:
        params = {"embed": {"tokens": head if cfg.tie_embeddings else drawn("model.embed_tokens.weight", 48, 32)}}
        params["final_norm"] = norm("model.norm", 32)
    if not cfg.tie_embeddings:
        params["head"] = {"kernel": head.T}
    first = 0
    for i, group in enumerate(cfg.groups):
        size = len(group.pattern)
        params[f"group_{i}"] = {
            f"block_{j}": jax.tree.map(
                lambda *layers: np.stack(layers),
                *[layer(model, first + r * size + j, block) for r in range(group.repeats)],
            )
            for j, block in enumerate(group.pattern)
        }
        first += group.num_layers
    shapes = jax.tree.map(np.shape, params, is_leaf=lambda x: isinstance(x, np.ndarray))
    assert shapes == jax.tree.map(lambda x: x.shape, transformer.abstract_params(cfg))
    return cfg, params


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, params, tokens_BT, positions_BT=None, kv=None):
    out = transformer.forward(cfg, params, tokens_BT, positions_BT=positions_BT, cache=kv)
    return transformer.logits(cfg, params, out.hidden_BTD), out.cache


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_the_transformers_library(model):
    cfg, params = params_of(model)
    tokens = np.array(peers.TOKENS, np.int32)
    # Logits are up to 5.5, and were rounded to 5 digits when they were written down.
    np.testing.assert_allclose(forward(cfg, params, tokens)[0][peers.KEPT], LOGITS[model], atol=3e-5)


@pytest.mark.parametrize("model", ["GptOss", "DeepseekV3"])
def test_so_are_those_of_decoding_with_a_cache(model):
    cfg, params = params_of(model)
    tokens = np.array(peers.TOKENS, np.int32)
    kv, parts = cache.init_cache(cfg, batch_size=2, max_len=16), []
    for first, last in ((0, 5), *((t, t + 1) for t in range(5, peers.LENGTH))):
        positions = jnp.broadcast_to(jnp.arange(first, last), (2, last - first))
        logits, kv = forward(cfg, params, tokens[:, first:last], positions, kv)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[peers.KEPT], LOGITS[model], atol=3e-5)
