"""The layout for decoding is the same model, and is made once."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gptjax.infer.layout import for_decoding
from gptjax.nn import transformer
from gptjax.nn.config import LayerGroup
from gptjax.types import Params
from tests.infer.conftest import MOE, build
from tests.tiny import random_params

TOKENS = np.array([[5, 9, 33, 2, 60]], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params: Params):
    return transformer.logits(cfg, params, transformer.forward(cfg, params, TOKENS).hidden_BTD)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_apart_are_the_same_model(tiny, dtype):
    cfg = dataclasses.replace(tiny[0], dtype=dtype)
    (group,) = cfg.groups
    twice = LayerGroup(pattern=group.pattern, repeats=2)
    shared = LayerGroup(pattern=group.pattern, repeats=3, shared=True)
    cfg = dataclasses.replace(cfg, groups=(twice, shared))
    params = random_params(cfg)
    apart, weights = for_decoding(cfg, params)
    assert apart.groups == (dataclasses.replace(twice, repeats=1),) * 2 + (shared,)
    assert weights["group_0"]["block_0"]["mlp"]["up"]["kernel"].dtype == dtype
    # Storing what is computed in changes no bit of bfloat16; float32 products may be fused otherwise.
    np.testing.assert_allclose(logits(apart, weights), logits(cfg, params), atol=1e-5 if dtype == "float32" else 0.05)
    assert for_decoding(apart, weights) == (apart, weights)


def test_routers_and_norms_stay_in_float32():
    cfg, params = build(moe=MOE, dtype="bfloat16")
    _, weights = for_decoding(cfg, params)
    block = weights["group_0"]["block_0"]
    assert block["moe"]["router"]["kernel"].dtype == "float32"
    assert block["mlp_norm"]["scale"].dtype == "float32"
    assert block["moe"]["experts_up"]["kernel"].dtype == "bfloat16"
