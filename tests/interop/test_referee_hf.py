"""The referee runs transformers as it is, on what lies in the folder and nothing else."""

import json
import sys

import numpy as np
import pytest

from gptjax.interop import certificate, checkpoint, hf
from gptjax.interop.runner import GptjaxRunner
from tests.interop import peers
from tests.interop.peers import TransformersRunner
from tests.interop.test_families_dense import PLAIN, changed, gemma3, gpt2, llama

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    peers.make(llama()).save_pretrained(path)
    return path


LAYERED = PLAIN | {"layers in a repeated pattern": lambda: gemma3(num_hidden_layers=7)}


@pytest.mark.parametrize("name", LAYERED)
def test_every_layer_is_seen_before_the_final_norm(tmp_path, name):
    config = LAYERED[name]()
    peers.make(config).save_pretrained(tmp_path / "source")
    checkpoint.write(hf.open_source(tmp_path / "source"), tmp_path / "checkpoint")
    theirs, ours = TransformersRunner(tmp_path / "source"), GptjaxRunner.load(tmp_path / "checkpoint")
    wanted, got = theirs.hidden(TOKENS), ours.hidden(TOKENS)
    assert len(wanted) == len(got) == config.num_hidden_layers + 1
    for layer, (a, b) in enumerate(zip(wanted, got, strict=True)):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=f"before layer {layer}")


def test_the_first_layer_that_differs_is_named(folder, tmp_path):
    def damage(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01

    changed(folder, tmp_path, damage)
    theirs, damaged = TransformersRunner(folder), TransformersRunner(tmp_path)
    found = certificate.first_difference(certificate.layer_differences(theirs, damaged, TOKENS))
    assert found.startswith("the first to differ is layer 1, by")


def test_greedy_goes_on_whatever_the_generation_config_says(folder, tmp_path):
    runner = TransformersRunner(folder)
    wanted = runner.greedy(TOKENS, 20)
    step_by_step = list(TOKENS)
    for _ in range(20):
        step_by_step.append(int(runner.logits(step_by_step)[-1].argmax()))
    assert wanted == step_by_step[len(TOKENS) :]
    changed(folder, tmp_path, lambda tensors: None)
    settings = dict(
        do_sample=True, temperature=5.0, eos_token_id=wanted[2], repetition_penalty=5.0, max_length=4, num_beams=3
    )
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert TransformersRunner(tmp_path).greedy(TOKENS, 20) == wanted


def test_tensors_that_transformers_would_draw_at_random_are_an_error(folder, tmp_path):
    changed(folder, tmp_path, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight: missing_keys for transformers"):
        TransformersRunner(tmp_path)


def test_so_are_tensors_that_it_has_no_place_for(folder, tmp_path):
    def add(tensors):
        tensors["model.layers.2.mlp.up_proj.bias"] = np.zeros(40, np.float32)

    changed(folder, tmp_path, add)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.bias: unexpected_keys for transformers"):
        TransformersRunner(tmp_path)


def test_nothing_is_unpickled_or_fetched(tmp_path):
    model = peers.make(gpt2(n_layer=1))
    model.config.save_pretrained(tmp_path)
    peers.torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        TransformersRunner(tmp_path)
    with pytest.raises(ValueError, match="gpt2: no such folder"):
        TransformersRunner(tmp_path / "gpt2")


def test_encodes_without_special_tokens_where_the_folder_has_a_tokenizer(folder, shared_data):
    assert TransformersRunner(folder).encode("a") is None
    stories = TransformersRunner(shared_data / "models" / "stories260K" / "hf")
    ids = stories.encode("Once upon a time")
    assert ids and 1 not in ids and max(ids) < 512


def test_without_the_packages_the_error_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers: not installed.*gptjax\[referees\]"):
        TransformersRunner(folder)
