"""Models made here go out as the family that they are, and transformers computes the same from them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import meta, reading
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.interop import exporting, hf
from gptjax.interop.families import FAMILIES
from gptjax.interop.runner import GptjaxRunner
from gptjax.interop.table import family_of, group_layers
from tests.configs.test_configs import spec_of
from tests.interop import peers
from tests.interop.peers import TransformersRunner
from tests.tiny import TINY, random_params

GPT2 = dataclasses.replace(
    TINY, position="learned", norm="layernorm", norm_eps=1e-5, bias=True, activation="gelu_tanh", num_kv_heads=4,
    head_dim=4,
)  # fmt: skip
QWEN3 = dataclasses.replace(TINY, qk_norm=True, tie_embeddings=False, num_layers=5, window=4, global_every=2)
SPECS = {
    "gpt2": GPT2,
    "llama": dataclasses.replace(TINY, tie_embeddings=False, bias=True, num_layers=3),
    "mistral": dataclasses.replace(TINY, window=5),
    "qwen3": QWEN3,
}


def save(tmp_path, model, params):
    """As training leaves it."""
    with CheckpointStore(tmp_path / "run") as store:
        store.save(3, meta=meta.make(model), params={k: v for k, v in params.items()}, opt_state={"count": jnp.ones(2)})
    return reading.find(tmp_path / "run")


def check(tmp_path, model, name):
    params = random_params(model, scale=0.2)
    path = save(tmp_path, model, params)
    assert hf.write(path, tmp_path / "exported").name == name
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, 16).tolist()
    peers.check_same(TransformersRunner(tmp_path / "exported"), GptjaxRunner(model, params, None), tokens, model)


@pytest.mark.parametrize("name", SPECS)
def test_a_trained_model_is_what_transformers_makes_of_it(tmp_path, name):
    check(tmp_path, dataclasses.replace(SPECS[name].build(), dtype="float32"), name)


def test_a_group_that_shares_its_weights_is_written_out_layer_by_layer(tmp_path):
    model = TINY.build()
    groups = (dataclasses.replace(model.groups[0], repeats=3, shared=True),)
    check(tmp_path, dataclasses.replace(model, groups=groups), "llama")


@pytest.mark.parametrize(
    "config, name", [("base", "llama"), ("gpt2_124m", "gpt2"), ("llama_1b", "llama"), ("llama_8b", "llama")]
)
def test_the_family_of_a_config(config, name):
    assert family_of(spec_of(config).build(), FAMILIES).name == name


@pytest.mark.parametrize(
    "spec, message",
    [
        (dict(norm_placement="post"), r"nearest is llama, where .*norm_placement: 'pre' -> 'post'"),
        (dict(attn_softcap=3.0), r"nearest is llama, where .*softcap: None -> 3\.0"),
        (dict(rope_fraction=0.5), r"nearest is llama, where .*rope\.fraction: 1\.0 -> 0\.5"),
        (dict(attn_sinks=True), r"nearest is llama, where .*sinks: False -> True"),
        (dict(position="none"), r"has this architecture: gpt2: .*; llama: this family rotates"),
    ],
)
def test_what_no_family_expresses_is_said(spec, message):
    with pytest.raises(ValueError, match=message):
        family_of(dataclasses.replace(TINY, **spec).build(), FAMILIES)


def test_nor_is_another_family_taken_than_the_one_that_was_asked_for():
    with pytest.raises(ValueError, match="family 'qwen3' is not this model's; it differs in .*qk_norm"):
        family_of(TINY.build(), FAMILIES, name="qwen3")
    with pytest.raises(ValueError, match="family 'bert': unknown; expected one of .*gemma3_text"):
        family_of(TINY.build(), FAMILIES, name="bert")


def test_layers_are_grouped_by_the_shortest_pattern():
    a, b = TINY.build().blocks[0], dataclasses.replace(TINY, window=3).build().blocks[0]

    def shape(*blocks):
        return [(len(group.pattern), group.repeats) for group in group_layers(blocks)]

    assert shape(a, a, a) == [(1, 3)]
    assert shape(*[b, b, a] * 3) == [(3, 3)]
    assert shape(*[b, b, b, a] * 3, b, b) == [(4, 3), (1, 2)]
    assert shape(a, a, *[b, a] * 3) == [(1, 2), (2, 3)]
    mixed = [a if bit else b for bit in np.random.default_rng(0).integers(0, 2, 200)]
    groups = group_layers(mixed)
    assert [block for group in groups for block in group.pattern * group.repeats] == mixed


def test_a_model_of_characters_is_compared_on_those_that_it_knows(tmp_path):
    tokenizer = tokenizer_lib.characters("abcdefgh \nT")
    model = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size).build()
    with CheckpointStore(tmp_path / "run") as store:
        assets = {tokenizer_lib.FILE_NAME: tokenizer.to_bytes()}
        store.save(
            3, meta=meta.make(model, tokenizer=tokenizer.fingerprint), params=random_params(model), assets=assets
        )
    found = exporting.export(tmp_path / "run", tmp_path / "hf", format="hf")
    assert found.accepted and found.tokenizer.num_strings > 10 and not found.tokenizer.different
