"""DeepSeek-V3: latent attention, dense layers first, then mixtures with shared experts and a balanced router.

Source: transformers, `models/deepseek_v3/`; DeepSeek-V3 (arXiv:2412.19437), section 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from gptjax.interop.families import latent, llama
from gptjax.interop.families.qwen3_moe import EXPERT_ROWS
from gptjax.interop.layout import Linear
from gptjax.interop.reader import MAX_EXPERTS, MAX_LAYERS, ConfigReader
from gptjax.interop.table import Family, Row
from gptjax.nn.config import BlockConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig, NormConfig

_MOE_ROWS = (
    Row("model.layers.{layer}.mlp.gate.e_score_correction_bias", "moe/balance_bias"),
    Row("model.layers.{layer}.mlp.shared_experts.gate_proj.weight", "moe/shared/gate/kernel", Linear()),
    Row("model.layers.{layer}.mlp.shared_experts.up_proj.weight", "moe/shared/up/kernel", Linear()),
    Row("model.layers.{layer}.mlp.shared_experts.down_proj.weight", "moe/shared/down/kernel", Linear()),
)


def _read(reader: ConfigReader) -> ModelConfig:
    seq_len = reader.size("max_position_embeddings", 4096)
    norm = NormConfig(eps=reader.take("rms_norm_eps", float, 1e-6))
    reader.require("hidden_act", "silu", default="silu")
    attention, moe = latent.read(reader, seq_len=seq_len), _read_moe(reader)
    mlp = MLPConfig(d_ff=reader.size("intermediate_size"), activation="swiglu")
    num_dense = reader.take("first_k_dense_replace", int, 3)
    blocks = [
        BlockConfig(attention=attention, mlp=mlp if layer < num_dense else moe, norm=norm)
        for layer in range(reader.size("num_hidden_layers", most=MAX_LAYERS))
    ]
    # How many modules that predict further tokens come with the model; its own forward pass has none.
    reader.ignore(["num_nextn_predict_layers", "num_mtp_layers", "ep_size", "aux_loss_alpha", "seq_aux"])
    return llama.read_model(reader, blocks, seq_len=seq_len, tied=False)


def _read_moe(reader: ConfigReader) -> MoEConfig:
    reader.require("scoring_func", "sigmoid", default="sigmoid")
    reader.require("topk_method", "noaux_tc", default="noaux_tc")
    reader.require("moe_layer_freq", 1, default=1)
    d_ff, num_shared = reader.size("moe_intermediate_size", 2048), reader.size("n_shared_experts", 1)
    if num_shared < 1:
        raise ValueError(f"{reader.path}: n_shared_experts: got {num_shared}, expected at least 1 in this family")
    return MoEConfig(
        num_experts=reader.size(reader.known_as("n_routed_experts", "num_local_experts"), 256, most=MAX_EXPERTS),
        num_experts_per_token=reader.size("num_experts_per_tok", 8),
        d_ff=d_ff,
        activation="swiglu",
        shared_d_ff=num_shared * d_ff,
        router="sigmoid",
        normalize=reader.take("norm_topk_prob", bool, True),
        routed_scale=reader.take("routed_scaling_factor", float, 2.5),
        num_groups=reader.size("n_group", 8),
        groups_per_token=reader.size("topk_group", 4),
        balancing="bias",
        balance_rate=0.0,
    )


def _write(model: ModelConfig) -> dict[str, Any]:
    attention, mlps = model.blocks[0].attention, [block.mlp for block in model.blocks]
    mixtures = [(layer, mlp) for layer, mlp in enumerate(mlps) if isinstance(mlp, MoEConfig)]
    assert isinstance(attention, MLAConfig) and mixtures, "experts, with latent attention"
    num_dense, moe = mixtures[0]
    return {
        **llama.write_outer(model),
        "hidden_act": "silu",
        **latent.write(attention),
        "first_k_dense_replace": num_dense,
        # Required, and without meaning where no layer is dense.
        "intermediate_size": mlps[0].d_ff,
        "moe_intermediate_size": moe.d_ff,
        "n_shared_experts": moe.shared_d_ff // moe.d_ff,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_token,
        "n_group": moe.num_groups,
        "topk_group": moe.groups_per_token,
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.routed_scale,
        "num_nextn_predict_layers": 0,
        # transformers takes these for granted; others look for them.
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }


def _without_prediction(found: Mapping[str, Any], model: ModelConfig) -> Mapping[str, Any]:
    """Leaves out modules that predict tokens after the next (section 2.2): layers past the last, told by `eh_proj`."""
    modules = re.compile(r"(model\.layers\.(\d{1,6})\.)eh_proj\.weight")
    matches = [match for name in found if (match := modules.fullmatch(name))]
    prefixes = tuple(match[1] for match in matches if int(match[2]) >= model.num_layers)
    left_out = {name for name in found if name.startswith(prefixes)}
    if left_out:
        logging.info(
            "left out: %d tensors of %s, which predict tokens after the next", len(left_out), ", ".join(prefixes)
        )
    return {name: tensor for name, tensor in found.items() if name not in left_out}


_ROWS = (*llama.OUTER_ROWS, *llama.NORM_ROWS, *latent.ROWS, *llama.MLP_ROWS, *EXPERT_ROWS, *_MOE_ROWS)
DEEPSEEK_V3 = Family(
    "deepseek_v3", "DeepseekV3ForCausalLM", _ROWS, _read, _write, llama.IGNORED, adapt=_without_prediction
)
