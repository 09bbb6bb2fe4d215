"""Kernels in few bits in GGUF files: blocks with the very values, and what no block holds."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest

from gptjax.checkpoint import arrays, reading
from gptjax.compress import saving
from gptjax.interop import exporting, gguf, importing, params
from gptjax.interop.exporting import Options
from gptjax.interop.gguf import blocks
from gptjax.interop.gguf import file as gguf_file
from gptjax.interop.gguf import write as gguf_write
from gptjax.interop.judging import Check
from gptjax.interop.publish import RejectedError
from gptjax.nn import quantized, storage, transformer
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat
from tests.interop.gguf import models as gguf_models

package = pytest.importorskip("gguf")
KINDS = package.GGMLQuantizationType
VALUES = Check(proof="values")
INT4 = WeightFormat(dtype="int4", group_size=32)
INT8 = WeightFormat(dtype="int8")


def quant(weights, *, pattern=r"^group_.*kernel", activations="none"):
    return QuantConfig(rules=(KernelRule(pattern=pattern, weights=weights, activations=activations),))


def saved(tmp_path, rules, *, name="llama", dst="few"):
    """A tiny random model of a GGUF architecture whose kernels are stored in few bits, and its parameters."""
    if not (tmp_path / "floats").exists():
        gguf_models.saved(gguf_models.CONFIGS[name], tmp_path / "floats")
    meta, floats = reading.restore_params(tmp_path / "floats")
    model = dataclasses.replace(meta.model, quant=rules)
    stored = transformer.store(model, floats)
    saving.write(tmp_path / dst, model, stored, entry={"stage": "quantize"}, source=meta, tokenizer=None)
    return tmp_path / dst, stored


def floats_of(stored):
    """What leaves stand for, by path."""
    whole = jax.tree.map(
        lambda leaf: quantized.dequantize(leaf) if quantized.is_quantized(leaf) else leaf,
        stored,
        is_leaf=quantized.is_quantized,
    )
    return {path: np.asarray(leaf) for path, leaf in arrays.flatten(whole).items()}


def in_few_bits(stored):
    leaves = jax.tree_util.tree_leaves_with_path(stored, is_leaf=quantized.is_quantized)
    return {storage.name(path) for path, leaf in leaves if quantized.is_quantized(leaf)}


def written(file):
    """The values of a file by our paths, and how many of its tensors are of each of ggml's types."""
    kinds = collections.Counter(KINDS(tensor.kind).name for tensor in gguf_file.read_header(file).tensors.values())
    found = {path: np.asarray(leaf) for path, leaf in arrays.flatten(params.read(gguf.open_source(file))).items()}
    return found, kinds


EXACT = {
    "attention/query": (INT8, "Q8_0"),
    "attention/key": (WeightFormat(dtype="int8", group_size=32), "Q8_0"),
    "attention/value": (WeightFormat(dtype="int6", group_size=32, symmetric=False), "Q8_0"),
    "attention/out": (WeightFormat(dtype="int5", symmetric=False), "Q8_0"),
    "mlp/gate": (WeightFormat(dtype="int5", group_size=32), "Q5_0"),
    "mlp/up": (INT4, "Q4_0"),
    "mlp/down": (WeightFormat(dtype="int4", group_size=32, symmetric=False), "Q4_1"),
    "embed/tokens": (WeightFormat(dtype="int3", group_size=32, symmetric=False), "Q4_0"),
    "head": (WeightFormat(dtype="int2", group_size=64), "Q4_0"),
}


def test_blocks_hold_the_very_values_of_every_format(tmp_path):
    rules = QuantConfig(rules=tuple(KernelRule(pattern=p, weights=format) for p, (format, _) in EXACT.items()))
    path, stored = saved(tmp_path, rules)
    gguf_write.write(path, tmp_path / "model.gguf", quantization="f32")
    got, kinds = written(tmp_path / "model.gguf")
    assert kinds == {"Q8_0": 8, "Q5_0": 2, "Q4_0": 4, "Q4_1": 2, "F32": 5}
    wanted = floats_of(stored)
    assert wanted.keys() == got.keys() and all(np.array_equal(wanted[path], got[path]) for path in wanted)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss", "deepseek_v3", "gemma3 of local layers", "qwen3_moe"])
def test_in_every_arrangement_of_tensors(tmp_path, name):
    """Transposed, joined, taken apart, experts in one tensor; DeepSeek's keys are turned, so that no block has them."""
    path, stored = saved(tmp_path, quant(INT8), name=name)
    gguf_write.write(path, tmp_path / "model.gguf", quantization="f32", few_bits="blocks_or_f32")
    got, kinds = written(tmp_path / "model.gguf")
    wanted = floats_of(stored)
    assert kinds["Q8_0"] >= 8
    assert all(np.array_equal(wanted[path], got[path]) for path in in_few_bits(stored))


def test_two_groups_of_the_same_scale_are_two_blocks(tmp_path):
    path, stored = saved(tmp_path, quant(dataclasses.replace(INT4, group_size=64), pattern="attention|mlp/(gate|up)"))
    gguf_write.write(path, tmp_path / "model.gguf", quantization="f16")
    file = gguf_file.read_header(tmp_path / "model.gguf")
    assert file.tensors["blk.1.ffn_down.weight"].kind == KINDS.F16
    up = file.tensors["blk.1.ffn_up.weight"]
    raw = up.file.read_bytes()[up.offset : up.offset + up.num_bytes]
    d = np.frombuffer(raw, np.uint8).reshape(96, 2, 18)[..., :2].copy().view("<f2")[..., 0]
    kernel = stored["group_0"]["block_0"]["mlp"]["up"]["kernel"]
    assert np.array_equal(d, np.repeat(np.asarray(kernel.scale)[1], 2, axis=-1))


@pytest.mark.parametrize(
    "format, message",
    [
        (WeightFormat(dtype="fp8_e4m3"), "whole numbers, not fp8"),
        (WeightFormat(dtype="int8", group_size=32, symmetric=False), "from -255 to 255 are none of 8 bits"),
        (WeightFormat(dtype="int4", group_size=16), "groups of 16 are no blocks of 32"),
    ],
)
def test_what_no_block_holds_is_refused_by_name_or_written_as_floats(tmp_path, format, message):
    path, stored = saved(tmp_path, quant(format, pattern="up/kernel"))
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.up_proj\.weight: no block .*{message} \(1 more\); leave"):
        exporting.export(path, tmp_path / "out", format="gguf", check=VALUES)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    wanted = floats_of(stored)["group_0/block_0/mlp/up/kernel"]
    for few_bits, dtype in {"blocks_or_f32": np.float32, "blocks_or_f16": np.float16}.items():
        options = Options(quantization="bf16", few_bits=few_bits)
        found = exporting.export(path, tmp_path / few_bits, format="gguf", options=options, check=VALUES)
        got, kinds = written(tmp_path / few_bits / "model.gguf")
        assert np.array_equal(got["group_0/block_0/mlp/up/kernel"], wanted.astype(dtype)) and kinds["BF16"] == 14
        assert ("of 2 tensors in few bits 2 read back" in found.values) == (dtype == np.float32)


def test_rows_that_are_no_blocks(tmp_path):
    gguf_models.saved(gguf_models.CONFIGS["llama"] | {"intermediate_size": 72}, tmp_path / "floats")
    path, _ = saved(tmp_path, quant(INT8))
    with pytest.raises(ValueError, match=r"mlp\.down_proj\.weight: no block .*rows of 72 are no blocks of 32"):
        gguf_write.write(path, tmp_path / "model.gguf")


def test_scales_that_float16_does_not_have_are_refused(tmp_path):
    """Checkpoints of other origin may have them."""
    path, stored = saved(tmp_path, quant(INT8, pattern="up/kernel"))
    kernel = stored["group_0"]["block_0"]["mlp"]["up"]["kernel"]
    stored["group_0"]["block_0"]["mlp"]["up"]["kernel"] = dataclasses.replace(kernel, scale=kernel.scale * 1.0001)
    meta = reading.read_meta(path)
    saving.write(tmp_path / "other", meta.model, stored, entry={"stage": "test"}, source=meta, tokenizer=None)
    with pytest.raises(ValueError, match="its scales have more digits than the float16 of blocks"):
        gguf_write.write(tmp_path / "other", tmp_path / "model.gguf")


def test_a_kernel_by_hand():
    """-8 to 7 in steps of 0.5; the second half of a block is in the high four bits."""
    rows = blocks.Steps(np.tile(np.arange(-8, 8, dtype=np.int16), 2)[None], np.full((1, 32), 0.5, np.float32))
    codes = [c | c << 4 for c in range(16)]
    assert blocks.pack(rows, "Q4_0").tolist() == [[0x00, 0x38, *codes]]
    assert blocks.pack(rows, "Q4_1").tolist() == [[0x00, 0x38, 0x00, 0xC4, *codes]]  # m = -4
    assert blocks.pack(rows, "Q8_0").view(np.int8)[0, 2:].tolist() == [*range(-8, 8)] * 2
    fifth = [0x00, 0xFF, 0x00, 0xFF]  # codes 8 to 23: the upper half has the bit
    assert blocks.pack(rows, "Q5_0")[0, 2:6].tolist() == fifth


def test_a_certificate_of_a_mixed_model_from_llama_cpp_and_the_way_back(tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    rules = QuantConfig(
        rules=(
            KernelRule(pattern="mlp/down"),
            KernelRule(pattern="mlp", weights=INT4),
            KernelRule(pattern="embed/tokens|attention", weights=INT8, activations="int8"),
        )
    )
    path, stored = saved(tmp_path, rules)
    found = exporting.export(path, tmp_path / "out", format="gguf", options=Options(quantization="f32"))
    assert found.accepted and found.dtype == "f32, kernels in few bits as q4_0 q8_0"
    assert found.tolerance.mean_kl == 0.05 and max(row.mean_kl_nats for row in found.comparisons) < 0.02
    (note,) = found.notes
    assert "inputs are rounded as the checkpoint says here alone" in note
    back = importing.import_model(tmp_path / "out" / "model.gguf", tmp_path / "back")
    assert back.accepted
    wanted, got = floats_of(stored), arrays.flatten(reading.restore_params(tmp_path / "back")[1])
    assert all(np.array_equal(wanted[path], got[path]) for path in wanted)


def test_what_was_done_to_a_model_goes_with_it(tmp_path):
    path, _ = saved(tmp_path, quant(INT8))
    found = exporting.export(path, tmp_path / "out", format="gguf", check=VALUES)
    stages = [entry["stage"] for entry in found.source["lineage"]]
    metadata = gguf_file.read_header(tmp_path / "out" / "model.gguf").metadata
    assert stages == ["import", "quantize"] == [each["stage"] for each in json.loads(metadata["gptjax.lineage"])]
    assert metadata["general.description"].startswith("import: format hf") and metadata["general.file_type"] == 7


def test_blocks_of_other_numbers_are_rejected(tmp_path, monkeypatch):
    path, _ = saved(tmp_path, quant(INT4))
    right = blocks.pack
    monkeypatch.setattr(blocks, "pack", lambda rows, kind: right(blocks.Steps(rows.steps[::-1], rows.scale), kind))
    with pytest.raises(RejectedError, match="what was written is not what was read"):
        exporting.export(path, tmp_path / "out", format="gguf", check=VALUES)
    assert (tmp_path / "out.rejected").exists()


def test_options_without_effect_and_models_that_are_not_stored_in_few_bits(tmp_path):
    path, _ = saved(tmp_path, quant(INT8))
    with pytest.raises(ValueError, match="few_bits=floats: .*has no kernels in few bits"):
        exporting.export(tmp_path / "floats", tmp_path / "out", format="gguf", options=Options(few_bits="floats"))
    with pytest.raises(ValueError, match="few_bits=floats: has no effect on hf"):
        exporting.export(path, tmp_path / "out", format="hf", options=Options(few_bits="floats"))
    with pytest.raises(ValueError, match="few_bits='some': expected one of blocks, blocks_or_f16"):
        exporting.export(path, tmp_path / "out", format="gguf", options=Options(few_bits="some"))
    with pytest.raises(ValueError, match="few bits, which onnx is not written from"):
        exporting.export(path, tmp_path / "out", format="onnx")
    meta, floats = reading.restore_params(tmp_path / "floats")
    trained = dataclasses.replace(meta.model, quant=dataclasses.replace(quant(INT8), stage="train"))
    saving.write(tmp_path / "qat", trained, floats, entry={"stage": "test"}, source=meta, tokenizer=None)
    with pytest.raises(ValueError, match="trained for few bits, .*store them in few bits first"):
        exporting.export(tmp_path / "qat", tmp_path / "out", format="gguf")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Half of every kernel is zero, so that the checkpoint is stored sparse; and the same in 8 bits."""
    folder = tmp_path_factory.mktemp("pruned")
    gguf_models.saved(gguf_models.CONFIGS["llama"], folder / "floats")
    meta, floats = reading.restore_params(folder / "floats")
    random = np.random.default_rng(0)
    halved = jax.tree.map(lambda x: np.where(random.random(x.shape) < 0.5, 0, x) if x.ndim > 2 else x, floats)
    saving.write(folder / "half", meta.model, halved, entry={"stage": "prune"}, source=meta, tokenizer=None)
    model = dataclasses.replace(meta.model, quant=quant(INT8))
    stored = transformer.store(model, halved)
    saving.write(folder / "both", model, stored, entry={"stage": "quantize"}, source=meta, tokenizer=None)
    for name in ("half", "both"):
        assert "bitmap" in (folder / name / "params" / "_METADATA").read_text()
    return folder, halved, stored


@pytest.mark.parametrize("format, package", [("hf", "transformers"), ("gguf", "xllamacpp")])
def test_what_is_stored_sparse_is_exported_with_its_zeros(pruned, tmp_path, format, package):
    pytest.importorskip(package, reason="the peer's own implementation is not installed")
    folder, halved, _ = pruned
    options = Options(dtype=np.dtype(np.float32)) if format == "gguf" else Options()
    found = exporting.export(folder / "half", tmp_path / "out", format=format, options=options)
    assert found.accepted and max(row.max_logit_difference for row in found.comparisons) < 2e-3
    importing.import_model(tmp_path / "out", tmp_path / "back", check=VALUES)
    got = arrays.flatten(reading.restore_params(tmp_path / "back")[1])
    assert all(np.array_equal(leaf, got[path]) for path, leaf in arrays.flatten(halved).items())


def test_what_is_sparse_and_in_few_bits_too(pruned, tmp_path):
    folder, _, stored = pruned
    found = exporting.export(
        folder / "both", tmp_path / "out", format="gguf", options=Options(quantization="f32"), check=VALUES
    )
    assert "of 14 tensors in few bits 14 read back equal to the bit" in found.values
    got, kinds = written(tmp_path / "out" / "model.gguf")
    assert kinds["Q8_0"] == 14 and all(np.array_equal(leaf, got[path]) for path, leaf in floats_of(stored).items())
