"""In, out, killed in between, damaged on the way, and judged: the commands on a model made here."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import gptjax
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore
from gptjax.interop import certificate, exporting, hf, importing, publish, stream
from gptjax.interop.exporting import Options
from gptjax.interop.judging import Check
from gptjax.interop.publish import RejectedError
from gptjax.interop.runner import GptjaxRunner
from gptjax.nn import transformer
from gptjax.nn.config import LayerGroup, MoEConfig
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat
from gptjax.nn.norm import Norm
from tests.interop.gguf import models as gguf_models
from tests.tiny import TINY, random_params

VALUES = Check(proof="values")
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def saved(tmp_path, spec=TINY, *, name="run"):
    """A checkpoint as training saves it, and its parameters."""
    model = spec.build()
    params = random_params(model)
    with CheckpointStore(tmp_path / name) as store:
        store.save(3, meta=meta_lib.make(model), params=jax.tree.map(np.asarray, params))
    return tmp_path / name, params


def lost_logit(note):
    """How far logits are off the model as it is."""
    return float(re.search(r"differ by up to ([^,\s]+)", note)[1])


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_out_and_in_again_is_the_same_to_the_bit(tmp_path):
    run, params = saved(tmp_path)
    found = exporting.export(run, tmp_path / "hf", format="hf", options=Options(max_shard_bytes=4000))
    assert found.accepted and (tmp_path / "hf" / "model.safetensors.index.json").exists()
    back = importing.import_model(tmp_path / "hf", tmp_path / "back")
    assert back.accepted and "read back equal" in back.values
    loaded = gptjax.load(tmp_path / "back")
    assert same(loaded.params, params)
    assert loaded.config.blocks == TINY.build().blocks
    assert loaded.meta.lineage[0]["family"] == "llama"
    assert same(gptjax.load(tmp_path / "hf").params, params)
    written = json.loads((tmp_path / "back" / "certificate.json").read_text())
    assert written["accepted"] and set(written["source"]["sha256"]) >= {"config.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "run"]


def test_a_cast_is_within_the_tolerance_of_its_dtype(tmp_path):
    run, params = saved(tmp_path)
    found = exporting.export(run, tmp_path / "hf", format="hf", options=Options(dtype=np.dtype("bfloat16")))
    assert found.accepted
    assert max(row.max_logit_difference for row in found.comparisons) < 1e-5  # beside the values as cast
    (note,) = found.notes
    assert note.startswith("values are rounded to bfloat16") and lost_logit(note) > 1e-4
    loaded = gptjax.load(tmp_path / "hf").params
    assert same(loaded, jax.tree.map(lambda x: x.astype("bfloat16"), params))


def test_another_model_is_rejected_and_says_where_it_differs(tmp_path, monkeypatch):
    run, _ = saved(tmp_path)
    honest = hf.write

    def forged(checkpoint, folder, **options):
        family = honest(checkpoint, folder, **options)
        tensor = hf.SafetensorsFolder(folder)["model.layers.1.self_attn.k_proj.weight"]
        with tensor.file.open("r+b") as file:  # heads swapped: every sum over the file is as before
            value = tensor.read()
            file.seek(tensor.offset)
            file.write(np.ascontiguousarray(value[::-1]).tobytes())
        return family

    monkeypatch.setattr(hf, "write", forged)
    with pytest.raises(RejectedError, match=r"layers\.1\.self_attn\.k_proj\.weight: what was written is not"):
        exporting.export(run, tmp_path / "unrun", format="hf", check=VALUES)
    with pytest.raises(RejectedError, match="layer 1") as error:
        exporting.export(run, tmp_path / "hf", format="hf")
    assert not error.value.certificate.accepted
    assert not (tmp_path / "hf").exists() and (tmp_path / "hf.rejected" / "certificate.json").exists()
    assert not json.loads((tmp_path / "hf.rejected" / "certificate.json").read_text())["accepted"]
    assert not (tmp_path / "hf.rejected" / "journal.jsonl").exists()
    with pytest.raises(ValueError, match="hf.rejected: an earlier attempt.* is not overwritten"):
        exporting.export(run, tmp_path / "hf", format="hf")


def test_of_a_mixture_the_mean_is_judged(tmp_path, monkeypatch):
    """Two experts of one layer swapped are far outside of what rounding to bfloat16 may do to the choice of experts."""
    gguf_models.saved(gguf_models.CONFIGS["mixtral"], tmp_path / "ckpt")
    options = Options(dtype=np.dtype("bfloat16"))
    honest = hf.write
    found = exporting.export(tmp_path / "ckpt", tmp_path / "good", format="hf", options=options)
    assert found.accepted and found.tolerance == certificate.tolerance(
        "float32", hf.open_source(tmp_path / "good").model
    )

    def forged(checkpoint, folder, **options):
        family = honest(checkpoint, folder, **options)
        tensors = hf.SafetensorsFolder(folder)
        first, second = (tensors[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in (0, 1))
        contents = first.read(), second.read()
        for tensor, value in zip((second, first), contents, strict=True):
            with tensor.file.open("r+b") as file:
                file.seek(tensor.offset)
                file.write(np.ascontiguousarray(value).tobytes())
        return family

    monkeypatch.setattr(hf, "write", forged)
    with pytest.raises(RejectedError, match="bfloat16: [1-9.]+ nats off the model"):
        exporting.export(tmp_path / "ckpt", tmp_path / "bad", format="hf", options=options)


def test_what_training_saved_and_lost_is_not_exported(tmp_path):
    run, _ = saved(tmp_path)
    for path in (run / "ckpt" / "3" / "params").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="ckpt/3"):
        exporting.export(run, tmp_path / "hf", format="hf")
    assert not (tmp_path / "hf").exists()


def test_nothing_is_overwritten(tmp_path):
    run, _ = saved(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        exporting.export(run, tmp_path / "hf", format="hf")
    assert (tmp_path / "hf" / "mine.txt").read_text() == "mine"


def test_a_half_done_conversion_of_something_else_is_not_taken_up(tmp_path):
    run, _ = saved(tmp_path)
    exporting.export(run, tmp_path / "hf", format="hf")
    (tmp_path / "back.partial").mkdir()
    stream.Journal(tmp_path / "back.partial" / "journal.jsonl", job={"source": "another"})
    with pytest.raises(ValueError, match="interrupted, of another source"):
        importing.import_model(tmp_path / "hf", tmp_path / "back")


def test_nor_one_to_another_format(tmp_path):
    run, _ = saved(tmp_path)
    with publish.directory(tmp_path / "out", job={"to": "onnx"}) as partial:
        (partial / "model.onnx").write_bytes(b"half")
    with pytest.raises(ValueError, match="interrupted, of another source or with other settings"):
        exporting.export(run, tmp_path / "out", format="hf")
    assert (tmp_path / "out.partial" / "model.onnx").read_bytes() == b"half"


def test_a_dtype_that_no_parameter_has_is_an_error_before_the_work(tmp_path):
    run, _ = saved(tmp_path)
    with pytest.raises(ValueError, match="dtype=float64: expected float32, bfloat16 or float16"):
        exporting.export(run, tmp_path / "hf", format="hf", options=Options(dtype=np.dtype("float64")))
    with pytest.raises(ValueError, match="dtype=float64: expected float32, bfloat16 or float16"):
        importing.import_model(tmp_path / "hf", tmp_path / "back", dtype=np.dtype("float64"))


def test_a_source_that_changes_meanwhile_is_not_accepted(tmp_path, monkeypatch):
    run, _ = saved(tmp_path)
    exporting.export(run, tmp_path / "hf", format="hf", check=VALUES)
    honest = importing._prove

    def slow(*arguments, **options):
        os.utime(tmp_path / "hf" / "model.safetensors", ns=(0, 0))
        return honest(*arguments, **options)

    monkeypatch.setattr(importing, "_prove", slow)
    with pytest.raises(ValueError, match="was changed while it was read"):
        importing.import_model(tmp_path / "hf", tmp_path / "back", check=VALUES)
    assert not (tmp_path / "back").exists()
    with pytest.raises(ValueError, match="of another source"):
        importing.import_model(tmp_path / "hf", tmp_path / "back", check=VALUES)


@pytest.mark.parametrize("convert", ["import", "export"])
def test_killed_in_the_proof_it_goes_on_with_the_proof(tmp_path, monkeypatch, convert):
    run, params = saved(tmp_path)
    exporting.export(run, tmp_path / "hf", format="hf", check=VALUES)

    def start():
        if convert == "import":
            return importing.import_model(tmp_path / "hf", tmp_path / "new", check=VALUES)
        return exporting.export(run, tmp_path / "new", format="hf", check=VALUES)

    def killed(*arguments):
        raise KeyboardInterrupt

    def again(*arguments):
        raise AssertionError("written again")

    with monkeypatch.context() as patch:
        patch.setattr(publish, "settle", killed)
        with pytest.raises(KeyboardInterrupt):
            start()
    (tmp_path / "new.partial" / "certificate.json").write_text("{}")
    monkeypatch.setattr(stream.Journal, "add", again)
    found = start()
    assert found.accepted and same(gptjax.load(tmp_path / "new").params, params)
    left = {path.name for path in (tmp_path / "new").iterdir()}
    assert not left & (publish.WORK_FILES - {"certificate.json"})
    assert "certificate.json" not in found.target.get("sha256", {})


def test_an_error_or_an_interrupt_leaves_the_rest_undone():
    done = []

    def work(task):
        done.append(task.name)
        raise KeyboardInterrupt if task.name == "0" else AssertionError

    tasks = [stream.Tensor(str(number), (1,), np.dtype(np.float32)) for number in range(100)]
    with pytest.raises(KeyboardInterrupt):
        stream.run(tasks, work, None, label="test", num_threads=1)
    assert done == ["0"]


def test_an_inexpressible_model_names_what_cannot_be_said(tmp_path):
    run, _ = saved(tmp_path, dataclasses.replace(TINY, attn_softcap=30.0))
    with pytest.raises(ValueError, match="softcap"):
        exporting.export(run, tmp_path / "hf", format="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


_SLOW = """
import time
from gptjax.interop import stream
honest = stream.Journal.add
def slow(self, name, note):
    honest(self, name, note)
    print("done", name, flush=True)
    time.sleep(0.2)
stream.Journal.add = slow
import runpy, sys
sys.argv = ["import_model", *sys.argv[1:]]
runpy.run_module("experiments.import_model", run_name="__main__")
"""


def test_killed_and_started_again_it_goes_on(tmp_path):
    run, params = saved(tmp_path)
    exporting.export(run, tmp_path / "hf", format="hf")
    arguments = [f"--src={tmp_path / 'hf'}", f"--dst={tmp_path / 'back'}", "--proof=values", "--num_threads=1"]
    with subprocess.Popen(
        [sys.executable, "-c", _SLOW, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(5):
            assert process.stdout.readline().startswith("done")
        os.kill(process.pid, signal.SIGKILL)
    journal = tmp_path / "back.partial" / "journal.jsonl"
    kept = len(journal.read_text().splitlines()) - 1
    assert kept >= 5 and not (tmp_path / "back").exists()
    with journal.open("a") as file:
        file.write('{"name": "model.norm.wei')  # as a kill in the middle of a line leaves it
    again = subprocess.run(
        [sys.executable, "-c", _SLOW, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    done = [line for line in again.stdout.splitlines() if line.startswith("done")]
    total = json.loads((tmp_path / "back" / "certificate.json").read_text())["values"].split()[2]
    assert len(done) == int(total) - kept
    assert same(gptjax.load(tmp_path / "back").params, params)


@pytest.mark.parametrize("shared", [False, True])
def test_every_layer_of_groups_is_seen(shared):
    block = TINY.build().blocks[0]
    windowed = dataclasses.replace(block, attention=dataclasses.replace(block.attention, window=3))
    groups = (
        LayerGroup(pattern=(block, windowed), repeats=2, shared=shared),
        LayerGroup(pattern=(windowed,), repeats=1),
    )
    model = dataclasses.replace(TINY.build(), groups=groups)
    params, tokens = random_params(model), [3, 1, 4, 1, 5, 9]
    found = GptjaxRunner(model, params, None).hidden(tokens)
    assert len(found) == model.num_layers + 1
    last = Norm(model.final_norm).apply({"params": params["final_norm"]}, found[-1])
    wanted = transformer.forward(model, params, np.array([tokens], np.int32)).hidden_BTD[0]
    np.testing.assert_allclose(last, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--src=nowhere", "--dst=x"], "no such file"),
        (["--src=.", "--dst=x"], "no model of a known format"),
        (["--dst=x"], "missing: --src"),
    ],
)
def test_the_command_ends_with_one_line(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.import_model", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_a_mixture_trained_with_a_capacity_goes_out_as_it_decodes(tmp_path):
    moe = MoEConfig(num_experts=4, num_experts_per_token=2, d_ff=16, activation="swiglu", capacity_factor=0.5)
    run, params = saved(tmp_path, dataclasses.replace(TINY, moe=moe))
    found = exporting.export(run, tmp_path / "hf", format="hf")
    assert found.accepted and json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "mixtral"
    assert same(gptjax.load(tmp_path / "hf").params, params)


def test_a_workdir_with_the_config_of_its_run_is_still_ours(tmp_path):
    run, params = saved(tmp_path)
    (run / "config.json").write_text(json.dumps({"name": "demo", "model": {"d_model": 16}}))
    assert same(gptjax.load(run).params, params)


def test_what_llama_cpp_runs_otherwise_is_a_note_and_no_fault_of_the_conversion(tmp_path):
    pytest.importorskip("xllamacpp")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}
    config = gguf_models.CONFIGS["gpt_oss"] | {"rope_scaling": yarn, "rope_theta": 150_000.0}
    gguf_models.saved(config, tmp_path / "ckpt")
    found = exporting.export(tmp_path / "ckpt", tmp_path / "out", format="gguf", options=Options(quantization="f32"))
    assert max(row.max_logit_difference for row in found.comparisons) < 3e-4
    (note,) = found.notes
    assert "rounds the range of YaRN" in note and lost_logit(note) > 1e-3
    back = importing.import_model(tmp_path / "out" / "model.gguf", tmp_path / "back")
    assert max(row.max_logit_difference for row in back.comparisons) < 3e-4 and back.notes == found.notes


def test_kernels_in_few_bits_are_to_transformers_the_floats_that_they_stand_for(tmp_path):
    pytest.importorskip("transformers", reason="the peer's own implementation is not installed")
    rule = KernelRule(pattern="mlp", weights=WeightFormat(dtype="fp8_e4m3"), activations="int8")
    model = dataclasses.replace(TINY.build(), quant=QuantConfig(rules=(rule,)))
    with CheckpointStore(tmp_path / "run") as store:
        params = transformer.store(model, random_params(TINY.build()))
        store.save(0, meta=meta_lib.make(model, lineage=({"stage": "quantize"},)), params=params)
    found = exporting.export(tmp_path / "run", tmp_path / "out", format="hf")
    assert found.accepted and "3 of them as the floats that few bits stand for" in found.values.replace("6 of", "3 of")
    assert max(row.max_logit_difference for row in found.comparisons) < 1e-3
    (note,) = found.notes
    assert "inputs are rounded as the checkpoint says here alone" in note and lost_logit(note) > 1e-3
    assert "1. quantize" in (tmp_path / "out" / "README.md").read_text()
