"""GGUF files: written, read back to the bit, and run by llama.cpp."""

import json
import pathlib

import numpy as np
import pytest

from gptjax.interop import checkpoint, gguf, hf, llama2c
from gptjax.interop.gguf import file as gguf_file
from gptjax.interop.gguf import rope as gguf_rope
from gptjax.interop.gguf import write as gguf_write
from gptjax.interop.runner import GptjaxRunner
from tests.interop.gguf import models as gguf_models

package = pytest.importorskip("gguf")
KINDS = package.GGMLQuantizationType
READABLE = [kind for kind in KINDS if gguf_file._is_readable(kind)]
# llama.cpp looks GELU up in a table of float16.
TOLERANCE = {"gpt2": 1e-2, "gemma3_text": 1e-2}
DEEP = 2e-3  # of the logits after 26 layers of random values, to which each layer's rounding adds
NUM_TOKENS = 120


@pytest.fixture(scope="module")
def stories(shared_data, tmp_path_factory):
    source = llama2c.open_source(shared_data / "models" / "stories260K" / "stories260K.bin")
    directory = tmp_path_factory.mktemp("stories") / "ckpt"
    checkpoint.write(source, directory)
    return source, directory


def llama_cpp(file: pathlib.Path, **options):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    from gptjax.interop.referees.llama_cpp import LlamaCppRunner

    return LlamaCppRunner(file, **options)


def values(source):
    return {name: np.asarray(tensor.read()) for name, tensor in source.tensors.items()}


@pytest.mark.parametrize("name", gguf_models.CONFIGS)
def test_every_architecture_comes_back_and_runs_in_llama_cpp(tmp_path, name):
    source = gguf_models.saved(gguf_models.CONFIGS[name], tmp_path / "ckpt")
    gguf_write.write(tmp_path / "ckpt", tmp_path / "model.gguf", quantization="f32")
    again = gguf.open_source(tmp_path / "model.gguf")
    assert again.model == source.model and again.family is source.family
    wanted, got = values(source), values(again)
    assert wanted.keys() == got.keys()
    for key, value in wanted.items():
        if source.family.name == "gemma3_text" and key.endswith("norm.weight"):
            assert np.abs(value - got[key]).max() <= 2**-24  # they are stored from one
        else:
            assert np.array_equal(value, got[key]), key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "model.gguf"]
    ours, theirs = GptjaxRunner.load(tmp_path / "ckpt"), llama_cpp(tmp_path / "model.gguf")
    tokens = np.random.default_rng(0).integers(0, source.model.vocab_size, NUM_TOKENS).tolist()
    difference = np.abs(ours.logits(tokens) - theirs.logits(tokens)).max()
    tolerance = DEEP if source.model.num_layers > 20 else TOLERANCE.get(source.family.name, 3e-4)
    assert difference <= tolerance
    assert ours.greedy(tokens[:16], 24) == theirs.greedy(tokens[:16], 24)


def test_a_second_trip_changes_nothing(tmp_path):
    gguf_models.saved(gguf_models.CONFIGS["gemma3"], tmp_path / "one")
    gguf_write.write(tmp_path / "one", tmp_path / "one.gguf", quantization="f32")
    checkpoint.write(gguf.open_source(tmp_path / "one.gguf"), tmp_path / "two")
    gguf_write.write(tmp_path / "two", tmp_path / "two.gguf", quantization="f32")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


@pytest.mark.parametrize("quantization", gguf_write.QUANTIZATIONS)
def test_values_are_those_of_the_package_s_quantiser(tmp_path, quantization, monkeypatch):
    monkeypatch.setattr(gguf_write, "_WRITE_VALUES", 640)  # some rows at a time
    source = gguf_models.saved(gguf_models.CONFIGS["mixtral"], tmp_path / "ckpt")
    gguf_write.write(tmp_path / "ckpt", tmp_path / "model.gguf", quantization=quantization)
    again = gguf.open_source(tmp_path / "model.gguf")
    for name, value in values(source).items():
        kind = KINDS[quantization.upper()]
        if value.ndim == 1 or "gate.weight" in name:
            kind = KINDS.F32
        elif kind == KINDS.Q4_0 and ("embed_tokens" in name or "lm_head" in name):
            kind = KINDS.Q8_0
        rounded = package.dequantize(package.quantize(value, kind), kind)
        got = again.tensors[name].read()
        assert np.array_equal(got.astype(np.float32), rounded), name
        expected = {KINDS.F16: "float16", KINDS.BF16: "bfloat16"}.get(kind, "float32")
        assert got.dtype.name == expected


def test_rows_that_are_no_blocks_are_float16(tmp_path):
    config = gguf_models.CONFIGS["llama"] | {"intermediate_size": 72}
    gguf_models.saved(config, tmp_path / "ckpt")
    gguf_write.write(tmp_path / "ckpt", tmp_path / "model.gguf", quantization="q8_0")
    kinds = {name: tensor.kind for name, tensor in gguf_file.read_header(tmp_path / "model.gguf").tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == KINDS.F16 and kinds["blk.0.ffn_up.weight"] == KINDS.Q8_0


@pytest.mark.parametrize("quantization", gguf_write.QUANTIZATIONS)
def test_llama_cpp_tells_the_story(stories, tmp_path, quantization):
    source, directory = stories
    gguf_write.write(directory, tmp_path / "stories.gguf", quantization=quantization)
    ours, theirs = GptjaxRunner.load(directory), llama_cpp(tmp_path / "stories.gguf", tokenizer=source.tokenizer)
    tokens = ours.tokenizer.encode_prompt("Once upon a time, there was a little girl")
    tolerance = {"f32": 1e-4, "f16": 0.05, "bf16": 0.3, "q8_0": 1.0, "q4_0": 8.0}[quantization]
    assert np.abs(ours.logits(tokens) - theirs.logits(tokens)).max() < tolerance
    num_tokens = 64 if quantization in ("f32", "f16") else 8
    assert theirs.greedy(tokens, num_tokens) == ours.greedy(tokens, num_tokens)
    for text in ("Once upon a time", "Lily said: été 天 😀", "line\nline\ttab", "", "<s> is text here"):
        assert theirs.encode(text) == source.tokenizer.encode(text)
    again = gguf.open_source(tmp_path / "stories.gguf").tokenizer
    assert again.pieces == source.tokenizer.pieces and again.bos_id == source.tokenizer.bos_id


def test_a_tokenizer_json_of_sentencepiece_s_kind_goes_too(shared_data, tmp_path):
    source = hf.open_source(shared_data / "models" / "stories260K" / "hf")
    gguf_write.write_source(source, tmp_path / "stories.gguf")
    theirs = llama_cpp(tmp_path / "stories.gguf", tokenizer=source.tokenizer)
    for text in ("Once upon a time", "Lily said: été 天 😀", "line\nline\ttab", "", "<s>is a token</s> here"):
        assert theirs.encode(text) == source.tokenizer.encode(text)


def test_stored_bfloat16_stays_as_it_is(tmp_path):
    import ml_dtypes

    source = gguf_models.saved(gguf_models.CONFIGS["llama"], tmp_path / "ckpt", dtype=ml_dtypes.bfloat16)
    gguf_write.write(tmp_path / "ckpt", tmp_path / "model.gguf", quantization="bf16")
    wanted, got = values(source), values(gguf.open_source(tmp_path / "model.gguf"))
    assert all(np.array_equal(wanted[name].astype(np.float32), got[name].astype(np.float32)) for name in wanted)


def test_values_too_large_for_float16_are_refused(tmp_path):
    source = gguf_models.source(gguf_models.CONFIGS["llama"])
    source.tensors["model.layers.1.mlp.up_proj.weight"].value[3, 4] = 70_000
    checkpoint.write(source, tmp_path / "ckpt")
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight: values up to 7e\+04 are too large for float16"):
        gguf_write.write(tmp_path / "ckpt", tmp_path / "model.gguf", quantization="f16")


def test_an_interrupted_export_goes_on(tmp_path, monkeypatch):
    gguf_models.saved(gguf_models.CONFIGS["mixtral"], tmp_path / "ckpt")
    gguf_write.write(tmp_path / "ckpt", tmp_path / "whole.gguf", quantization="q8_0")
    put, done = gguf_write._put, []

    def failing(header, place, value, **rest):
        if len(done) == 9:
            raise OSError("no space left on device")
        done.append(place)
        put(header, place, value, **rest)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(gguf_write, "_put", failing)
        gguf_write.write(tmp_path / "ckpt", tmp_path / "part.gguf", quantization="q8_0", num_threads=1)
    again = []
    monkeypatch.setattr(
        gguf_write, "_put", lambda *arguments, **rest: (again.append(arguments), put(*arguments, **rest))
    )
    gguf_write.write(tmp_path / "ckpt", tmp_path / "part.gguf", quantization="q8_0", num_threads=1)
    assert (tmp_path / "part.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    total = len(gguf.open_source(tmp_path / "whole.gguf").tensors)
    assert len(again) == total - 9


@pytest.mark.parametrize("name", [kind.name for kind in READABLE])
def test_every_type_of_block_is_read(tmp_path, name, monkeypatch):
    kind = KINDS[name]
    block, block_bytes = package.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(kind).integers(0, 256, (3, 2 * block_bytes), np.uint8)
    writer = package.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("first", np.ones(5, np.float32))
    dtype = {KINDS.F32: np.float32, KINDS.F16: np.float16}.get(kind, np.uint8)
    data = raw.view(dtype).reshape(3, -1)
    writer.add_tensor("x", data, raw_shape=None if dtype != np.uint8 else raw.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gguf_file, "_READ_VALUES", 2 * block)  # in several reads
    tensor = gguf_file.read_header(tmp_path / "one.gguf").tensors["x"]
    wanted = package.dequantize(data, kind).reshape(3, 2 * block)
    with np.errstate(invalid="ignore"):
        got, row = tensor.read().astype(np.float32), tensor.part(1).read().astype(np.float32)
    assert np.array_equal(got, wanted, equal_nan=True)
    assert np.array_equal(row, wanted[1], equal_nan=True)


def test_the_header_is_read_as_the_package_reads_it(stories, tmp_path):
    gguf_write.write(stories[1], tmp_path / "stories.gguf", quantization="q8_0")
    ours, theirs = gguf_file.read_header(tmp_path / "stories.gguf"), package.GGUFReader(tmp_path / "stories.gguf")
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.offset, mine.kind, mine.num_bytes) == (tensor.data_offset, tensor.tensor_type, tensor.n_bytes)
        assert mine.shape == tuple(tensor.shape.tolist()[::-1])
    for key, value in ours.metadata.items():
        found = theirs.fields[key].contents()
        assert found == (value.tolist() if isinstance(value, np.ndarray) else pytest.approx(value)), key


@pytest.mark.parametrize(
    ("factor", "original", "low", "high", "dims"),
    [(8.0, 8192, 1.0, 4.0, 128), (32.0, 8192, 1.0, 4.0, 64), (8.0, 8192, 1.0, 4.0, 16), (16.0, 5000, 1.0, 4.0, 128)],
)
def test_llama_3_s_rotation_is_told_from_its_factors(factor, original, low, high, dims):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": original,
        "low_freq_factor": low,
        "high_freq_factor": high,
    }
    _, factors = gguf_rope.write(scaling, theta=500_000.0, dims=dims)
    found = gguf_rope.fit_llama3(factors, theta=500_000.0, dims=dims, path="x.gguf")
    _, again = gguf_rope.write(found, theta=500_000.0, dims=dims)
    assert np.allclose(factors, again, rtol=1e-4)
    assert found == scaling or dims == 16


def test_factors_of_another_rotation_are_refused():
    with pytest.raises(ValueError, match=r"x\.gguf: rope_freqs\.weight: .* not those of Llama 3's"):
        gguf_rope.fit_llama3(np.linspace(1, 40, 64, dtype=np.float32), theta=1e4, dims=128, path="x.gguf")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixtral", {"sliding_window": 8}, "no sliding window.* from position 8 on.* max_position_embeddings 8 in its"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "no sliding window"),
        ("qwen3", {"rope_scaling": gguf_models._LLAMA3}, "cannot be told all of this model.*scaling"),
        ("gemma3", {"rope_scaling": gguf_models._LLAMA3}, "cannot be told all of this model.*scaling"),
        ("deepseek_v3", {"num_hidden_layers": 27}, "cannot be told all of this model.*latent"),
        ("deepseek_v3", {"q_lora_rank": None}, "attention.q_lora_rank: missing"),
        ("qwen3_moe", {"norm_topk_prob": False}, "cannot be told all of this model.*normalize"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "has no such tensor in architecture qwen3moe"),
        ("gemma3", {"query_pre_attn_scalar": 32}, "cannot be told all of this model.*scale"),
        ("deepseek_v3", {"rope_scaling": gguf_models._YARN}, "yarn_log_multiplier"),
        ("gpt2", {"activation_function": "relu"}, "cannot be told all of this model.*activation"),
    ],
)
def test_what_llama_cpp_would_not_compute_is_refused(tmp_path, name, change, message):
    model = gguf_models.source(gguf_models.CONFIGS[name] | change).model
    with pytest.raises(ValueError, match=message):
        gguf_write.make_plan(model, quantization="f16")


def test_factors_of_an_architecture_without_them_are_refused(tmp_path):
    plan = gguf_write.make_plan(gguf_models.source(gguf_models.CONFIGS["qwen3"]).model, quantization="f32")
    tensors = {**plan.tensors, "rope_freqs.weight": ((16,), int(KINDS.F32))}
    gguf_file.write_header(tmp_path / "model.gguf", plan.metadata, tensors)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight: \[16\] is no tensor of this architecture"):
        gguf.open_source(tmp_path / "model.gguf")


def test_another_epsilon_than_that_of_latents_is_held_against_what_runs(tmp_path, caplog):
    source = gguf_models.saved(gguf_models.CONFIGS["deepseek_v3"] | {"rms_norm_eps": 1e-3}, tmp_path / "ckpt")
    with caplog.at_level("WARNING"):
        gguf_write.write(tmp_path / "ckpt", tmp_path / "model.gguf", quantization="f32")
    assert "llama.cpp takes the layers' epsilon for the norms of latents" in caplog.text
    assert gguf.open_source(tmp_path / "model.gguf").model == source.model
    ours, theirs = GptjaxRunner.load(tmp_path / "ckpt"), llama_cpp(tmp_path / "model.gguf")
    changed, reason = theirs.as_run(ours.model)
    assert "epsilon" in reason and changed != ours.model
    tokens = list(range(5, 50))
    wanted = theirs.logits(tokens)
    assert np.abs(GptjaxRunner(changed, ours.params, None).logits(tokens) - wanted).max() < 3e-4
    assert np.abs(ours.logits(tokens) - wanted).max() > 3e-3


def test_the_config_of_a_llama_3_is_kept(tmp_path):
    config = gguf_models.CONFIGS["llama 3 rotation"]
    gguf_models.saved(config, tmp_path / "ckpt")
    gguf_write.write(tmp_path / "ckpt", tmp_path / "model.gguf", quantization="f16")
    raw = gguf.open_source(tmp_path / "model.gguf").raw_config
    assert json.loads(json.dumps(raw))["rope_scaling"] == config["rope_scaling"]
    assert raw["rope_theta"] == 500_000.0 and raw["rms_norm_eps"] == 1e-6
