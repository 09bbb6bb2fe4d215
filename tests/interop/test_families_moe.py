"""Families with mixtures of experts beside transformers' own implementation, in both directions.

A choice of experts is a step: where two scores are within float32's error of each other, either side may take the
other expert, and logits then differ by far more than rounding. The seeds are such that it does not happen.
"""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from gptjax.interop import checkpoint, hf
from gptjax.interop.families import FAMILIES
from gptjax.interop.safetensors import read_header
from gptjax.interop.table import family_of, read_config
from gptjax.nn.config import MoEConfig
from tests.interop import peers
from tests.tiny import TINY

convert_moe_packed_tensors = peers.transformers.integrations.mxfp4.convert_moe_packed_tensors
torch, transformers = peers.torch, peers.transformers
save_file = pytest.importorskip("safetensors.numpy").save_file

SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=112, tie_word_embeddings=False,
)  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 100.0}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 8.0,
    "beta_slow": 0.5,
}  # fmt: skip
MSCALE = YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}

MIXTRAL = SIZES | dict(
    num_local_experts=4, head_dim=8, num_experts_per_tok=2, rms_norm_eps=1e-5, rope_parameters=DEFAULT
)
QWEN3_MOE = SIZES | dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16, rope_parameters=DEFAULT,
    intermediate_size=24,
)  # fmt: skip
GPT_OSS = SIZES | dict(
    num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8, num_key_value_heads=2,
    rope_parameters=YARN | {"truncate": False},
)  # fmt: skip
DEEPSEEK_V3 = SIZES | dict(
    num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, n_group=4,
    topk_group=2, first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=12,
    v_head_dim=10, rope_parameters=MSCALE, num_hidden_layers=3,
)  # fmt: skip

CASES = {
    "mixtral": ("Mixtral", MIXTRAL | dict(num_key_value_heads=2)),
    "mixtral, window, tied, one kv head a head": (
        "Mixtral", MIXTRAL | dict(num_key_value_heads=4, sliding_window=9, tie_word_embeddings=True),
    ),
    "mixtral, top-1 of 3, linear": (
        "Mixtral",
        MIXTRAL | dict(num_attention_heads=8, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1,
                       rope_parameters=LINEAR),
    ),
    "mixtral, top-4 of 6, llama3": (
        "Mixtral",
        MIXTRAL | dict(num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=4, head_dim=12,
                       rope_parameters=LLAMA3),
    ),
    "qwen3_moe, weights as they are": ("Qwen3Moe", QWEN3_MOE | dict(num_key_value_heads=2, norm_topk_prob=False)),
    "qwen3_moe, weights that sum to one, biases, yarn": (
        "Qwen3Moe",
        QWEN3_MOE | dict(num_key_value_heads=4, norm_topk_prob=True, attention_bias=True, rope_parameters=YARN),
    ),
    "qwen3_moe, dense layers, window, tied": (
        "Qwen3Moe",
        QWEN3_MOE | dict(num_attention_heads=8, num_key_value_heads=1, num_hidden_layers=5, mlp_only_layers=[1],
                         intermediate_size=40, norm_topk_prob=True, use_sliding_window=True, sliding_window=7,
                         tie_word_embeddings=True),
    ),
    "qwen3_moe, top-1": ("Qwen3Moe", QWEN3_MOE | dict(num_key_value_heads=2, num_experts_per_tok=1)),
    "qwen3_moe, top-4": (
        "Qwen3Moe",
        QWEN3_MOE | dict(num_key_value_heads=2, num_experts=8, num_experts_per_tok=4, norm_topk_prob=True),
    ),
    "gpt_oss": ("GptOss", GPT_OSS),
    "gpt_oss, no attention biases, tied, top-1": (
        "GptOss", GPT_OSS | dict(attention_bias=False, tie_word_embeddings=True, num_experts_per_tok=1),
    ),
    "gpt_oss, own layer types, top-4 of 5, rotation as trained": (
        "GptOss",
        GPT_OSS | dict(num_attention_heads=8, num_key_value_heads=1, num_local_experts=5, num_experts_per_tok=4,
                       num_hidden_layers=3, rope_parameters=DEFAULT,
                       layer_types=["full_attention", "full_attention", "sliding_attention"]),
    ),
    "gpt_oss, no windows": (
        "GptOss",
        GPT_OSS | dict(num_attention_heads=4, num_key_value_heads=4, sliding_window=128,
                       layer_types=["full_attention", "full_attention"]),
    ),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK_V3),
    "deepseek_v3, biases, weights as they are, tied": (
        "DeepseekV3",
        DEEPSEEK_V3 | dict(attention_bias=True, norm_topk_prob=False, routed_scaling_factor=1.5, n_shared_experts=2,
                           tie_word_embeddings=True, rms_norm_eps=1e-4),
    ),
    "deepseek_v3, queries without a latent, one group, top-4": (
        "DeepseekV3",
        DEEPSEEK_V3 | dict(q_lora_rank=None, n_group=1, topk_group=1, num_experts_per_tok=4, rope_parameters=DEFAULT),
    ),
    "deepseek_v3, top-1 of one group in two, yarn without mscale": (
        "DeepseekV3",
        DEEPSEEK_V3 | dict(num_experts_per_tok=1, n_group=2, topk_group=1, first_k_dense_replace=2,
                           rope_parameters=YARN),
    ),
    "deepseek_v3, no dense layers, linear": (
        "DeepseekV3",
        DEEPSEEK_V3 | dict(first_k_dense_replace=0, num_hidden_layers=2, intermediate_size=24,
                           rope_parameters=LINEAR),
    ),
}  # fmt: skip
# What an export adds for other readers than transformers, and modules that it does not have any more.
ADDED = {"scoring_func", "topk_method", "moe_layer_freq", "num_nextn_predict_layers", "num_mtp_layers"}


def make(name, **changes):
    class_name, values = CASES[name]
    return peers.make(getattr(transformers, f"{class_name}Config")(**values | changes))


@pytest.mark.parametrize("name", CASES)
def test_same_in_both_directions(tmp_path, name):
    # 48 tokens are past the windows and the original context, and 64 more fill the context.
    result = peers.check_family(tmp_path, make(name), prompt_tokens=48, exact_config=False)
    print(f"{name}: max |dlogit| {result.max_logit_difference:.2e}")
    wanted, got = (
        transformers.AutoConfig.from_pretrained(str(folder)).to_dict() for folder in (result.source, result.exported)
    )
    differing = {key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)}
    assert differing <= peers._FREE_KEYS | ADDED


@pytest.mark.parametrize(
    ("name", "dtype"), [("mixtral", "bfloat16"), ("gpt_oss", "bfloat16"), ("deepseek_v3", "bfloat16")]
)
def test_other_dtypes_and_several_files(tmp_path, name, dtype):
    result = peers.check_family(tmp_path, make(name), dtype=dtype, max_shard_bytes=30_000, exact_config=False)
    assert len(list(result.exported.glob("*.safetensors"))) > 2


def saved(tmp_path, name, **changes):
    make(name, **changes).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def add_tensors(folder, tensors, *, without=()):
    file = folder / "model.safetensors"
    found = {name: stored.read() for name, stored in read_header(file).items() if name not in without}
    save_file(found | tensors, file)


def test_a_router_may_be_wider_than_the_rest(tmp_path):
    """DeepSeek keeps the balancing bias in float32 where the model is in bfloat16."""
    model = make("deepseek_v3").to(torch.bfloat16)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.float() + 1e-4
    result = peers.check_family(tmp_path, model, exact_config=False)
    dtypes = {stored.dtype.name for stored in read_header(result.exported / "model.safetensors").values()}
    assert dtypes == {"bfloat16", "float32"}


def test_modules_that_predict_further_tokens_are_left_out(tmp_path):
    folder = saved(tmp_path, "deepseek_v3")
    before = set(hf.open_source(folder).tensors)
    extra = {"eh_proj.weight": (32, 64), "enorm.weight": (32,), "self_attn.o_proj.weight": (32, 40)}
    add_tensors(folder, {f"model.layers.3.{name}": np.zeros(shape, np.float32) for name, shape in extra.items()})
    assert set(hf.open_source(folder).tensors) == before


def test_a_layer_more_than_the_config_has_is_refused(tmp_path):
    folder = saved(tmp_path, "deepseek_v3")
    add_tensors(folder, {"model.layers.3.self_attn.o_proj.weight": np.zeros((32, 40), np.float32)})
    with pytest.raises(ValueError, match=r"model\.layers\.3\.self_attn\.o_proj\.weight.*no tensor of a deepseek_v3"):
        checkpoint.write(hf.open_source(folder), tmp_path / "checkpoint")


PACKED = {"hidden_size": 64, "intermediate_size": 32, "tie_word_embeddings": True}


def packed(tmp_path, *, scales=(110, 130)):
    """A gpt-oss folder as it is published: experts in MXFP4."""
    folder = saved(tmp_path, "gpt_oss", **PACKED)
    rng = np.random.default_rng(0)
    tensors, plain = {}, []
    for layer in range(2):
        for name, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
            base = f"model.layers.{layer}.mlp.experts.{name}"
            plain.append(base)
            tensors[f"{base}_blocks"] = rng.integers(0, 256, (4, rows, columns // 32, 16), np.uint8)
            tensors[f"{base}_scales"] = rng.integers(*scales, (4, rows, columns // 32), np.uint8)
    add_tensors(folder, tensors, without=plain)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tensors


def unpacked_by_transformers(tensors):
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        pair = (torch.from_numpy(tensors[f"{name}_{part}"]) for part in ("blocks", "scales"))
        yield name, convert_moe_packed_tensors(*pair).float().numpy()


def test_mxfp4_is_unpacked_as_transformers_does(tmp_path):
    folder, tensors = packed(tmp_path)
    found = hf.open_source(folder).tensors
    for name, expected in unpacked_by_transformers(tensors):
        assert found[name].shape == expected.shape and found[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[name].read().astype(np.float32), expected)


def test_a_model_in_mxfp4_computes_the_same_and_goes_out_unpacked(tmp_path):
    folder, tensors = packed(tmp_path, scales=(118, 126))
    plain = saved(tmp_path / "plain", "gpt_oss", **PACKED)  # transformers reads the other form only with accelerate
    add_tensors(plain, dict(unpacked_by_transformers(tensors)))
    source = hf.open_source(folder)
    checkpoint.write(source, tmp_path / "checkpoint", dtype=np.dtype(np.float32))
    tokens = np.random.default_rng(1).integers(0, 61, 48).tolist()
    theirs, ours = peers.TransformersRunner(plain), peers.GptjaxRunner.load(tmp_path / "checkpoint")
    peers.check_same(theirs, ours, tokens, source.model)
    hf.write(tmp_path / "checkpoint", tmp_path / "exported")
    np.testing.assert_array_equal(peers.TransformersRunner(tmp_path / "exported").logits(tokens), theirs.logits(tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, "gate_up_proj_scales: missing"),
        ({"scales": (4, 64, 3)}, "gate_up_proj_scales: got .* expected"),
        ({"blocks": (4, 64, 2, 8)}, "gate_up_proj_blocks: got .* expected"),
        ({"blocks": (4, 64, 1, 16), "scales": (4, 64, 1)}, "gate_up_proj: got .* expected"),
    ],
)
def test_blocks_that_are_none_are_refused(tmp_path, changes, message):
    folder, _ = packed(tmp_path)
    base = "model.layers.0.mlp.experts.gate_up_proj"
    arrays = {f"{base}_{part}": np.zeros(shape, np.uint8) for part, shape in changes.items() if shape}
    add_tensors(folder, arrays, without=[f"{base}_{part}" for part in changes])
    with pytest.raises(ValueError, match=message):
        checkpoint.write(hf.open_source(folder), tmp_path / "checkpoint", dtype=np.dtype(np.float32))


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    folder, _ = packed(tmp_path, scales=(255, 256))
    with pytest.raises(ValueError, match="down_proj_scales: .* not a number"):
        hf.open_source(folder).tensors["model.layers.0.mlp.experts.down_proj"].read()


REFUSED = {
    "hidden_act": ("mixtral", {"hidden_act": "gelu"}),
    "router_bias": ("mixtral", {"router_bias": True}),
    "attention_bias": ("mixtral", {"attention_bias": True}),
    "partial_rotary_factor": ("mixtral", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}),
    "mlp_only_layers": ("qwen3_moe, top-1", {"mlp_only_layers": [2]}),
    "decoder_sparse_step": ("qwen3_moe, top-1", {"decoder_sparse_step": 0}),
    "max_window_layers": (
        "qwen3_moe, top-1", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "num_local_experts": ("qwen3_moe, top-1", {"num_experts": 4, "num_local_experts": 8}),
    "swiglu_limit": ("gpt_oss", {"swiglu_limit": 6.0}),
    "layer_types": ("gpt_oss", {"layer_types": ["full_attention"]}),
    "rope_scaling": ("gpt_oss", {"rope_parameters": None}),
    "experts in all": ("deepseek_v3", {"num_hidden_layers": 1000, "n_routed_experts": 1024}),
    "rope_interleave": ("deepseek_v3", {"rope_interleave": False}),
    "num_key_value_heads": ("deepseek_v3", {"num_key_value_heads": 2}),
    "scoring_func": ("deepseek_v3", {"scoring_func": "softmax"}),
    "n_shared_experts": ("deepseek_v3", {"n_shared_experts": 0}),
    "num_hidden_layers": ("deepseek_v3", {"num_hidden_layers": 0}),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_a_config_cannot_say_is_refused(key):
    name, changes = REFUSED[key]
    class_name, values = CASES[name]
    config = getattr(transformers, f"{class_name}Config")(**values).to_dict()
    family = FAMILIES[config["model_type"]]
    read_config(family, config, path="config.json")
    with pytest.raises(ValueError, match=f"config.json: .*{key}"):
        read_config(family, config | changes, path="config.json")


def test_every_sparse_step_th_layer_is_a_mixture():
    _, values = CASES["qwen3_moe, top-1"]
    values = values | dict(num_hidden_layers=7, decoder_sparse_step=3, mlp_only_layers=[5])
    config = transformers.Qwen3MoeConfig(**values)
    model = read_config(FAMILIES["qwen3_moe"], config.to_dict(), path="config.json")
    layers = transformers.AutoModelForCausalLM.from_config(config).model.layers
    theirs = ["moe" if hasattr(layer.mlp, "experts") else "mlp" for layer in layers]
    assert [block.mlp.kind for block in model.blocks] == theirs
    assert theirs.count("moe") == 1


TRAINED = {
    "mixtral": MoEConfig(num_experts=4, num_experts_per_token=2, d_ff=48, activation="swiglu", z_loss=0.1),
    "qwen3_moe": MoEConfig(num_experts=4, num_experts_per_token=2, d_ff=48, activation="swiglu", normalize=False),
    None: MoEConfig(num_experts=4, num_experts_per_token=2, d_ff=48, activation="swiglu", routed_scale=1.5),
}


@pytest.mark.parametrize("family", TRAINED)
def test_models_trained_here_go_out_if_a_family_says_the_same(family):
    model = dataclasses.replace(TINY, moe=TRAINED[family], qk_norm=family == "qwen3_moe").build()
    if family is None:
        with pytest.raises(ValueError, match="routed_scale"):
            family_of(model, FAMILIES)
    else:
        assert family_of(model, FAMILIES).name == family
