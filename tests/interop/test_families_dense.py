"""Dense families beside transformers: what comes in computes the same, and what goes out is what came in."""

import json

import ml_dtypes
import numpy as np
import pytest

from gptjax.checkpoint import arrays
from gptjax.interop import checkpoint, hf
from gptjax.interop.families import FAMILIES
from gptjax.interop.table import read_config
from gptjax.nn import transformer
from tests.interop import peers
from tests.interop.peers import transformers

safetensors = pytest.importorskip("safetensors.numpy")

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
    "llama, linear scaling": lambda: llama(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=100.0)),
    "llama, yarn": lambda: llama(rope_parameters=YARN | dict(rope_theta=10_000.0, attention_factor=1.3)),
    "mistral": lambda: mistral(sliding_window=7),
    "mistral multi-head, without a window, tied": lambda: mistral(
        num_key_value_heads=4, sliding_window=None, tie_word_embeddings=True, head_dim=6
    ),
    "mistral ratio 8, yarn": lambda: mistral(
        num_attention_heads=8, num_key_value_heads=1, sliding_window=30,
        rope_parameters=YARN | dict(rope_theta=1000.0, beta_fast=16.0),
    ),
    "qwen3": qwen3,
    "qwen3 multi-head, tied, biases": lambda: qwen3(
        num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, rms_norm_eps=1e-5
    ),
    "qwen3 ratio 8, last layers local": lambda: qwen3(
        num_attention_heads=8, num_key_value_heads=1, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3 layer types, yarn": lambda: qwen3(
        num_hidden_layers=4, use_sliding_window=True, sliding_window=9, max_window_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters=YARN | dict(rope_theta=100.0, beta_fast=2.0, beta_slow=0.25, truncate=False),
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


PLAIN = {"gpt2": gpt2, "llama": llama, "mistral": mistral, "qwen3": qwen3, "gemma3_text": gemma3}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_random_model_computes_the_same_and_goes_out_as_it_came(tmp_path, name):
    config = CONFIGS[name]()
    # Without a window, Mistral is Llama, which comes first.
    peers.check_family(tmp_path, peers.make(config), family_name=config.model_type)


@pytest.mark.parametrize("name", PLAIN)
def test_bfloat16_in_many_files(tmp_path, name):
    model = peers.make(PLAIN[name](num_hidden_layers=2))
    found = peers.check_family(tmp_path, model, dtype="bfloat16", max_shard_bytes=10_000)
    assert len(list(found.exported.glob("model-*-of-*.safetensors"))) > 2
    assert found.config["torch_dtype"] == "bfloat16"
    stored = hf.open_source(found.exported).tensors.values()
    assert {tensor.dtype for tensor in stored} == {np.dtype(ml_dtypes.bfloat16)}


def minimal(name):
    """The keys that have no default here."""
    if name == "gpt2":
        return dict(n_embd=32, n_layer=12, n_head=4, vocab_size=61)
    if name == "gemma3_text":
        return {}
    return dict(
        hidden_size=32, intermediate_size=40, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61,
    )  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_an_absent_key_means_what_transformers_takes_it_for(name):
    complete = transformers.AutoConfig.for_model(name, **minimal(name)).to_dict()
    assert read(name, minimal(name)) == read(name, complete)


def read(name, values):
    return read_config(FAMILIES[name], values, path="config.json")


@pytest.mark.parametrize(
    "scaling", [None, dict(rope_type="linear", factor=4.0), LLAMA3, YARN], ids=["none", "linear", "llama3", "yarn"]
)
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rotation_in_the_forms_of_before_and_since_transformers_5(scaling, key):
    base = minimal("llama") | dict(max_position_embeddings=96)
    before = base | dict(rope_theta=7e5)
    if scaling is not None:
        kind = {key: scaling["rope_type"]}
        before["rope_scaling"] = kind | {name: value for name, value in scaling.items() if name != "rope_type"}
    since = base | dict(rope_parameters=dict(rope_theta=7e5) | (scaling or dict(rope_type="default")))
    mixed = base | dict(rope_theta=7e5, rope_parameters=scaling)
    model = read("llama", before)
    assert model == read("llama", since) == read("llama", mixed)
    assert model == read("llama", transformers.LlamaConfig(**before).to_dict())
    assert model.blocks[0].attention.rope.theta == 7e5
    assert (model.blocks[0].attention.rope.scaling is None) == (scaling is None)


def test_a_config_of_gemma_from_before_layer_types_says_every_which_layer_is_global():
    model = read("gemma3_text", dict(num_hidden_layers=12, sliding_window_pattern=4, sliding_window=8))
    windows = [block.attention.window for block in model.blocks]
    assert windows == [8, 8, 8, None] * 3
    thetas = {block.attention.window: block.attention.rope.theta for block in model.blocks}
    assert thetas == {8: 1e4, None: 1e6}


# As published, with the number of parameters.
PUBLISHED = {
    "gpt2": (
        """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}""",
        124_439_808,
    ),
    "llama 3.2 1B": (
        """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
        "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": true, "vocab_size": 128256}""",
        1_235_814_400,
    ),
    "mistral 7B": (
        """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}""",
        7_241_732_096,
    ),
    "qwen3 0.6B": (
        """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}""",
        596_049_920,
    ),
    "gemma 3 1B": (
        """{"architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 106], "final_logit_softcapping": null, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": null,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 262144}""",
        999_885_952,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_have_the_parameters_that_they_are_known_for(name):
    text, num_params = PUBLISHED[name]
    values = json.loads(text)
    model = read(values["model_type"], values)
    assert sum(leaf.size for leaf in arrays.flatten(transformer.abstract_params(model)).values()) == num_params
    again = FAMILIES[values["model_type"]].write_config(model)
    assert read(values["model_type"], again) == model


REFUSED_KEYS = {
    "unknown": ("llama", dict(residual_multiplier=0.2), "residual_multiplier: 0.2 is not known"),
    "of another type": ("llama", dict(hidden_size="32"), "hidden_size: got '32', expected int"),
    "missing": ("llama", dict(vocab_size=None), "vocab_size: missing; expected int"),
    "not a size": ("llama", dict(num_attention_heads=0), "num_attention_heads: got 0, expected 1 to"),
    "too many layers": ("qwen3", dict(num_hidden_layers=10**12), "num_hidden_layers: got 1000000000000, expected 1 to"),
    "not a number": ("llama", dict(rms_norm_eps=float("nan")), "rms_norm_eps: got nan, expected a finite number"),
    "endless": ("llama", dict(rope_theta=10**400), "rope_theta: got 1000.*, expected a finite number"),
    "heads that do not divide": ("llama", dict(num_key_value_heads=3), "num_heads=4 is not a multiple of"),
    "activation": ("llama", dict(hidden_act="gelu"), "hidden_act: got 'gelu', expected 'silu'"),
    "window that is not applied": ("llama", dict(sliding_window=5), "sliding_window: got 5, expected None"),
    "part of a head": ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor: got 0.5, expected 1.0"),
    "rope kind": ("llama", dict(rope_scaling=dict(type="dynamic", factor=2.0)), "type: got 'dynamic', expected"),
    "rope factor": ("llama", dict(rope_scaling=dict(type="linear", factor=0)), "factor: got 0.0, expected above 0"),
    "rope key": ("llama", dict(rope_parameters=YARN | dict(mrope_section=[1])), "mrope_section: .* is not known"),
    "mistral bias": ("mistral", dict(attention_bias=True), "attention_bias: got True, expected False"),
    "mistral window": ("mistral", dict(sliding_window=-1), "window=-1: expected None"),
    "layer type": ("qwen3", dict(layer_types=["chunked_attention"] * 12), "layer_types: got 'chunked_attention'"),
    "layer types": ("gemma3_text", dict(layer_types=["full_attention"]), "layer_types: got 1, expected 26 of"),
    "unasked window": ("qwen3", dict(layer_types=["sliding_attention"] * 12), "without use_sliding_window"),
    "gemma both ways": ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention: got True"),
    "gemma activation": ("gemma3_text", dict(hidden_activation="gelu"), "hidden_activation: got 'gelu', expected"),
    "gemma scores": ("gemma3_text", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping: got 50.0"),
    "gemma ropes": ("gemma3_text", dict(rope_parameters=dict(rope_theta=1e4)), "rope_theta: 10000.0 is not known"),
    "gpt2 scale": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx: got True"),
    "gpt2 heads": ("gpt2", dict(n_head=5), "n_embd: got 32, expected a multiple of n_head=5"),
}


@pytest.mark.parametrize("case", REFUSED_KEYS)
def test_a_config_that_would_not_compute_the_same_is_refused(case):
    name, keys, message = REFUSED_KEYS[case]
    with pytest.raises(ValueError, match=rf"^config\.json: .*{message}"):
        read(name, minimal(name) | keys)


@pytest.fixture(scope="module", params=PLAIN)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    peers.make(PLAIN[request.param](num_hidden_layers=1)).save_pretrained(path)
    return path


def test_a_config_nested_without_end_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match="config.json: is (nested too deeply|not JSON)"):
        hf.open_source(tmp_path)


def changed(folder, tmp_path, change):
    """The folder with its tensors, by name, changed."""
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    return hf.open_source(tmp_path)


@pytest.mark.parametrize("which", ["missing", "extra", "transposed", "cut"])
def test_tensors_that_are_not_those_of_the_config_are_refused(folder, tmp_path, which):
    name = next(n for n in sorted(safetensors.load_file(folder / "model.safetensors")) if n.endswith("c_fc.weight")
                or n.endswith("gate_proj.weight"))  # fmt: skip

    def change(tensors):
        if which == "missing":
            del tensors[name]
        elif which == "extra":
            tensors[name + "_scale"] = np.ones(3, np.float32)
        else:
            tensors[name] = np.ascontiguousarray(tensors[name].T if which == "transposed" else tensors[name][:-1])

    shape = safetensors.load_file(folder / "model.safetensors")[name].shape
    message = {
        "missing": rf"{name}: missing; expected \[{shape[0]}, {shape[1]}\]",
        "extra": rf"{name}_scale: \[3\] is no tensor of a",
        "transposed": rf"{name}: got \[{shape[1]}, {shape[0]}\], expected \[{shape[0]}, {shape[1]}\]",
        "cut": rf"{name}: got \[{shape[0] - 1}, {shape[1]}\], expected",
    }[which]
    with pytest.raises(ValueError, match=rf"^{tmp_path}: {message}"):
        checkpoint.write(changed(folder, tmp_path, change), tmp_path / "checkpoint")


def test_a_model_without_its_head_has_no_prefix(folder, tmp_path):
    (tmp_path / "bare").mkdir()
    with_prefix = hf.open_source(folder)
    prefix = with_prefix.family.prefix

    def strip(tensors):
        for name in [n for n in tensors if n.startswith(prefix)]:
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    checkpoint.write(changed(folder, tmp_path / "bare", strip), tmp_path / "a")
    checkpoint.write(with_prefix, tmp_path / "b")
    peers.check_bits(tmp_path / "a", tmp_path / "b")


def test_a_tied_head_that_is_there_must_be_the_embedding(tmp_path):
    peers.make(gpt2(n_layer=1)).save_pretrained(tmp_path / "tied")
    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()

    def copy(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()

    def move(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    checkpoint.write(changed(tmp_path / "tied", tmp_path / "same", copy), tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        changed(tmp_path / "tied", tmp_path / "other", move)


def test_the_masks_that_gpt2_kept_with_its_weights_are_passed_over(tmp_path):
    peers.make(gpt2(n_layer=1)).save_pretrained(tmp_path / "new")
    (tmp_path / "old").mkdir()

    def add(tensors):
        tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 96, 96), np.uint8)
        tensors["transformer.h.0.attn.masked_bias"] = np.array(-1e4, np.float32)

    checkpoint.write(changed(tmp_path / "new", tmp_path / "old", add), tmp_path / "a")
    checkpoint.write(hf.open_source(tmp_path / "new"), tmp_path / "b")
    peers.check_bits(tmp_path / "a", tmp_path / "b")
