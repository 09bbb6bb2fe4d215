"""The flat form of a model, expanded."""

import dataclasses

import pytest

from gptjax.nn.config import MoEConfig, RopeConfig, RopeScaling
from gptjax.nn.spec import MLASpec
from tests.nn.zoo import MOE, TINY

LINEAR = RopeScaling(kind="linear", factor=8.0)


def spec(**changes):
    return dataclasses.replace(TINY, **changes)


def layers(**changes):
    return spec(**changes).build().blocks


def test_each_nth_layer_sees_all_and_local_ones_have_their_own_unscaled_rotation():
    blocks = layers(num_layers=7, window=4, global_every=3, local_rope_theta=50.0, rope_scaling=LINEAR)
    assert [block.attention.window for block in blocks] == [4, 4, None, 4, 4, None, 4]
    ropes = {block.attention.window: block.attention.rope for block in blocks}
    assert ropes == {4: RopeConfig(theta=50.0), None: RopeConfig(theta=100.0, scaling=LINEAR)}
    assert [group.repeats for group in spec(num_layers=7, window=4, global_every=3).build().groups] == [2, 1]


def test_a_stretched_context_is_that_of_every_layer_unless_local_ones_have_their_own():
    blocks = layers(window=4, rope_scaling=LINEAR)
    assert {block.attention.rope for block in blocks} == {RopeConfig(theta=100.0, scaling=LINEAR)}


def test_experts_in_every_nth_layer_after_the_dense_ones():
    blocks = layers(num_layers=6, moe=MOE, moe_every=2, first_k_dense=2)
    assert [isinstance(block.mlp, MoEConfig) for block in blocks] == [False, False, False, True, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_every": 2}, "global_every=2 has no effect with window=None"),
        ({"local_rope_theta": 5.0}, "local_rope_theta=5.0 has no effect with window=None"),
        ({"moe_every": 2}, "moe_every=2 has no effect with moe=None"),
        ({"first_k_dense": 1}, "first_k_dense=1 has no effect with moe=None"),
        ({"position": "learned", "rope_scaling": LINEAR}, "rope_scaling=.* has no effect with position='learned'"),
        ({"position": "none", "rope_fraction": 0.5}, "rope_fraction=0.5 has no effect with position='none'"),
        (
            {"mla": MLASpec(kv_latent=8, nope_head_dim=8, rope_head_dim=4, v_head_dim=8), "attn_softcap": 5.0},
            "attn_softcap=5.0 has no effect with mla",
        ),
        ({"d_ff": 0}, "d_ff=0: expected at least 1"),
        ({"window": 4, "global_every": -1}, "global_every=-1: expected at least 0"),
        ({"first_k_dense": 3, "moe": MOE}, "first_k_dense=3: expected 0 to num_layers=2"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**changes)


def test_a_part_of_a_head_is_a_part():
    with pytest.raises(ValueError, match="rope fraction=1.5"):
        layers(rope_fraction=1.5)
