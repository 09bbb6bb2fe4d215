"""TensorFlow, without gptjax and JAX, computes what we do from a SavedModel."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gptjax.interop import saved_model
from gptjax.interop.referees.programs import ProgramsRunner
from tests.interop.portable_models import (
    MODELS,
    check_logits_and_greedy,
    import_stories,
    require,
    run_documented,
    write_checkpoint,
)


@pytest.fixture(autouse=True)
def _needs_tensorflow():
    require("tensorflow")


# The programs are those of ONNX, and tested there for every kind of model; starting TensorFlow takes long.
@pytest.mark.parametrize("name", ["local and global, caps and sinks", "groups of experts with biases"])
def test_tensorflow_computes_the_same(name, tmp_path):
    checkpoint = write_checkpoint(name, tmp_path / "run")
    saved_model.write(checkpoint, tmp_path / "out")
    with ProgramsRunner(tmp_path / "out", "saved_model") as runner:
        assert "tensorflow" in runner.name
        print(f"{name}: {check_logits_and_greedy(checkpoint, runner):.2g}")


def test_real_model(tmp_path, shared_data):
    checkpoint = import_stories(shared_data, tmp_path / "checkpoint")
    saved_model.write(checkpoint, tmp_path / "out")
    with ProgramsRunner(tmp_path / "out", "saved_model") as runner:
        print(f"stories260K: {check_logits_and_greedy(checkpoint, runner):.2g}")
    extra = tmp_path / "out" / "assets.extra"
    assert json.loads((extra / "manifest.json").read_text())["special_ids"]["bos"] == 1
    assert (extra / "tokenizer.json").is_file()
    assert run_documented("SavedModel, by hand", tmp_path / "out").startswith(
        "Once upon a time, there was a little girl"
    )


def test_weights_are_variables(tmp_path):
    """The graph itself is then small whatever the model, as a protocol buffer of over 2 GB cannot be."""
    import tensorflow as tf

    checkpoint = write_checkpoint("latent attention", tmp_path / "run")
    saved_model.write(checkpoint, tmp_path / "out")
    stored = {name for name, _ in tf.train.list_variables(str(tmp_path / "out" / "variables" / "variables"))}
    model = MODELS["latent attention"]
    assert sum("VARIABLE_VALUE" in name for name in stored) > model.num_layers * 8
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    tokens = np.zeros((3, 4), np.int32)
    assert loaded.signatures["serving_default"](tokens=tf.constant(tokens))["logits"].shape == (3, 4, 64)


def test_damaged_checkpoint_is_refused(tmp_path):
    checkpoint = write_checkpoint("latent attention", tmp_path / "run")
    meta_file = checkpoint / "meta" / "metadata"
    content = json.loads(meta_file.read_text())
    content["checksums"]["params/final_norm/scale"] ^= 1
    meta_file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="params/final_norm/scale: the values are not those"):
        saved_model.write(checkpoint, tmp_path / "out")
