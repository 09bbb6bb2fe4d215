from __future__ import annotations

import pytest

from gptjax.optim import groups
from gptjax.optim.groups import GroupConfig, MatrixLayout


def assign(model, *configs, weight_decay=0.1):
    return groups.assign(configs or groups.EVERYTHING, model.params, model.axes, weight_decay=weight_decay)


def test_kinds_follow_from_names_and_axes(model):
    kinds = {path: treatment.kind for path, treatment in assign(model).items()}
    assert kinds == {
        "embed/tokens": "embedding",
        "group_0/block_0/attention_norm/scale": "vector",
        "group_0/block_0/attention/query/kernel": "matrix",
        "group_0/block_0/attention/query/bias": "vector",
        "group_0/block_0/attention/out/kernel": "matrix",
        "group_0/block_0/moe/router/kernel": "matrix",
        "group_0/block_0/moe/experts_up/kernel": "matrix",
        "group_0/block_0/moe/experts_up/bias": "vector",
        "group_0/block_0/moe/balance_bias": "balance_bias",
        "final_norm/scale": "vector",
        "head/kernel": "head",
    }


def test_by_default_only_matrices_and_the_head_decay(model):
    decayed = {path for path, treatment in assign(model).items() if treatment.weight_decay}
    assert decayed == {path for path, t in assign(model).items() if t.kind in ("matrix", "head")}


def test_layouts_split_inputs_from_outputs_after_the_batch_axes(model):
    layouts = {path: treatment.layout for path, treatment in assign(model).items()}
    assert layouts["group_0/block_0/attention/query/kernel"] == MatrixLayout(1, 1)
    assert layouts["group_0/block_0/attention/out/kernel"] == MatrixLayout(1, 2)
    assert layouts["group_0/block_0/moe/experts_up/kernel"] == MatrixLayout(2, 1)
    assert layouts["group_0/block_0/moe/router/kernel"] == MatrixLayout(1, 1), "a router is one matrix, not E vectors"
    assert layouts["head/kernel"] == MatrixLayout(0, 1)
    assert layouts["final_norm/scale"] is None


def test_latent_projections_merge_heads_too():
    assert groups.matrix_layout("key_up/kernel", ("layers", "latent", "heads", "head_dim")) == MatrixLayout(1, 1)


def test_refuses_axes_that_are_no_matrix():
    with pytest.raises(ValueError, match=r"weird: logical axes .* leave 3 sides"):
        groups.matrix_layout("weird", ("embed", "mlp", "latent"))


def test_first_match_wins_and_sets_decay_rate_and_freeze(model):
    treatments = assign(
        model,
        GroupConfig(pattern="embed/.*", freeze=True),
        GroupConfig(pattern=".*/(query|out)/kernel", lr_scale=0.5, weight_decay=0.7),
        GroupConfig(pattern=".*"),
    )
    assert treatments["embed/tokens"].freeze
    assert treatments["group_0/block_0/attention/query/kernel"].lr_scale == 0.5
    assert treatments["group_0/block_0/attention/query/kernel"].weight_decay == 0.7
    assert treatments["group_0/block_0/moe/experts_up/kernel"].weight_decay == 0.1
    assert not treatments["head/kernel"].freeze


def test_the_balance_bias_never_decays(model):
    treatment = assign(model, GroupConfig(pattern=".*", weight_decay=0.5))["group_0/block_0/moe/balance_bias"]
    assert treatment.weight_decay == 0.0


def test_refuses_parameters_without_a_group(model):
    with pytest.raises(ValueError, match=r"no pattern matches 'final_norm/scale', 'head/kernel'; .*'\.\*'"):
        assign(model, GroupConfig(pattern="(embed|group_0)/.*"))


@pytest.mark.parametrize("pattern", ["embed", "group_1/.*", "embed/positions"])
def test_refuses_groups_without_a_parameter(model, pattern):
    with pytest.raises(ValueError, match=rf"'{pattern}' got no parameter".replace("*", r"\*")):
        assign(model, GroupConfig(pattern=pattern), GroupConfig(pattern=".*"))


def test_refuses_a_group_that_an_earlier_one_shadows(model):
    with pytest.raises(ValueError, match="'embed/tokens' got no parameter"):
        assign(model, GroupConfig(pattern=".*"), GroupConfig(pattern="embed/tokens"))


def test_refuses_the_same_pattern_twice(model):
    with pytest.raises(ValueError, match="'head/.*' got no parameter"):
        assign(
            model,
            GroupConfig(pattern="head/.*", lr_scale=0.5),
            GroupConfig(pattern="head/.*", freeze=True),
            GroupConfig(pattern=".*"),
        )


def test_refuses_axes_of_another_rank(model):
    model.axes["final_norm"]["scale"] = ("layers", "embed")
    with pytest.raises(ValueError, match="final_norm/scale: logical axes"):
        assign(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(pattern="("), "not a regular expression"),
        (dict(pattern=".*", lr_scale=0.0), "freeze=True"),
        (dict(pattern=".*", weight_decay=-0.1), "weight_decay=-0.1"),
    ],
)
def test_refuses_impossible_groups(values, message):
    with pytest.raises(ValueError, match=message):
        GroupConfig(**values)
