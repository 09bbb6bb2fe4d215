"""Costs against hand counts and against what XLA counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import llama_8b
from gptjax import config as config_lib
from gptjax.nn import cost, transformer
from gptjax.nn.spec import ModelSpec
from tests.nn.zoo import ZOO, build


@pytest.mark.parametrize("name", ZOO)
def test_total_is_what_exists(name):
    cfg = build(name)
    counts = cost.count(cfg)
    assert counts.total == sum(leaf.size for leaf in jax.tree.leaves(transformer.abstract_params(cfg)))
    assert counts.active <= counts.total and (counts.active < counts.total) == name.startswith("moe")


def test_active_leaves_out_the_experts_that_are_not_chosen():
    counts = cost.count(build("moe"))
    # One layer with experts; 2 of 4 experts of 3 matrices 16 x 16 are idle.
    assert counts.total - counts.active == 2 * 3 * 16 * 16


def test_pairs():
    for length, window in [(7, None), (7, 3), (7, 9), (1, 1)]:
        distance = np.subtract.outer(np.arange(length), np.arange(length))
        reach = window or length
        assert cost.attended_pairs(length, window=window, causal=True) == np.sum((distance >= 0) & (distance < reach))
        assert cost.attended_pairs(length, window=window, causal=False) == np.sum(np.abs(distance) < reach)


@pytest.mark.parametrize("name", ["gpt2", "dense", "mla"])
def test_forward_flops_are_those_of_the_compiled_program(name):
    cfg = build(name, d_model=64, d_ff=256, vocab_size=512, num_layers=2)
    length = 32

    def run(params, tokens):
        return transformer.logits(cfg, params, transformer.forward(cfg, params, tokens).hidden_BTD)

    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(run).lower(transformer.abstract_params(cfg), tokens).compile()
    counted = cost.flops_per_token(cfg, length)
    # XLA computes the masked half of the scores as well, and counts elementwise work.
    masked = counted.attention * (length**2 / cost.attended_pairs(length, window=None, causal=True))
    expected = (counted.kernels + counted.head + masked) * length
    assert 1.0 <= compiled.cost_analysis()["flops"] / expected < 1.15


def test_experts_count_as_often_as_a_token_is_sent_and_windows_as_far_as_they_reach():
    """By hand: d_model 16; 4 heads of 8 over 2 key/value heads; rows of 12."""
    attention_kernels, pairs = 2 * 16 * 8 * (4 + 2), (12 * 13 / 2) / 12
    moe = cost.flops_per_token(build("moe"), 12)
    dense_layer, experts, shared, router = 3 * 16 * 32, 2 * 3 * 16 * 16, 3 * 16 * 8, 16 * 4
    assert moe.kernels == 2 * (2 * attention_kernels + dense_layer + experts + shared + router)
    assert moe.attention == 2 * 2 * pairs * 4 * (8 + 8) and moe.head == 2 * 16 * 64
    window = cost.flops_per_token(build("window"), 12)
    # Two layers whose queries see 1, 2, 3, then 4 keys, and one that sees all.
    local_pairs = (1 + 2 + 3 + 9 * 4) / 12
    assert window.attention == pytest.approx(2 * (2 * local_pairs + pairs) * 4 * (8 + 8))


def test_training_is_three_forward_passes_and_six_operations_a_parameter():
    cfg = build("dense", d_model=64, d_ff=256)
    flops = cost.flops_per_token(cfg, 8)
    block = transformer.abstract_params(cfg)["group_0"]
    kernels = sum(leaf.size for leaf in jax.tree.leaves(block) if leaf.ndim > 2)
    assert flops.kernels == 2 * kernels
    assert flops.train == 3 * (flops.kernels + flops.attention + flops.head)


def test_the_example_of_docs_mfu():
    spec = config_lib.from_dict(ModelSpec, llama_8b.get_config().model)
    flops = cost.flops_per_token(spec.build(), 8192)
    assert f"{flops.forward / 1e9:.2f} {flops.train / 1e9:.1f} {3 * flops.attention / 1e9:.1f}" == "17.16 51.5 6.4"


def test_cache_bytes():
    # Two layers with keys and values of two heads of 8; latent: 8 + 4 a layer.
    assert cost.cache_bytes_per_token(build("dense"), dtype="bfloat16") == 2 * 2 * 2 * 8 * 2
    assert cost.cache_bytes_per_token(build("mla"), dtype="bfloat16") == 2 * (8 + 4) * 2
