import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import gptjax
from gptjax import config as config_lib
from gptjax import lock
from gptjax.checkpoint import store as store_lib
from gptjax.data import loader, source, writer
from gptjax.data import store as token_store
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.eval import perplexity
from gptjax.nn import transformer
from gptjax.train import hooks as hooks_lib
from gptjax.train import run as run_lib
from gptjax.train import workdir
from gptjax.train.health import DivergedError
from gptjax.train.metrics import read_metrics
from gptjax.train.run import run

REPOSITORY = Path(__file__).resolve().parents[2]


def losses(workdir):
    """What must not depend on interruptions: everything but clocks."""
    clocks = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if not k.endswith(clocks)} for line in read_metrics(workdir)]


def mesh(**sizes):
    return dict(data=1, fsdp=1, expert=1, context=1, tensor=1) | sizes


SIX_EXPERTS = dict(num_experts=6, num_experts_per_token=2, d_ff=8, activation="swiglu")


def files_under(directory):
    return {str(path): path.read_bytes() for path in sorted(Path(directory).rglob("*")) if path.is_file()}


def test_a_run_leaves_its_summary_metrics_config_and_checkpoints(run_config, tmp_path, data_dir):
    cfg = run_config(data__eval=str(data_dir / "eval"), train__eval_every=3, train__profile_steps=(2, 3))
    summary = run(cfg, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert json.loads((tmp_path / "config.json").read_text()) == config_lib.to_dict(cfg)
    assert (summary["outcome"], summary["step"], summary["name"]) == ("finished", 6, "tiny")
    assert summary["num_params"] == sum(x.size for x in jax.tree.leaves(transformer.abstract_params(cfg.model.build())))
    assert 0.8 * 6 * 8 * 16 < summary["train_tokens"] <= 6 * 8 * 16
    assert summary["wall_seconds"] > 0 and summary["peak_memory_bytes"] > 10**7 and summary["tokens_per_second"] > 0
    assert summary["eval/bits_per_byte"] == pytest.approx(summary["eval/loss"] / np.log(2), rel=0.1)  # bytes are tokens
    assert summary["eval_ema/loss"] != summary["eval/loss"]
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["3", "6"]
    steps = [line["step"] for line in read_metrics(tmp_path) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert list((tmp_path / "tensorboard").iterdir()) and list((tmp_path / "profile").rglob("*.xplane.pb"))
    meta = store_lib.read_meta(tmp_path / "ckpt" / "6")
    assert (meta.step, meta.run, meta.model) == (6, config_lib.to_dict(cfg), cfg.model.build())
    assets = store_lib.read_assets(tmp_path / "ckpt" / "6")
    assert tokenizer_lib.from_bytes(assets[tokenizer_lib.FILE_NAME]).fingerprint == meta.tokenizer

    before = files_under(tmp_path)
    assert run(cfg, tmp_path) == summary
    assert files_under(tmp_path) == before, "a finished run is left as it is"
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"step": 3}))  # killed before the last one was written
    again = run(cfg, tmp_path)
    assert (again["step"], again["train_tokens"]) == (6, summary["train_tokens"])
    clocks = {"wall_seconds", "peak_memory_bytes", "tokens_per_second", "eval/seconds", "eval_ema/seconds"}
    assert {k: again[k] for k in again.keys() - clocks} == {k: summary[k] for k in summary.keys() - clocks}
    assert again.keys() == summary.keys() and again["loss"] > 0


def test_the_best_checkpoints_and_every_nth_are_kept(run_config, tmp_path, data_dir):
    keep = dict(train__eval_every=1, train__checkpoint_every=1, train__keep_checkpoints=1)
    # At this rate the first losses are the best.
    cfg = run_config(
        data__eval=str(data_dir / "eval"), train__num_steps=12, optim__learning_rate=2.0, optim__ema_decay=0.0,
        train__keep_every=5, train__keep_best=2, **keep,
    )  # fmt: skip
    run(cfg, tmp_path)
    evaluated = {line["step"]: line["eval/loss"] for line in read_metrics(tmp_path) if "eval/loss" in line}
    best = sorted(evaluated, key=evaluated.__getitem__)[:2]
    assert 12 not in best
    assert store_lib.committed_steps(tmp_path / "ckpt") == sorted({*best, 5, 10, 12})
    for changes, message in (
        (dict(train__eval_every=0), "got eval_every=0, expected a number that divides checkpoint_every=1"),
        (dict(train__checkpoint_every=3, train__eval_every=2), "got eval_every=2, expected a number that divides"),
        (dict(train__keep_checkpoints=0), "keep_every=0, keep_best=2: keep_checkpoints=0 keeps all"),
    ):
        with pytest.raises(ValueError, match=message):
            run_config(**keep | changes | dict(train__keep_best=2))
    with pytest.raises(ValueError, match="train.eval_batches: 2 -> 1"):  # of other data the best would be others
        run(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, eval_batches=1)), tmp_path)
    with pytest.raises(ValueError, match="keep_best=2: there is nothing to evaluate"):
        run(run_config(**keep, train__keep_best=2), tmp_path / "blind")


def test_a_loss_that_is_no_number_is_no_score(run_config, tmp_path, data_dir, monkeypatch):
    monkeypatch.setattr(run_lib, "evaluator", lambda *_, **__: lambda *_, **__: {"loss": float("nan")})
    cfg = run_config(
        data__eval=str(data_dir / "eval"), train__eval_every=3, train__keep_best=1, train__keep_checkpoints=1
    )
    run(cfg, tmp_path)
    assert store_lib.read_meta(tmp_path / "ckpt" / "6").score is None
    assert store_lib.committed_steps(tmp_path / "ckpt") == [6]


def test_the_average_of_the_parameters_can_be_read(run_config, tmp_path, data_dir):
    run(run_config(data__eval=str(data_dir / "eval"), train__eval_batches=0), tmp_path)
    losses = {line["step"]: line for line in read_metrics(tmp_path) if "eval/loss" in line}[6]
    batches = loader.eval_batches(token_store.open_store(data_dir / "eval"), batch_size=8, seq_len=16)
    for weights, name in (("last", "eval/loss"), ("average", "eval_ema/loss")):
        model = gptjax.load(tmp_path, weights=weights)
        found = perplexity.evaluate(model.config, model.params, batches)
        assert found.loss == pytest.approx(losses[name], rel=1e-5)
    # Its momentum is an average too, of gradients.
    run(run_config(optim__name="adafactor", optim__ema_decay=0.0, train__num_steps=3), tmp_path / "none")
    with pytest.raises(ValueError, match="3: has no average of the parameters"):
        gptjax.load(tmp_path / "none", weights="average")


def test_sigterm_saves_and_the_resumed_run_is_the_same_to_the_last_bit(run_config, tmp_path, data_dir, monkeypatch):
    cfg = run_config(data__eval=str(data_dir / "eval"), train__checkpoint_every=100)
    whole = run(cfg, tmp_path / "whole")

    class Stop(hooks_lib.ProgressLine):
        def before_step(self, step):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(hooks_lib, "ProgressLine", Stop)
        stopped = run(cfg, tmp_path / "parts")
    assert (stopped["outcome"], stopped["step"]) == ("stopped", 4)
    assert store_lib.committed_steps(tmp_path / "parts" / "ckpt") == [4]
    assert losses(tmp_path / "parts")[:4] == losses(tmp_path / "whole")[:4]
    finished = run(cfg, tmp_path / "parts")
    get = [line for line in losses(tmp_path / "parts") if len(line) > 1]
    assert get == [line for line in losses(tmp_path / "whole") if len(line) > 1]
    saved = json.loads((tmp_path / "parts" / "ckpt" / "4" / "data" / "metadata").read_text())
    assert finished["train_tokens"] == whole["train_tokens"] > saved["train_tokens"] == stopped["train_tokens"]
    assert finished["wall_seconds"] > saved["wall_seconds"] > 0
    ends = [store_lib.restore_params(tmp_path / name / "ckpt" / "6")[1] for name in ("whole", "parts")]
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize(
    "changes",
    [{}, {"model__moe": SIX_EXPERTS, "optim__name": "muon", "mesh": mesh(data=2, fsdp=2, expert=2)}],
    ids=["one device", "experts and Muon on eight"],
)
def test_kill_9_and_resume_gives_the_same_losses_to_the_last_bit(run_config, tmp_path, changes):
    cfg = run_config(train__num_steps=9, **changes)
    killed = tmp_path / "killed"
    # The process kills itself as step 9 is about to start: past its checkpoint at 6, with the line of 7 written.
    script = """
import json, os, signal, sys
from gptjax import config
from gptjax.train import hooks, run
def before_step(self, step):
    if step == 9:
        os.kill(os.getpid(), signal.SIGKILL)
hooks.ProgressLine.before_step = before_step
run.run(config.from_dict(run.RunConfig, json.loads(sys.argv[1])), sys.argv[2])
"""
    command = [sys.executable, "-c", script, json.dumps(config_lib.to_dict(cfg)), str(killed)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert [line["step"] for line in losses(killed) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert store_lib.committed_steps(killed / "ckpt")[-1] in (3, 6)
    run(cfg, killed)
    run(cfg, tmp_path / "whole")
    assert [x for x in losses(killed) if "loss" in x] == [x for x in losses(tmp_path / "whole") if "loss" in x]


def test_only_free_keys_may_change_when_a_run_goes_on(run_config, tmp_path):
    run(run_config(), tmp_path)
    before = files_under(tmp_path)
    with pytest.raises(ValueError, match=r"another config \(old -> new\):\n  optim.learning_rate: 0.01 -> 0.02\n"):
        run(run_config(optim__learning_rate=0.02, train__num_steps=9), tmp_path)
    assert files_under(tmp_path) == before
    longer = run_config(train__num_steps=7, train__accumulate_steps=2, mesh=mesh(data=2, fsdp=2, tensor=2))
    summary = run(longer, tmp_path)
    assert (summary["step"], summary["outcome"]) == (7, "finished")
    assert json.loads((tmp_path / "config.json").read_text()) == config_lib.to_dict(longer)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="seed: 1 -> 2"):
        run(run_config(seed=2), tmp_path)


def test_another_mesh_and_accumulation_give_the_same_losses(run_config, tmp_path):
    one, many = run_config(), run_config(mesh=mesh(data=2, fsdp=2, tensor=2), train__accumulate_steps=2)
    run(one, tmp_path / "one")
    run(many, tmp_path / "many")
    for name in ("loss", "grad_norm", "param_norm"):
        values = [[x[name] for x in losses(tmp_path / d) if "loss" in x] for d in ("one", "many")]
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)


def test_masked_lm_runs(run_config, tmp_path):
    summary = run(run_config(train__objective="masked_lm", train__num_steps=1), tmp_path)
    assert np.isfinite(summary["loss"])
    assert not store_lib.read_meta(tmp_path / "ckpt" / "1").model.causal


def test_nan_from_step_one_saves_nothing_and_names_the_step(run_config, tmp_path, monkeypatch):
    real = transformer.init
    monkeypatch.setattr(transformer, "init", lambda *args: jax.tree.map(lambda x: x * np.nan, real(*args)))
    with pytest.raises(DivergedError, match="step 1: loss=nan"):
        run(run_config(train__checkpoint_every=1), tmp_path)
    assert store_lib.committed_steps(tmp_path / "ckpt") == []


def test_a_nan_later_leaves_the_good_checkpoints(run_config, tmp_path, monkeypatch):
    run(run_config(train__num_steps=3), tmp_path)
    good = files_under(tmp_path / "ckpt")
    real = run_lib._restore

    def poisoned(*args):
        state = real(*args)
        return state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))

    monkeypatch.setattr(run_lib, "_restore", poisoned)
    with pytest.raises(DivergedError, match="step 4: loss=nan, .*param_norm=nan, so the parameters are lost"):
        run(run_config(train__num_steps=40, train__checkpoint_every=0), tmp_path)
    assert files_under(tmp_path / "ckpt") == good


def test_a_rate_that_destroys_the_parameters_stops_at_step_one_and_can_be_put_right(run_config, tmp_path):
    with pytest.raises(DivergedError, match="step 1: .* so the parameters are lost"):
        run(run_config(optim__learning_rate=1e30), tmp_path)
    assert store_lib.committed_steps(tmp_path / "ckpt") == []
    assert run(run_config(), tmp_path)["outcome"] == "finished"


def test_a_workdir_without_a_checkpoint_takes_another_config(run_config, tmp_path):
    cfg = run_config()
    workdir.claim(tmp_path, cfg)
    other = run_config(optim__learning_rate=0.02)
    workdir.claim(tmp_path, other)
    assert json.loads((tmp_path / "config.json").read_text()) == config_lib.to_dict(other)


def test_a_run_that_lost_its_checkpoints_is_not_begun_again(run_config, tmp_path):
    run(run_config(), tmp_path)
    shutil.rmtree(tmp_path / "ckpt")
    before = files_under(tmp_path)
    with pytest.raises(ValueError, match="has the summary.json of a run, but no checkpoint in ckpt"):
        run(run_config(train__num_steps=9), tmp_path)
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("content", ["{", "{}", "[1]"])
def test_a_damaged_config_is_named(run_config, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json: (is not JSON|has no config of a pretraining run)"):
        workdir.claim(tmp_path, run_config())


def test_checkpoints_of_another_program_are_named(run_config, tmp_path):
    cfg = run_config()
    run(cfg, tmp_path)
    (tmp_path / "summary.json").write_text("{")  # made anew below, being derived
    data = tmp_path / "ckpt" / "6" / "data" / "metadata"
    right = data.read_text()
    data.write_text("{}")
    with pytest.raises(ValueError, match="ckpt/6: its data item lacks train_tokens, wall_seconds; restore"):
        run(cfg, tmp_path)
    data.write_text(right)
    assert run(cfg, tmp_path)["step"] == 6
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 6


def test_a_second_process_is_kept_out(run_config, tmp_path):
    run(run_config(train__num_steps=3), tmp_path)
    before = files_under(tmp_path)
    with lock.exclusive(tmp_path), pytest.raises(ValueError, match="another process is working there"):
        run(run_config(), tmp_path)
    assert files_under(tmp_path) == before


def test_an_unknown_scheme_and_a_file_in_the_way_are_named(run_config, tmp_path):
    with pytest.raises(ValueError, match="nfs://server/run: unknown scheme; expected a local path or gs://"):
        run(run_config(), "nfs://server/run")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: expected a directory"):
        run(run_config(), tmp_path / "file")


def test_held_out_tokens_of_another_tokenizer_are_refused(run_config, tmp_path):
    letters = tokenizer_lib.characters("abc ")
    documents = [source.Document("0", "a b c")]
    writer.write_store(tmp_path / "eval", documents, letters, description="letters")
    with pytest.raises(ValueError, match="eval: made with tokenizer"):
        run(run_config(data__eval=str(tmp_path / "eval")), tmp_path / "run")


def test_a_checkpoint_that_cannot_be_read_stops_the_run_and_is_left_alone(run_config, tmp_path):
    run(run_config(), tmp_path)
    (tmp_path / "ckpt" / "6" / "meta" / "metadata").write_text("{")
    before = files_under(tmp_path)
    with pytest.raises(ValueError, match=r"ckpt/6.* cannot be read"):
        run(run_config(train__num_steps=9), tmp_path)
    assert {k: v for k, v in files_under(tmp_path).items() if "/ckpt/" in k} == {
        k: v for k, v in before.items() if "/ckpt/" in k
    }
    assert losses(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__batch_size": 6, "mesh": mesh(data=4)}, "data.batch_size=6: expected a multiple of 4"),
        ({"train__accumulate_steps": 3}, "data.batch_size=8: expected a multiple of 3"),
        ({"mesh": mesh(data=16)}, "does not fit 8 device"),
        ({"model__moe": SIX_EXPERTS, "mesh": mesh(expert=4)}, "model.moe.num_experts=6: expected a multiple of 4"),
        ({"model__seq_len": 18, "mesh": mesh(context=8)}, "model.seq_len=18: expected a multiple of mesh.context=8"),
        ({"model__vocab_size": 512}, "the tokenizer .* has 260 pieces; expected 260, or 384"),
        ({"train__profile_steps": (3, 2)}, r"config.train: profile_steps=\(3, 2\): expected"),
        ({"data__tokenizer": "/nowhere"}, "/nowhere: no tokenizer there"),
        ({"data__train": {"/nowhere": 1.0}}, "/nowhere"),
        ({"data__eval": "/nowhere"}, "/nowhere: no token store there"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(run_config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(run_config(**changes), tmp_path / "workdir")
    assert not (tmp_path / "workdir").exists()


def test_a_vocabulary_rounded_up_to_128_is_accepted(run_config, tmp_path):
    assert run(run_config(model__vocab_size=384), tmp_path)["outcome"] == "finished"


def test_another_tokenizer_is_refused_on_resume(run_config, tmp_path):
    words = ["if else return def pass " * 20, "import os, sys; print(x + 1) " * 20, "(a, b) = [c] * 10 " * 20]
    data = tmp_path / "data"
    cfg = run_config(model__vocab_size=384, data__tokenizer=str(data), data__train={str(data): 1.0}, data__batch_size=8)
    for pieces in (tokenizer_lib.byte_level(), tokenizer_lib.train_bpe(words * 5, 300)):
        shutil.rmtree(data, ignore_errors=True)
        documents = (source.Document(str(i), text) for i, text in enumerate(words))
        writer.write_store(data, documents, pieces, description="words")
        if pieces.kind == "bytes":
            run(cfg, tmp_path / "run")
    with pytest.raises(ValueError, match=r"ckpt/6: its tokens are those of tokenizer .* started with"):
        run(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, num_steps=9)), tmp_path / "run")
