from __future__ import annotations

import json

import pytest

from gptjax.checkpoint import meta
from tests.checkpoint import tiny


def test_round_trips_through_json():
    made = tiny.meta(step=7)
    assert meta.from_json(json.loads(json.dumps(meta.to_json(made))), path="f") == made


def test_names_what_wrote_it():
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint"} <= tiny.meta().versions.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepp": 1}, r"ckpt/3/meta\.stepp: unknown key; did you mean `step`"),
        ({"step": "three"}, r"ckpt/3/meta\.step: expected int, got 'three'"),
        ({"model": {}}, r"ckpt/3/meta\.model: missing keys: vocab_size"),
        ({"format_version": 99}, r"ckpt/3/meta: format_version 99 is newer than 1"),
    ],
)
def test_names_file_and_key_of_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        meta.from_json(meta.to_json(tiny.meta()) | changes, path="ckpt/3/meta")


@pytest.mark.parametrize("values", [None, [], "meta"])
def test_refuses_json_that_is_no_mapping(values):
    with pytest.raises(ValueError, match="f: expected a mapping"):
        meta.from_json(values, path="f")


def test_a_missing_key_is_named():
    values = meta.to_json(tiny.meta())
    del values["tokenizer"]
    with pytest.raises(ValueError, match="missing keys: tokenizer"):
        meta.from_json(values, path="f")


def test_differences_of_models_name_the_size():
    assert meta.model_differences(tiny.model(32), tiny.model(64)) == ["groups.0.pattern.0.mlp.d_ff: 32 -> 64"]
