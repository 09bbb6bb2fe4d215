"""Training for few bits by the config alone: from a checkpoint, with a teacher, and stored as it was trained."""

import dataclasses

import jax
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.checkpoint.store import read_meta, restore_params
from gptjax.compress import distill, quantize, saving
from gptjax.nn import quant_spec, quantized, storage, transformer
from gptjax.train.run import run

SPEC = "int4:g8:asym,embeddings=int8,kv_cache=int8"
RTN = quantize.METHODS["rtn"]


@pytest.fixture(scope="module")
def floats(tmp_path_factory, data_dir):
    from tests.train.conftest import run_config

    path = tmp_path_factory.mktemp("floats")
    run(run_config.__wrapped__(data_dir)(), path)
    return path


@pytest.fixture
def trained(run_config, floats, tmp_path):
    run(run_config(model__quant=SPEC, train__init_from=str(floats)), tmp_path / "qat")
    return restore_params(tmp_path / "qat")


def as_asked(text):
    return dataclasses.replace(quant_spec.parse(text), stage="stored")


def test_what_was_trained_is_stored_to_the_bit(trained):
    meta, params = trained
    assert meta.model.quant == quant_spec.parse(SPEC) and meta.lineage[-1]["init_step"] == 6
    found = quantize.quantize(meta.model, params, as_asked(SPEC), method=RTN)
    assert found.model == dataclasses.replace(meta.model, quant=as_asked(SPEC))
    layouts, count = transformer.layouts(meta.model), 0
    stored = {storage.name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(
        found.params, is_leaf=quantized.is_quantized)}  # fmt: skip
    rounded = storage.as_trained(meta.model.quant, params, layouts)
    is_kernel = lambda leaf: isinstance(leaf, quantized.RoundedKernel)  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(rounded, is_leaf=is_kernel):
        if is_kernel(leaf):
            ours = jax.jit(quantized.dequantize)(stored[storage.name(path)])
            np.testing.assert_array_equal(ours, jax.jit(lambda leaf: leaf.rounded())(leaf))
            count += 1
    assert count == len(layouts)
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    outputs = [
        jax.jit(transformer.forward, static_argnums=0)(cfg, weights, tokens).hidden_BTD
        for cfg, weights in ((meta.model, params), (found.model, found.params))
    ]
    np.testing.assert_allclose(*outputs, atol=1e-4)


def test_it_is_not_stored_in_another_way_than_it_was_trained_for(trained):
    meta, params = trained
    for text, message in (
        ("int4:g8:sym,embeddings=int8", "was trained for few bits by its own rules.*int4 groups of 8 with zero points"),
        ("int4:g8:asym", "embed/tokens: this model was trained for few bits"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize.quantize(meta.model, params, as_asked(text), method=RTN)
    with pytest.raises(ValueError, match="gptq: this model was trained with kernels rounded to nearest"):
        quantize.quantize(meta.model, params, as_asked(SPEC), method=quantize.METHODS["gptq"])
    stored = quantize.quantize(meta.model, params, as_asked(SPEC), method=RTN)
    with pytest.raises(ValueError, match="in few bits already"):
        quantize.quantize(stored.model, stored.params, as_asked(SPEC), method=RTN)
    cache_alone = quantize.quantize(stored.model, stored.params, as_asked("kv_cache=int4:g4"), method=RTN)
    assert cache_alone.model.kv_cache.dtype == "int4" and cache_alone.params is stored.params
    assert all(leaf.treatment == "left" and leaf.bytes_before == leaf.bytes_after for leaf in cache_alone.leaves)


def test_a_student_is_trained_for_few_bits_by_a_teacher(run_config, floats, tmp_path):
    values = config_lib.to_dict(run_config(model__quant="int4:g8:asym", train__init_from=str(floats)))
    values["distill"] = dict(teacher=str(floats), weight=1.0)
    summary = run(config_lib.from_dict(distill.DistillRun, values), tmp_path, task_fn=distill.task)
    meta = read_meta(tmp_path / "ckpt" / "6")
    assert summary["outcome"] == "finished" and meta.model.quant.stage == "train"
    assert meta.lineage[-1]["stage"] == "distill" and meta.lineage[-1]["init_from"] == str(floats)


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ("int4:g5", "group_0/block_0/attention/.*: group_size=5 does not divide its 16 inputs"),
        ("int4:g8,leave=mlp/dwn", "'mlp/dwn': no kernel has this in its path; there are embed/tokens"),
        ("kv_cache=int4:g5", "keys: group_size=5 does not divide its 8 inputs"),
    ],
)
def test_what_the_model_cannot_be_trained_for_is_said_before_anything_is_written(run_config, tmp_path, quant, message):
    with pytest.raises(ValueError, match=message):
        run(run_config(model__quant=quant), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_few_bits_do_not_train_and_leave_no_run_behind(run_config, trained, tmp_path):
    meta, params = trained
    found = quantize.quantize(meta.model, params, as_asked(SPEC), method=RTN)
    entry = {"stage": "quantize"}
    saving.write(tmp_path / "stored", found.model, found.params, entry=entry, source=meta, tokenizer=None)
    with pytest.raises(ValueError, match="stored: its kernels are in few bits, which do not train"):
        run(run_config(train__init_from=str(tmp_path / "stored")), tmp_path / "next")
    assert not (tmp_path / "next").exists()
