"""Folders in float8 with scales by block, as DeepSeek-V3 and Qwen3-FP8 are published, beside transformers' own code."""

import json
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from gptjax.interop import checkpoint, fp8, hf, stream
from gptjax.interop.safetensors import read_header
from tests.interop import peers

save_file = pytest.importorskip("safetensors.numpy").save_file
torch, transformers = peers.torch, peers.transformers
dequantize = transformers.integrations.finegrained_fp8.Fp8Dequantize(None)._dequantize_one

E4M3 = ml_dtypes.float8_e4m3fn
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PACKING = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [16, 16]}
SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=112, tie_word_embeddings=False,
)  # fmt: skip
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=32)
QWEN3 = lambda: transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)  # noqa: E731
QWEN3_MOE = lambda: transformers.Qwen3MoeConfig(  # noqa: E731
    **SIZES, **MOE, num_key_value_heads=2, head_dim=16, num_experts=4
)
DEEPSEEK_V3 = lambda: transformers.DeepseekV3Config(  # noqa: E731
    **SIZES, **MOE, num_key_value_heads=4, n_routed_experts=8, n_group=4, topk_group=2, first_k_dense_replace=1,
    q_lora_rank=16, kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
)  # fmt: skip


def pack(values, block, *, scale_dtype):
    """`X` and `X_scale_inv`, such that the largest of each block is float8's largest."""
    height, width = block
    grid = [-(-size // part) for size, part in zip(values.shape, block, strict=True)]
    scales, codes = np.empty(grid, scale_dtype), np.empty(values.shape, E4M3)
    for row, column in np.ndindex(*grid):
        part = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
        scales[row, column] = np.abs(values[part]).max() / 448
        codes[part] = np.clip(values[part] / np.float32(scales[row, column]), -448, 448).astype(E4M3)
    return codes, scales


def by_torch(codes, scales, block):
    """The products in float32, rounded to bfloat16; blocks at the edges are cut."""
    whole = torch.from_numpy(scales.astype(np.float32))
    for dim in (0, 1):
        whole = whole.repeat_interleave(block[dim], dim=dim)
    values = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn).float()
    return (values * whole[: values.shape[0], : values.shape[1]]).bfloat16()


def published(tmp_path, config, *, block=(16, 16), scale_dtype=np.float32, keep=("lm_head", "embed", "mlp.gate.")):
    """A folder in float8, one with the same weights unpacked, and the packed tensors."""
    folder, plain = tmp_path / "packed", tmp_path / "plain"
    model = peers.make(config, scale=0.1).to(torch.bfloat16)
    for layer in model.model.layers:  # float32 in published files too
        if hasattr(getattr(layer.mlp, "gate", None), "e_score_correction_bias"):
            layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.float()
    for path in (folder, plain):
        model.save_pretrained(path)
    tensors, unpacked, pairs = {}, {}, {}
    for name, stored in read_header(folder / "model.safetensors").items():
        value = stored.read()
        tensors[name] = unpacked[name] = value
        if value.ndim == 2 and not any(part in name for part in keep):
            codes, scales = pack(value.astype(np.float32), block, scale_dtype=scale_dtype)
            tensors[name], tensors[f"{name}_scale_inv"] = pairs[name] = codes, scales
            unpacked[name] = by_torch(codes, scales, block).view(torch.uint16).numpy().view(BFLOAT16)
    save_file(tensors, folder / "model.safetensors")
    save_file(unpacked, plain / "model.safetensors", metadata={"format": "pt"})
    describe(folder, weight_block_size=list(block))
    return folder, plain, pairs


def describe(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = PACKING | changes
    (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return published(tmp_path_factory.mktemp("qwen3"), QWEN3())[0]


@pytest.fixture
def folder(made, tmp_path):
    """Of Qwen3, to be damaged."""
    return shutil.copytree(made, tmp_path / "folder")


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_a_model_computes_the_same_and_goes_out_unpacked(tmp_path, name):
    config = {"qwen3": QWEN3, "qwen3_moe": QWEN3_MOE, "deepseek_v3": DEEPSEEK_V3}[name]()
    folder, plain, pairs = published(tmp_path, config)
    assert any("experts.1.up_proj" in pair for pair in pairs) == (name != "qwen3")
    source = hf.open_source(folder)
    checkpoint.write(source, tmp_path / "checkpoint")
    tokens = np.random.default_rng(1).integers(0, 61, 48).tolist()
    theirs, ours = peers.TransformersRunner(plain), peers.GptjaxRunner.load(tmp_path / "checkpoint")
    peers.check_same(theirs, ours, tokens, source.model)
    hf.write(tmp_path / "checkpoint", tmp_path / "exported")
    assert "quantization_config" not in json.loads((tmp_path / "exported" / "config.json").read_text())
    np.testing.assert_array_equal(peers.TransformersRunner(tmp_path / "exported").logits(tokens), theirs.logits(tokens))


@pytest.mark.parametrize("scale_dtype", [np.float32, BFLOAT16], ids=str)
def test_unpacked_as_transformers_does(tmp_path, scale_dtype):
    folder, _, pairs = published(tmp_path, QWEN3(), scale_dtype=scale_dtype)
    found = hf.open_source(folder).tensors
    for name, (codes, scales) in pairs.items():
        theirs = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
        expected = dequantize(theirs, torch.from_numpy(scales.astype(np.float32)), torch.bfloat16)
        assert found[name].dtype == BFLOAT16
        np.testing.assert_array_equal(found[name].read().view(np.uint16), expected.view(torch.uint16).numpy(), name)


@pytest.mark.parametrize("block", [(128, 128), (24, 20), (7, 40)])
def test_blocks_at_the_edges_may_be_cut(tmp_path, block):
    folder, _, pairs = published(tmp_path, QWEN3(), block=block)
    found = hf.open_source(folder).tensors
    for name, (codes, scales) in pairs.items():
        expected = by_torch(codes, scales, block).view(torch.uint16).numpy()
        np.testing.assert_array_equal(found[name].read().view(np.uint16), expected, name)


def test_every_code_and_an_overflow(folder):
    codes = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16).view(E4M3), (2, 2))
    name = "model.layers.1.self_attn.k_proj.weight"
    scales = np.array([[0.3, -2e-40], [3e38, 1]], np.float32)
    change(folder, {name: codes, f"{name}_scale_inv": scales})
    found = hf.open_source(folder).tensors[name].read().astype(np.float32)
    assert np.isinf(found).any() and np.isnan(found).any()
    np.testing.assert_array_equal(found, by_torch(codes, scales, (16, 16)).float().numpy())


def change(folder, arrays, *, without=()):
    tensors = {name: stored.read() for name, stored in read_header(folder / "model.safetensors").items()} | arrays
    save_file({name: value for name, value in tensors.items() if name not in without}, folder / "model.safetensors")


def test_modules_that_predict_further_tokens_are_left_out_packed_or_not(tmp_path):
    folder, _, _ = published(tmp_path, DEEPSEEK_V3())
    before = set(hf.open_source(folder).tensors)
    name = "model.layers.2.eh_proj.weight"
    change(folder, {name: np.zeros((32, 64), E4M3), f"{name}_scale_inv": np.ones((2, 4), np.float32)})
    assert set(hf.open_source(folder).tensors) == before


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("arrays", "without", "message"),
    [
        ({}, [f"{NAME}_scale_inv"], "up_proj.weight_scale_inv: missing; expected it beside"),
        ({}, [NAME], "up_proj.weight: missing; expected it beside"),
        ({NAME: np.zeros((48, 32), BFLOAT16)}, [], "up_proj.weight: got .* of bfloat16, expected .* float8_e4m3fn"),
        ({f"{NAME}_scale_inv": np.ones((3, 3), np.float32)}, [], r"up_proj.weight_scale_inv: got \[3, 3\] .*\[3, 2\]"),
        ({f"{NAME}_scale_inv": np.ones((3, 2), np.uint8)}, [], "up_proj.weight_scale_inv: got .* of uint8, expected"),
        (
            {f"{NAME}_scale_inv": np.ones((3, 2), np.float16) * np.nan},
            [],
            "up_proj.weight_scale_inv: got .* of float16",
        ),
        ({NAME: np.zeros((6, 8, 32), E4M3)}, [], r"up_proj.weight: got \[6, 8, 32\] of float8"),
    ],
)
def test_what_is_not_packed_as_it_says_is_refused(folder, arrays, without, message):
    change(folder, arrays, without=without)
    with pytest.raises(ValueError, match=message):
        hf.open_source(folder)


def test_a_scale_that_is_no_number_is_refused(folder, tmp_path):
    change(folder, {f"{NAME}_scale_inv": np.full((3, 2), np.inf, np.float32)})
    with pytest.raises(ValueError, match="up_proj.weight_scale_inv: has a scale that is not a finite number"):
        checkpoint.write(hf.open_source(folder), tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "got weights packed by 'awq', expected 'fp8' or 'mxfp4'"),
        ({"quant_method": None}, "quant_method: missing"),
        ({"fmt": "e5m2"}, "fmt: got 'e5m2', expected 'e4m3'"),
        ({"activation_scheme": "static"}, "activation_scheme: got 'static'"),
        ({"weight_block_size": [128]}, r"weight_block_size: got \[128\], expected two sizes"),
        ({"weight_block_size": [True, 0]}, "weight_block_size: got"),
        ({"weight_block_size": "128"}, "weight_block_size: got '128', expected list"),
        ({"group_size": 7}, "group_size: 7 is not known"),
    ],
)
def test_a_scheme_that_is_not_known_is_refused(folder, changes, message):
    describe(folder, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: quantization_config: .*{message}"):
        hf.open_source(folder)


def test_one_tensor_is_held_at_a_time(tmp_path):
    """What is read beside the tensor that is made is its packed form, half as large."""
    codes = np.zeros((4096, 2048), E4M3)
    packed = fp8.Packed("x", _InMemory(codes), _InMemory(np.ones((32, 16), np.float32)), (128, 128))
    tracemalloc.start()
    packed.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * stream.Tensor("x", packed.shape, packed.dtype).num_bytes


class _InMemory:
    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def read(self):
        return self.values
