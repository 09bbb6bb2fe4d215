"""Exported programs give our logits and tokens in a process without gptjax, whatever the sizes."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from gptjax.interop import stablehlo
from gptjax.interop.certificate import STRINGS
from gptjax.interop.referees.process import BareProcess
from gptjax.interop.referees.programs import ProgramsRunner
from gptjax.interop.run_exported import Model, read_safetensors
from gptjax.interop.runner import GptjaxRunner
from gptjax.interop.stream import JOURNAL_FILE
from tests.interop.portable_models import (
    MODELS,
    check_logits_and_greedy,
    import_stories,
    require,
    run_documented,
    write_checkpoint,
)


@pytest.fixture(autouse=True)
def _needs_flatbuffers():
    require("flatbuffers")


@pytest.mark.parametrize("name", MODELS)
def test_bare_process_computes_the_same(name, tmp_path):
    checkpoint = write_checkpoint(name, tmp_path / "run")
    stablehlo.write(checkpoint, tmp_path / "out")
    with ProgramsRunner(tmp_path / "out", "stablehlo") as runner:
        assert "bare process" in runner.name
        print(f"{name}: {check_logits_and_greedy(checkpoint, runner):.2g}")


def test_rows_of_several_lengths_in_one_program(tmp_path):
    """One artefact, several batch sizes and lengths; rows are padded, and the second call goes on from a cache."""
    checkpoint = write_checkpoint("local and global, caps and sinks", tmp_path / "run")
    stablehlo.write(checkpoint, tmp_path / "out")
    program = export.deserialize(bytearray((tmp_path / "out" / "prefill.jax_export").read_bytes()))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    stored = read_safetensors(tmp_path / "out")
    weights = [stored[weight["name"]] for weight in manifest["weights"]]
    ours = GptjaxRunner.load(checkpoint)
    for batch, first, second in ((1, 7, 4), (3, 20, 11)):
        length = first + second
        tokens = np.random.default_rng(batch).integers(0, 64, (batch, length)).astype(np.int32)
        sizes = {"batch": batch, "cache_len": length + 3}
        cache = [
            jnp.full([sizes.get(dim, dim) for dim in entry["shape"]], entry["fill"], entry["dtype"])
            for entry in manifest["cache"]
        ]
        # Row b has b tokens less in the first call, and gets them in the second.
        held = [first - row for row in range(batch)]
        positions = np.array([[at if at < n else -1 for at in range(first)] for n in held], np.int32)
        wanted = np.array([[0, n - 1] for n in held], np.int32)
        logits, cache = program.call(tokens[:, :first], positions, wanted, cache, weights)
        rest = np.array([row[n : n + second] for row, n in zip(tokens, held, strict=True)])
        at = np.array([np.arange(n, n + second) for n in held], np.int32)
        more, _ = program.call(rest, at, np.tile(np.arange(second, dtype=np.int32), (batch, 1)), cache, weights)
        for row, n in enumerate(held):
            expected = ours.logits(tokens[row].tolist())
            np.testing.assert_allclose(logits[row], expected[[0, n - 1]], atol=2e-4)
            np.testing.assert_allclose(more[row], expected[n : n + second], atol=2e-4)


def test_program_is_for_all_platforms_and_holds_no_weights(tmp_path):
    checkpoint = write_checkpoint("experts", tmp_path / "run")
    stablehlo.write(checkpoint, tmp_path / "out")
    for name in ("prefill", "decode"):
        content = (tmp_path / "out" / f"{name}.jax_export").read_bytes()
        assert export.deserialize(bytearray(content)).platforms == ("cpu", "cuda", "tpu")
        # Neither our folders nor this machine's are in it.
        assert str(tmp_path.parent).encode() not in content and b"gptjax/" not in content
        embedding = jax.tree.leaves(GptjaxRunner.load(checkpoint).params["embed"])[0]
        assert np.asarray(embedding).tobytes()[:64] not in content
    assert not (tmp_path / "out" / JOURNAL_FILE).exists()


def test_the_bare_process_cannot_import_gptjax(tmp_path):
    """Though this one can: neither from its own folder, nor as an installed package."""
    setup = """
try:
    import gptjax
except ImportError:
    answer("absent")
else:
    answer("importable")
"""
    with BareProcess(tmp_path, setup=setup, packages=("numpy",)) as process:
        assert process.name == "absent"


def test_what_a_bare_process_prints_when_it_ends_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="no such model"):
        BareProcess(tmp_path, setup="raise SystemExit('no such model')", packages=("numpy",))


def test_tokens_that_the_model_cannot_read_are_refused(tmp_path):
    checkpoint = write_checkpoint("learned positions and biases", tmp_path / "run")
    stablehlo.write(checkpoint, tmp_path / "out")
    model = Model(tmp_path / "out")
    with pytest.raises(ValueError, match="ids from 0 to 63"):
        model.generate([64], 1)
    with pytest.raises(ValueError, match=r"5 \+ 124 tokens: the model's context is 128"):
        model.generate([1, 2, 3, 4, 5], 124)


def test_bfloat16_artefact(tmp_path):
    checkpoint = write_checkpoint("grouped queries in a window", tmp_path / "run")
    stablehlo.write(checkpoint, tmp_path / "out", dtype=np.dtype(jnp.bfloat16), max_shard_bytes=5000)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dtype"] == "bfloat16"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    tokens = [5, 3, 1, 2]
    with ProgramsRunner(tmp_path / "out", "stablehlo") as runner:
        got, expected = runner.logits(tokens), GptjaxRunner.load(checkpoint).logits(tokens)
    assert 0 < np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_real_model_by_its_own_command(tmp_path, shared_data):
    checkpoint = import_stories(shared_data, tmp_path / "checkpoint")
    out = tmp_path / "out"
    stablehlo.write(checkpoint, out)
    with ProgramsRunner(out, "stablehlo") as runner:
        print(f"stories260K: {check_logits_and_greedy(checkpoint, runner):.2g}")
        ours = GptjaxRunner.load(checkpoint)
        assert all(runner.encode(text) == ours.encode(text) for text in STRINGS)
    expected = ours.greedy([1, 403], 8)
    command = [sys.executable, str(out / "run.py"), "--ids", "1", "403", "--num=8"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert [int(token) for token in printed.split()] == expected
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["special_ids"] == {"bos": 1, "pad": None, "unk": 0, "eos": [2]}
    command = [sys.executable, str(out / "run.py"), "Once upon a time", "--num=8"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed == "Once upon a time, there was a little girl\n"
    assert run_documented("StableHLO, by hand", out).startswith("Once upon a time, there was a little girl")


def test_damaged_checkpoint_is_refused(tmp_path):
    checkpoint = write_checkpoint("experts", tmp_path / "run")
    meta_file = checkpoint / "meta" / "metadata"
    content = json.loads(meta_file.read_text())
    content["checksums"]["params/embed/tokens"] ^= 1
    meta_file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="params/embed/tokens: the values are not those"):
        stablehlo.write(checkpoint, tmp_path / "out")
