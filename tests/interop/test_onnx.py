"""ONNX Runtime computes what we do, from graphs that hold no weights."""

from __future__ import annotations

import numpy as np
import pytest

from gptjax.interop import onnx as onnx_export
from gptjax.interop import onnx_graph
from gptjax.interop.referees.programs import ProgramsRunner
from gptjax.interop.runner import GptjaxRunner
from tests.interop.portable_models import (
    MODELS,
    check_logits_and_greedy,
    import_stories,
    require,
    run_documented,
    write_checkpoint,
)


@pytest.fixture(autouse=True)
def _needs_packages():
    require("onnx", "onnxruntime", "jax2onnx")
    try:
        onnx_graph.require_packages()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_computes_the_same(name, tmp_path):
    import onnx

    checkpoint = write_checkpoint(name, tmp_path / "run")
    onnx_export.write(checkpoint, tmp_path / "out")
    with ProgramsRunner(tmp_path / "out", "onnx") as runner:
        assert "onnxruntime" in runner.name
        print(f"{name}: {check_logits_and_greedy(checkpoint, runner):.2g}")
    operations = {
        node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    }
    # Over experts, and over the turns of shared layers; there is no other control flow.
    assert ("Loop" in operations) == ("experts" in name or "share" in name)


def test_several_rows_and_lengths_in_one_graph(tmp_path):
    """Padded rows of different lengths, in two calls that share a cache."""
    import json

    import onnxruntime

    checkpoint = write_checkpoint("local and global, caps and sinks", tmp_path / "run")
    onnx_export.write(checkpoint, tmp_path / "out")
    ours = GptjaxRunner.load(checkpoint)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "step.onnx")
    entries = json.loads((tmp_path / "out" / "manifest.json").read_text())["cache"]
    for batch, first, second in ((1, 7, 4), (3, 20, 11)):
        tokens = np.random.default_rng(batch).integers(0, 64, (batch, first + second)).astype(np.int32)
        sizes = {"batch": batch, "cache_len": first + second + 3}
        cache = {e["name"]: np.full([sizes.get(d, d) for d in e["shape"]], e["fill"], e["dtype"]) for e in entries}
        held = [first - row for row in range(batch)]
        positions = np.array([[at if at < n else -1 for at in range(first)] for n in held], np.int32)
        wanted = np.array([[0, n - 1] for n in held], np.int32)
        given = {"tokens": tokens[:, :first], "positions": positions, "wanted": wanted}
        logits, *updated = session.run(None, given | cache)
        given = {
            "tokens": np.array([row[n : n + second] for row, n in zip(tokens, held, strict=True)]),
            "positions": np.array([np.arange(n, n + second) for n in held], np.int32),
            "wanted": np.tile(np.arange(second, dtype=np.int32), (batch, 1)),
        }
        more, *_ = session.run(None, given | dict(zip(cache, updated, strict=True)))
        for row, n in enumerate(held):
            expected = ours.logits(tokens[row].tolist())
            np.testing.assert_allclose(logits[row], expected[[0, n - 1]], atol=2e-4)
            np.testing.assert_allclose(more[row], expected[n : n + second], atol=2e-4)


def test_real_model(tmp_path, shared_data):
    checkpoint = import_stories(shared_data, tmp_path / "checkpoint")
    onnx_export.write(checkpoint, tmp_path / "out")
    with ProgramsRunner(tmp_path / "out", "onnx") as runner:
        print(f"stories260K: {check_logits_and_greedy(checkpoint, runner):.2g}")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert sizes["model.safetensors"] > 1_000_000
    assert max(sizes["model.onnx"], sizes["step.onnx"]) < 400_000
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert run_documented("ONNX, by hand", tmp_path / "out").startswith("Once upon a time, there was a little girl")
