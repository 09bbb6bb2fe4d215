"""`gptjax.load` and the entry points that stand on it, with a checkpoint written by the store."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import gptjax
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.nn import transformer
from gptjax.parallel import mesh as mesh_lib
from tests.tiny import TINY, random_params

CFG = dataclasses.replace(TINY, vocab_size=384, seq_len=64, num_heads=2).build()
REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER = tokenizer_lib.byte_level()


def save(path, step, *, assets, fingerprint=TOKENIZER.fingerprint):
    store = CheckpointStore(path, keep_last=0)
    meta = meta_lib.make(CFG, step=step, tokenizer=fingerprint)
    store.save(step, meta=meta, params=random_params(CFG, seed=step), assets=assets)
    store.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    for step in (5, 10):
        save(path, step, assets={"tokenizer.model": TOKENIZER.to_bytes()})
    return path


@pytest.fixture(scope="module")
def model(workdir):
    return gptjax.load(workdir)


def test_workdir_is_its_newest_checkpoint_and_a_checkpoint_is_itself(workdir, model):
    assert model.config == CFG and model.meta.step == 10 and model.tokenizer.fingerprint == TOKENIZER.fingerprint
    jax.tree.map(np.testing.assert_array_equal, model.params, random_params(CFG, seed=10))
    older = gptjax.load(workdir / "ckpt" / "5")
    assert older.meta.step == 5
    jax.tree.map(np.testing.assert_array_equal, older.params, random_params(CFG, seed=5))


def test_logits_are_those_of_the_transformer(model):
    tokens = np.arange(24).reshape(2, 12) % 256
    got = model.logits(tokens)
    params = random_params(CFG, seed=10)
    hidden = transformer.forward(CFG, params, tokens).hidden_BTD
    assert got.shape == (2, 12, 384) and got.dtype == np.float32
    np.testing.assert_allclose(got, transformer.logits(CFG, params, hidden), atol=1e-5)
    np.testing.assert_allclose(model.logits(tokens.tolist()), got)


def test_on_a_mesh_parameters_are_read_where_the_rules_put_them(workdir, model):
    tokens = np.arange(24).reshape(2, 12)
    with mesh_lib.use(mesh_lib.all_devices("fsdp")):
        spread = gptjax.load(workdir)
        table = spread.params["embed"]["tokens"]
        assert table.sharding.shard_shape(table.shape) == (384, 16 // 8)
        logits = np.asarray(spread.logits(tokens))
    np.testing.assert_allclose(logits, model.logits(tokens), atol=1e-5)


@pytest.mark.parametrize("tokens", [[1, 2], [[]], [[1.5]], [[-1]], [[384]]])
def test_logits_of_what_are_no_tokens(model, tokens):
    with pytest.raises(ValueError, match="tokens"):
        model.logits(tokens)


def test_generate_takes_a_prompt_or_a_list_and_stream_joins_to_the_same(model):
    prompts = ["def f():", "import os\n\nclass A"]
    texts = model.generate(prompts, max_new_tokens=24)
    assert isinstance(texts, list) and len(texts) == 2
    for prompt, text in zip(prompts, texts, strict=True):
        assert model.generate(prompt, max_new_tokens=24) == text
        assert "".join(model.stream(prompt, max_new_tokens=24)) == text
    drawn = [model.generate(prompts[0], max_new_tokens=24, temperature=2.0, seed=seed) for seed in (1, 2)]
    assert drawn[0] != drawn[1]


def test_only_tokens_that_the_tokenizer_knows_are_generated_after_its_start_token(model):
    (completion,) = model.complete(["a"], max_new_tokens=60, temperature=50.0)
    assert max(completion.tokens) < TOKENIZER.vocab_size < CFG.vocab_size
    start = [TOKENIZER.bos_id, ord("a")]
    greedy = model.complete(["a", start], max_new_tokens=8)
    assert greedy[0].tokens == greedy[1].tokens


def test_unknown_option_and_bad_values_are_named(model):
    with pytest.raises(TypeError, match="temprature"):
        model.generate("a", temprature=1.0)
    with pytest.raises(ValueError, match="top_p"):
        model.generate("a", top_p=7.0)


def test_checkpoint_problems_are_named(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        gptjax.load(tmp_path / "nothing")
    save(tmp_path / "bare", 1, assets={})
    with pytest.raises(ValueError, match="tokenizer.model is missing"):
        gptjax.load(tmp_path / "bare")
    save(tmp_path / "other", 1, assets={"tokenizer.model": tokenizer_lib.characters("abc").to_bytes()})
    with pytest.raises(ValueError, match="fingerprint"):
        gptjax.load(tmp_path / "other")
    save(tmp_path / "none", 1, assets={}, fingerprint="")
    model = gptjax.load(tmp_path / "none")
    assert len(model.complete([[1, 2]], max_new_tokens=3)[0].tokens) == 3
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate("text")


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, gptjax; assert 'jax' not in sys.modules and 'load' in dir(gptjax); gptjax.load"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nonsense"):
        gptjax.nonsense  # noqa: B018


def run(module, *args, stdin=""):
    command = [sys.executable, "-m", f"experiments.{module}", *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=REPOSITORY)


def test_evaluate_prints_and_writes_what_it_found(workdir, tmp_path):
    text = "The quick brown fox. " * 40
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "o.json"
    result = run("evaluate", f"--ckpt={workdir}", f"--data={tmp_path}/text.txt", f"--out={out}")
    assert result.returncode == 0, result.stderr
    summary = json.loads(out.read_text())
    assert summary["bytes"] == len(text) and summary["step"] == 10
    assert summary["tokens"] == len(text) + 1  # the end token is scored too
    assert summary["bits_per_byte"]["gzip"] < 1 < summary["bits_per_byte"]["model"]
    assert "bits per byte, xz" in result.stdout


def test_generate_streams_standard_input_and_batches_several_prompts(workdir, model, tmp_path):
    out = tmp_path / "o.json"
    want = model.generate("def f(", max_new_tokens=12)
    result = run("generate", f"--ckpt={workdir}", "--max_new_tokens=12", f"--out={out}", stdin="def f(")
    assert result.stdout == "def f(" + want + "\n", result.stderr
    assert json.loads(out.read_text())["samples"] == [{"prompt": "def f(", "completion": want}]
    result = run("generate", f"--ckpt={workdir}", "--max_new_tokens=12", "--prompt=def f(", "--prompt=x")
    assert "--- 0\ndef f(" + want in result.stdout and "--- 1\nx" in result.stdout


def test_with_a_workdir_the_summary_goes_there_but_never_into_a_checkpoint(workdir):
    result = run("generate", f"--workdir={workdir}", "--prompt=def f(", "--max_new_tokens=3")
    assert result.returncode == 0, result.stderr
    summary = json.loads((workdir / "generate" / "summary.json").read_text())
    assert (summary["checkpoint"], summary["step"], summary["weights"]) == (str(workdir), 10, "last")
    result = run("generate", f"--workdir={workdir}/ckpt/5", "--prompt=x")
    assert result.returncode == 2 and "is a checkpoint, in which nothing is written; use --ckpt" in result.stderr


def test_one_prompt_is_one_prompt(model):
    (completion,) = model.complete("def f(", max_new_tokens=3)
    assert completion.text == model.generate("def f(", max_new_tokens=3)
    assert repr(model).startswith("<gptjax.Model: ") and repr(model).endswith("bytes tokenizer, step 10>")


def test_weights_are_the_last_or_their_average(workdir):
    with pytest.raises(ValueError, match="weights='best': expected 'last' or 'average'"):
        gptjax.load(workdir, weights="best")
    with pytest.raises(ValueError, match="10: has no average of the parameters"):
        gptjax.load(workdir, weights="average")


def test_by_default_there_are_as_many_new_tokens_as_fit(model):
    (completion,) = model.complete([[1] * 60])
    assert (len(completion.tokens), completion.finish_reason) == (5, "length")
    assert "".join(model.stream("x")) == model.generate("x")
    with pytest.raises(ValueError, match="a prompt of 60 tokens . max_new_tokens=6 exceed .* at most 5 tokens"):
        model.complete([[1] * 60], max_new_tokens=6)


@pytest.mark.parametrize("module,extra", [("generate", ["--prompt=x"]), ("evaluate", ["--data=nowhere.txt"])])
def test_a_missing_checkpoint_is_one_line_and_status_two(tmp_path, module, extra):
    result = run(module, f"--ckpt={tmp_path}/gone", *extra)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "gone" in line and "Traceback" not in result.stderr
