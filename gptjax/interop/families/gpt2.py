"""GPT-2: learned positions, norms and projections with biases, kernels as they are multiplied (`[in, out]`).

Source: transformers, `models/gpt2/configuration_gpt2.py` and `modeling_gpt2.py`.
"""

from __future__ import annotations

from typing import Any

from gptjax.interop.layout import Flat, Joined, Linear
from gptjax.interop.reader import MAX_LAYERS, ConfigReader
from gptjax.interop.table import Family, Row, group_layers
from gptjax.nn.config import Activation, AttentionConfig, BlockConfig, MLPConfig, ModelConfig, NormConfig

_QKV_KERNELS = ("attention/query/kernel", "attention/key/kernel", "attention/value/kernel")
_QKV_BIASES = ("attention/query/bias", "attention/key/bias", "attention/value/bias")
_ROWS = (
    Row("transformer.wte.weight", "embed/tokens"),
    Row("transformer.wpe.weight", "embed/positions"),
    Row("transformer.h.{layer}.ln_1.weight", "attention_norm/scale"),
    Row("transformer.h.{layer}.ln_1.bias", "attention_norm/bias"),
    Row("transformer.h.{layer}.attn.c_attn.weight", _QKV_KERNELS, Joined((Flat(1),) * 3, axis=1)),
    Row("transformer.h.{layer}.attn.c_attn.bias", _QKV_BIASES, Joined((Flat(),) * 3, axis=0)),
    Row("transformer.h.{layer}.attn.c_proj.weight", "attention/out/kernel", Flat(2)),
    Row("transformer.h.{layer}.attn.c_proj.bias", "attention/out/bias"),
    Row("transformer.h.{layer}.ln_2.weight", "mlp_norm/scale"),
    Row("transformer.h.{layer}.ln_2.bias", "mlp_norm/bias"),
    Row("transformer.h.{layer}.mlp.c_fc.weight", "mlp/up/kernel"),
    Row("transformer.h.{layer}.mlp.c_fc.bias", "mlp/up/bias"),
    Row("transformer.h.{layer}.mlp.c_proj.weight", "mlp/down/kernel"),
    Row("transformer.h.{layer}.mlp.c_proj.bias", "mlp/down/bias"),
    Row("transformer.ln_f.weight", "final_norm/scale"),
    Row("transformer.ln_f.bias", "final_norm/bias"),
    Row("lm_head.weight", "head/kernel", Linear()),
)
# The causal mask, which early versions kept with the weights.
_IGNORED = (r"transformer\.h\.\d+\.attn\.(masked_)?bias",)
# The first name of a function is the one that is written.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}


def _read(reader: ConfigReader) -> ModelConfig:
    d_model, num_heads = reader.size("n_embd"), reader.size("n_head")
    if d_model % num_heads:
        raise ValueError(f"{reader.path}: n_embd: got {d_model}, expected a multiple of n_head={num_heads}")
    reader.require("scale_attn_weights", True, default=True)
    reader.require("scale_attn_by_inverse_layer_idx", False, default=False)
    reader.require("add_cross_attention", False, default=False)
    reader.ignore(["reorder_and_upcast_attn"])  # a matter of precision, of training in half of it
    norm = NormConfig(kind="layernorm", eps=reader.take("layer_norm_epsilon", float, 1e-5), bias=True)
    activation = reader.require("activation_function", *_ACTIVATIONS, default="gelu_new")
    block = BlockConfig(
        attention=AttentionConfig(
            num_heads=num_heads, num_kv_heads=num_heads, head_dim=d_model // num_heads, bias=True, out_bias=True
        ),
        mlp=MLPConfig(d_ff=reader.size("n_inner", 4 * d_model), activation=_ACTIVATIONS[activation], bias=True),
        norm=norm,
    )
    return ModelConfig(
        vocab_size=reader.size("vocab_size"),
        d_model=d_model,
        seq_len=reader.size("n_positions", 1024),
        groups=group_layers([block] * reader.size("n_layer", most=MAX_LAYERS)),
        final_norm=norm,
        learned_positions=True,
        tie_embeddings=reader.take("tie_word_embeddings", bool, True),
    )


def _write(model: ModelConfig) -> dict[str, Any]:
    block = model.blocks[0]
    assert isinstance(block.attention, AttentionConfig) and isinstance(block.mlp, MLPConfig), "dense, with heads"
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    assert block.mlp.activation in names, f"mlp.activation: {block.mlp.activation!r} is none of GPT-2's"
    return {
        "vocab_size": model.vocab_size,
        "n_embd": model.d_model,
        "n_layer": model.num_layers,
        "n_head": block.attention.num_heads,
        "n_inner": None if block.mlp.d_ff == 4 * model.d_model else block.mlp.d_ff,
        "n_positions": model.seq_len,
        "activation_function": names[block.mlp.activation],
        "layer_norm_epsilon": block.norm.eps,
        "tie_word_embeddings": model.tie_embeddings,
    }


GPT2 = Family("gpt2", "GPT2LMHeadModel", _ROWS, _read, _write, _IGNORED, prefix="transformer.")
