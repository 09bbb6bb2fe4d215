"""Distillation as a run: what it saves and leaves, that it resumes, and what it refuses."""

import io
import json
import shutil

import jax
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import committed_steps, read_meta, restore_params
from gptjax.compress import distill, matching, teacher_cache
from gptjax.nn import transformer
from gptjax.train.metrics import read_metrics
from gptjax.train.run import run
from tests.train import test_multihost as two_hosts
from tests.train.conftest import data_dir, run_config  # noqa: F401  # fixtures

TEACHER = dict(model__d_model=24, model__num_layers=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, data_dir):  # noqa: F811
    path = tmp_path_factory.mktemp("teacher")
    run(run_config.__wrapped__(data_dir)(**TEACHER), path)
    return path


@pytest.fixture
def make(run_config, teacher):  # noqa: F811
    def make(changes=None, **distill_keys):
        values = config_lib.to_dict(run_config(**(changes or {})))
        values["distill"] = dict(teacher=str(teacher)) | distill_keys
        return config_lib.from_dict(distill.DistillRun, values)

    return make


def teach(cfg, path):
    return run(cfg, path, task_fn=distill.task)


def figures(path, name="loss"):
    return [(line["step"], line[name], line["distill_loss"]) for line in read_metrics(path) if name in line]


def test_a_student_is_saved_as_any_model_with_its_lineage(make, teacher, tmp_path, data_dir):  # noqa: F811
    cfg = make({"data__eval": str(data_dir / "eval")}, temperature=2.0, hidden_weight=0.1)
    summary = teach(cfg, tmp_path)
    assert summary["outcome"] == "finished" and summary["eval/bits_per_byte"] > 0
    assert all(summary[name] > 0 for name in ("loss", "distill_loss", "hidden_loss"))
    meta, params = restore_params(tmp_path)
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        np.shape, dict(transformer.abstract_params(cfg.model.build()))
    )
    assert meta.run == config_lib.to_dict(cfg)
    (stage,) = meta.lineage
    taught = read_meta(teacher / "ckpt" / "6")
    assert stage["stage"] == "distill" and stage["teacher"] == meta_lib.params_hash(taught.model, taught.checksums)
    assert (stage["loss"], stage["temperature"], stage["weight"]) == ("forward_kl", 2.0, 0.9)
    files = [p for p in (tmp_path / "ckpt" / "6").rglob("*") if matching.NAME in str(p)]
    assert all("params" not in p.relative_to(tmp_path / "ckpt" / "6").parts[:1] for p in files)
    (first, *_), (*_, last) = (figures(tmp_path),) * 2
    assert last[2] < first[2], "the student comes nearer to its teacher"


# Between steps 3 and 6 rows are used that were written at step 2.
OWN = dict(on_policy=0.5, on_policy_steps=2, on_policy_prompt=3, attention_weight=0.1)


@pytest.mark.parametrize("keys", [dict(hidden_weight=0.1), dict(top_k=8, cache="cache"), OWN])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(make, tmp_path, keys):
    if "cache" in keys:
        keys = keys | {"cache": str(tmp_path / "cache")}
    teach(make(**keys), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "ckpt" / "6")
    (tmp_path / "cut" / "summary.json").unlink()
    teach(make(**keys), tmp_path / "cut")
    assert committed_steps(tmp_path / "cut" / "ckpt") == [3, 6]
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
    whole, cut = (restore_params(tmp_path / name)[1] for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


def test_meshes_accumulation_and_the_cache_change_nothing(make, tmp_path):
    cache = str(tmp_path / "cache")
    mesh = dict(data=2, fsdp=2, expert=1, context=1, tensor=2)
    teach(make(top_k=8), tmp_path / "one")
    teach(make({"mesh": mesh, "train__accumulate_steps": 2}, top_k=8), tmp_path / "many")
    teach(make(top_k=8, cache=cache), tmp_path / "kept")
    teach(make({"mesh": mesh, "train__accumulate_steps": 2}, top_k=8, cache=cache), tmp_path / "kept_many")
    for name in ("many", "kept", "kept_many"):
        np.testing.assert_allclose(figures(tmp_path / name), figures(tmp_path / "one"), rtol=1e-4)


def test_a_cache_is_filled_once_and_goes_on(make, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "ROWS_PER_FILE", 12)  # which 8 rows at a time do not divide
    cache, loads = tmp_path / "cache", []
    real = distill.Teacher.load
    monkeypatch.setattr(distill.Teacher, "load", lambda self: loads.append(1) or real(self))
    teach(make(top_k=4, cache=str(cache)), tmp_path / "a")
    files = sorted(cache.glob("rows-*.npy"))
    assert len(files) == 4 and len(loads) == 1
    before = {path: path.read_bytes() for path in files}
    teach(make(top_k=4, cache=str(cache), loss="reverse_kl"), tmp_path / "b")
    assert len(loads) == 1, "another student of the same rows needs no teacher"
    files[2].unlink()
    (cache / "rows-000002.partial").write_bytes(b"cut")
    teach(make({"data__batch_size": 16, "train__num_steps": 3}, top_k=4, cache=str(cache)), tmp_path / "c")
    assert len(loads) == 2 and not list(cache.glob("*.partial"))
    assert all(path.read_bytes() == before[path] for path in files if path != files[2])
    again, first = np.load(files[2]), np.load(io.BytesIO(before[files[2]]))
    np.testing.assert_array_equal(again["ids"], first["ids"])
    np.testing.assert_allclose(again["log_probs"], first["log_probs"], atol=1e-5)  # other batches, other rounding
    files[1].write_bytes(before[files[1]][:-40])
    with pytest.raises(ValueError, match="rows-000001.npy: cannot be read .* remove it, and it is computed again"):
        teach(make(top_k=4, cache=str(cache)), tmp_path / "d")


def test_a_cache_of_something_else_is_refused(make, tmp_path):
    cache = str(tmp_path / "cache")
    teach(make({"train__num_steps": 1}, top_k=4, cache=cache), tmp_path / "a")
    for changes, keys, name in (
        ({"seed": 2}, dict(top_k=4), "order"),
        ({}, dict(top_k=5), "top_k"),
        ({}, dict(top_k=4, temperature=2.0), "temperature"),
        ({}, dict(top_k=4, teacher=str(tmp_path / "a")), "teacher"),
    ):
        with pytest.raises(ValueError, match=f"is the cache of another {name} .*choose another distill.cache"):
            teach(make(changes, cache=cache, **keys), tmp_path / "b")
    (tmp_path / "cache" / "key.json").unlink()
    with pytest.raises(ValueError, match=r"has rows but no key\.json"):
        teach(make(top_k=4, cache=cache), tmp_path / "b")


def test_a_teacher_that_does_not_fit_is_refused(make, tmp_path, teacher):
    for changes, keys, message in (
        ({"model__seq_len": 32}, {}, "reads at most 16 tokens"),
        ({}, {"teacher": ""}, "distill.teacher: missing"),
        ({}, {"teacher": str(tmp_path / "none")}, "no checkpoint there"),
        ({"train__objective": "masked_lm"}, {}, "distillation needs 'next_token'"),
    ):
        with pytest.raises(ValueError, match=message):
            teach(make(changes, **keys), tmp_path / "b")
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    file = other / "ckpt" / "6" / "meta" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer": "f" * 64}))
    with pytest.raises(ValueError, match="its tokens are of tokenizer ffffffffffff"):
        teach(make(teacher=str(other)), tmp_path / "b")
    assert not (tmp_path / "b" / "ckpt").exists()


def test_a_run_goes_on_with_its_teacher_wherever_that_moved_but_with_no_other(make, tmp_path, teacher):
    teach(make({"train__num_steps": 3}), tmp_path / "run")
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    assert teach(make(teacher=str(moved)), tmp_path / "run")["step"] == 6
    with pytest.raises(ValueError, match="started with another task .*teacher: "):
        teach(make({"train__num_steps": 9}, teacher=str(teacher / "ckpt" / "3")), tmp_path / "run")
    with pytest.raises(ValueError, match="distill.loss: 'forward_kl' -> 'jsd'"):
        teach(make({"train__num_steps": 9}, loss="jsd"), tmp_path / "run")


def test_a_student_may_start_from_a_checkpoint(make, tmp_path, teacher):
    teach(make({"train__num_steps": 2}), tmp_path / "first")
    again = make({"train__init_from": str(tmp_path / "first")}, hidden_weight=0.1)
    teach(again, tmp_path / "second")
    stages = read_meta(tmp_path / "second" / "ckpt" / "6").lineage
    assert [stage["stage"] for stage in stages] == ["distill", "distill"]
    first = read_meta(tmp_path / "first" / "ckpt" / "2")
    assert stages[1]["init_step"] == 2
    assert stages[1]["init_params_sha256"] == meta_lib.params_hash(first.model, first.checksums)


CHILD = two_hosts.CHILD.replace(
    "import RunConfig, run", "import run\nfrom gptjax.compress.distill import DistillRun, task"
)
CHILD = CHILD.replace("RunConfig, json", "DistillRun, json").replace("sys.argv[2])", "sys.argv[2], task_fn=task)")


@pytest.mark.parametrize("cached", [False, True])
def test_two_hosts_compute_what_one_does(make, tmp_path, cached):
    keys = dict(top_k=8, cache=str(tmp_path / "cache")) if cached else dict(top_k=8) | OWN
    # Both hosts hold parts of every row.
    cfg = make({"mesh": dict(data=1, fsdp=1, expert=1, context=4, tensor=2), "train__num_steps": 3}, **keys)
    if cached:
        with pytest.raises(AssertionError, match="several hosts cannot fill it; fill it from one"):
            two_hosts.run_on_two_hosts(cfg, tmp_path / "early", child=CHILD)
    teach(cfg, tmp_path / "one")
    two_hosts.run_on_two_hosts(cfg, tmp_path / "two", child=CHILD)
    np.testing.assert_allclose(figures(tmp_path / "two"), figures(tmp_path / "one"), rtol=1e-5)
