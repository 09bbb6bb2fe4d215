"""The written form of what a model has in few bits."""

import dataclasses

import pytest

from gptjax.nn import quant_spec
from gptjax.nn.formats import CacheFormat, KernelRule, QuantConfig, WeightFormat
from gptjax.nn.quant_spec import EMBEDDINGS, LAYERS
from tests.nn import zoo
from tests.tiny import TINY

INT8, INT4 = WeightFormat(dtype="int8"), WeightFormat(dtype="int4", group_size=128, symmetric=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4", QuantConfig(rules=(KernelRule(pattern=LAYERS, weights=INT4),), stage="train")),
        (
            "int3:g32:sym, leave=mlp/down",
            QuantConfig(
                rules=(
                    KernelRule(pattern="mlp/down"),
                    KernelRule(pattern=LAYERS, weights=WeightFormat(dtype="int3", group_size=32)),
                ),
                stage="train",
            ),
        ),
        (
            "int8,activations=int8,embeddings=int8:g64,kv_cache=int4:g32:sym",
            QuantConfig(
                rules=(
                    KernelRule(pattern=LAYERS, weights=INT8, activations="int8"),
                    KernelRule(pattern=EMBEDDINGS, weights=dataclasses.replace(INT8, group_size=64)),
                ),
                stage="train",
                kv_cache=CacheFormat(dtype="int4", group_size=32, keys="rotated"),
            ),
        ),
        ("kv_cache=int8", QuantConfig(kv_cache=CacheFormat(dtype="int8"))),
        ("int4:rows:asym", QuantConfig(
            rules=(KernelRule(pattern=LAYERS, weights=dataclasses.replace(INT4, group_size=None)),), stage="train"
        )),
    ],
)  # fmt: skip
def test_what_is_written_is_what_is_meant(text, expected):
    assert quant_spec.parse(text) == expected
    assert dataclasses.replace(TINY, quant=text).build().quant == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "weights=int9: expected <dtype>.*of int2, int3"),
        ("int4:64", "weights=int4:64: expected <dtype>"),
        ("int4:g64:g32", "weights=int4:g64:g32: expected <dtype>"),
        ("int4:g3", "group_size=3: expected none or at least 4"),
        ("fp8_e4m3:asym", "fp8_e4m3: has no zero code"),
        ("int4,int8", "'int8' is not understood; expected the format of the layers' kernels and at most one"),
        ("int4,cache=int8", "'cache=int8' is not understood"),
        ("int4,activations=int4", "activations=int4: expected one of none, int8, fp8_e4m3"),
        ("int4,kv_cache=fp8", "kv_cache=fp8: expected <dtype>.*of int4, int8"),
        ("kv_cache=int4:plain:rotated", "at most one of plain and rotated"),
        ("int4:rotated", "weights=int4:rotated: expected <dtype>"),
        ("int4,leave=(", "leave='\\('.*no regular expression"),
        ("embeddings=int8", "embeddings has no effect without a format of the layers' kernels"),
    ],
)
def test_mistakes_name_the_part(text, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, quant=text)


def test_a_cache_is_said_as_it_is_written_and_taken_back():
    cfg = zoo.build("dense")
    for text in ("int8:rows:sym:plain", "int4:g4:asym:rotated", "none"):
        format = quant_spec.cache_format(text)
        changed = quant_spec.with_cache(cfg, format)
        assert changed.kv_cache == format and quant_spec.said(format) == text
        assert quant_spec.with_cache(changed, None) == cfg
