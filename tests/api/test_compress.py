"""Pruning, quantising and distilling in one call each, and what `evaluate` says of the result."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import gptjax
from gptjax import GPT4LMHeadModel, GPT4Tokenizer, Trainer, TrainingArguments
from gptjax.checkpoint.store import read_meta
from gptjax.compress import prune, saving
from gptjax.nn import quantized, transformer
from tests.tiny import TINY, random_params

SMALL = dataclasses.replace(TINY, vocab_size=260, seq_len=32)
TEXT = ["the quick brown fox jumps over the lazy dog. " * 4, "pack my box with five dozen liquor jugs. " * 4]


@pytest.fixture(scope="module")
def tokenizer():
    return GPT4Tokenizer.from_pretrained("gpt4")


@pytest.fixture(scope="module")
def model(tokenizer):
    cfg = SMALL.build()
    return GPT4LMHeadModel(cfg, random_params(cfg, scale=0.3), tokenizer=tokenizer)


def zeros(model):
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
               if prune.why_left(jax.tree_util.keystr(path, simple=True, separator="/")) is None]  # fmt: skip
    return sum(int((leaf == 0).sum()) for leaf in kernels) / sum(leaf.size for leaf in kernels)


def by_hand(model):
    """Loss, perplexity and accuracy from whole logits, row by row of the context's length."""
    nll, hits = [], []
    for text in TEXT:
        ids = model.tokenizer.inner.encode_prompt(text)
        for start in range(0, len(ids), 32):
            row = np.asarray(ids[start : start + 32])
            logp = np.asarray(jax.nn.log_softmax(model(row).logits[0, :-1]))
            nll.extend(-logp[np.arange(len(row) - 1), row[1:]])
            hits.extend(logp.argmax(-1) == row[1:])
    return {"loss": np.mean(nll), "perplexity": math.exp(np.mean(nll)), "accuracy": np.mean(hits)}


def test_evaluating_is_the_formula_and_a_compressed_model_stands_beside_its_original(model):
    before = model.evaluate(TEXT)
    assert before == pytest.approx(by_hand(model), rel=1e-5)
    made = gptjax.prune_model(model, 0.5)
    after = made.evaluate(TEXT)
    assert {name: value for name, value in after.items() if not name.startswith("original_")} == pytest.approx(
        by_hand(made), rel=1e-5
    )
    assert {name: after[f"original_{name}"] for name in before} == before and after["loss"] != before["loss"]
    assert model.evaluate([{"input_ids": [1, 2, 3]}, [5, 6]])["loss"] > 0 and zeros(model) == 0


@pytest.mark.parametrize(
    ("options", "rate"),
    [({}, 0.5), ({"pruning_rate": 0.25}, 0.25), ({"pruning_rate": "2:4", "calibration": TEXT}, 0.5)],
)
def test_pruning_takes_the_part_that_it_is_told(model, options, rate, tmp_path):
    made = gptjax.prune_model(model, **options)
    assert zeros(made) == pytest.approx(rate, abs=0.01) and made.original is model
    made.save_pretrained(tmp_path / "pruned")
    again = GPT4LMHeadModel.from_pretrained(tmp_path / "pruned")
    jax.tree.map(np.testing.assert_array_equal, again.params, made.params)
    stages = [entry["stage"] for entry in read_meta(tmp_path / "pruned" / "ckpt" / "0").lineage]
    assert stages == ["prune", "save_pretrained"] and again.lineage[0]["done"] == made.lineage[0]["done"]


@pytest.mark.parametrize(
    ("options", "format"),
    [
        ({}, ("int8", None)),
        ({"num_bits": 4, "group_size": 8, "kv_cache": "int8"}, ("int4", 8)),
        ({"num_bits": 3, "group_size": 8, "calibration": TEXT}, ("int3", 8)),
    ],
)
def test_quantising_stores_what_it_is_told(model, options, format, tmp_path):
    made = gptjax.quantize_model(model, **options)
    leaf = made.params["group_0"]["block_0"]["mlp"]["up"]["kernel"]
    assert quantized.is_quantized(leaf) and (leaf.format.dtype, leaf.format.group_size) == format
    assert made.config.kv_cache is None or options["kv_cache"] == made.config.kv_cache.dtype == "int8"
    assert made.num_parameters() == model.num_parameters()
    figures = made.evaluate(TEXT)
    assert figures["loss"] == pytest.approx(figures["original_loss"], rel=0.2)
    assert "gptq" in str(made.lineage) or "calibration" not in options
    made.save_pretrained(tmp_path / "small")
    assert GPT4LMHeadModel.from_pretrained(tmp_path / "small").evaluate(TEXT)["loss"] == figures["loss"]


def test_a_value_of_gptjax_gives_its_own_kind(model):
    made = gptjax.quantize_model(gptjax.prune_model(model.inner()), 8)
    assert isinstance(made, gptjax.Model) and "original_loss" in made.evaluate(TEXT)
    rows = gptjax.quantize_model(model.inner(), 4, group_size=0).params["group_0"]["block_0"]["mlp"]["up"]["kernel"]
    assert rows.scale.shape[-1] == 1
    assert len(made.generate("the ", max_new_tokens=4)) > 0 and "parameters" in repr(made)


def test_what_was_made_of_a_value_of_gptjax_is_saved_with_its_lineage(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    made = gptjax.quantize_model(gptjax.load(tmp_path / "whole"), 8)
    made.save(tmp_path / "small")
    again = gptjax.load(tmp_path / "small")
    assert [entry["stage"] for entry in again.lineage][-2:] == ["save_pretrained", "quantize"]
    jax.tree.map(np.testing.assert_array_equal, again.params, made.params)
    assert again.tokenizer.fingerprint == model.tokenizer.inner.fingerprint
    with pytest.raises(ValueError, match="holds a checkpoint already, which is not overwritten"):
        made.save(tmp_path / "small")


def test_values_of_gptjax_teach_and_learn(model, tokenizer, tmp_path):
    rows = [ids for ids in np.split(np.asarray(tokenizer.encode(TEXT[0] * 40)[:256], np.int32), 8)]
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2)
    made = gptjax.knowledge_distillation(model.inner(), model.inner(), train_dataset=rows, args=args)
    assert isinstance(made, gptjax.Model) and "original_loss" in made.evaluate(TEXT)
    assert made.lineage[-1]["stage"] == "distill"
    for wrong, message in (({"teacher_model": "runs/demo"}, "teacher_model: expected"), ({"loss": "x"}, "loss='x'")):
        call = {"teacher_model": model, "student_model": model, "train_dataset": rows, "args": args} | wrong
        with pytest.raises(ValueError, match=message):
            gptjax.knowledge_distillation(**call)


def test_a_student_comes_nearer_to_its_teacher(model, tokenizer, tmp_path):
    cfg = dataclasses.replace(SMALL, num_layers=1, d_model=24).build()
    student = GPT4LMHeadModel(cfg, transformer.init(cfg, jax.random.key(0)), tokenizer=tokenizer)
    before = jax.device_get(student.params)
    rows = [ids for text in TEXT for ids in np.split(np.asarray(tokenizer.encode(text * 4)[:512], np.int32), 16)]
    args = TrainingArguments(str(tmp_path), max_steps=30, per_device_train_batch_size=2, learning_rate=1e-2)
    made = gptjax.knowledge_distillation(model, student, train_dataset=rows, args=args, weight=1.0, temperature=2.0)
    jax.tree.map(np.testing.assert_array_equal, student.params, before)

    def distance(student):
        ours, theirs = (jax.nn.log_softmax(each(np.stack(rows)).logits) for each in (student, model))
        return float((np.exp(theirs) * (theirs - ours)).sum(-1).mean())

    assert distance(made) < 0.8 * distance(student) and made.original is model
    last = made.lineage[-1]
    assert (last["stage"], last["loss"], last["weight"], last["temperature"]) == ("distill", "forward_kl", 1.0, 2.0)
    assert (last["num_steps"], last["examples"]) == (30, 32)
    assert last["teacher"] == saving.fingerprint(model.config, model.params) != last["init_params_sha256"]
    assert {"loss", "original_loss"} < made.evaluate(TEXT).keys()


def test_what_was_pruned_stays_zero_when_it_is_taught(model, tokenizer, tmp_path):
    rows = [ids for ids in np.split(np.asarray(tokenizer.encode(TEXT[0] * 40)[:256], np.int32), 8)]
    args = TrainingArguments(str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2)
    pruned = gptjax.prune_model(model, "2:4")
    assert pruned.lineage[-1]["source"] == {"params_sha256": saving.fingerprint(model.config, model.params)}
    made = gptjax.knowledge_distillation(model, pruned, train_dataset=rows, args=args)
    before, after = (each.params["group_0"]["block_0"]["mlp"]["up"]["kernel"] for each in (pruned, made))
    assert zeros(pruned) == 0.5 and np.array_equal(before == 0, after == 0) and not np.array_equal(before, after)


@pytest.mark.parametrize("rate", [0, 1, 1.5, -0.5, "4:4", "half"])
def test_a_rate_that_leaves_all_or_nothing_is_refused(model, rate):
    with pytest.raises(ValueError, match=f"pruning_rate={rate!r}: .*expected"):
        gptjax.prune_model(model, rate)


@pytest.mark.parametrize("bits", [0, 1, 7, 16, "8", True, 4.5])
def test_bits_that_there_are_not_are_refused(model, bits):
    with pytest.raises(ValueError, match="num_bits=.*: expected one of 2, 3, 4, 5, 6, 8"):
        gptjax.quantize_model(model, bits)


def test_other_mistakes_are_named(model, tokenizer):
    stored = gptjax.quantize_model(model)
    with pytest.raises(ValueError, match="in few bits already"):
        gptjax.quantize_model(stored)
    with pytest.raises(ValueError, match="few bits already: prune the model"):
        gptjax.prune_model(stored)
    with pytest.raises(ValueError, match="group_size=128 does not divide its 16 inputs"):
        gptjax.quantize_model(model, 4)
    with pytest.raises(ValueError, match="group_size=-1: expected inputs that share a scale, or 0"):
        gptjax.quantize_model(model, 4, group_size=-1)
    with pytest.raises(ValueError, match="model: expected a gptjax.Model or a GPT4LMHeadModel, got str"):
        gptjax.quantize_model("runs/demo")
    with pytest.raises(ValueError, match="method='best': expected one of magnitude"):
        gptjax.prune_model(model, method="best")
    with pytest.raises(ValueError, match="pruning_rate=None: .*expected"):
        gptjax.prune_model(model, None)
    with pytest.raises(ValueError, match="method='best': expected one of rtn"):
        gptjax.quantize_model(model, method="best")
    with pytest.raises(ValueError, match="gptq rounding .* needs calibration text"):
        gptjax.quantize_model(model, method="gptq")
    for call in (gptjax.prune_model, gptjax.quantize_model):
        with pytest.raises(ValueError, match="looks at no text"):
            call(model, method="magnitude" if call is gptjax.prune_model else "rtn", calibration=TEXT)
        with pytest.raises(ValueError, match="has 4 tokens, too few for 1 calibration rows of 32"):
            call(model, calibration=[[1, 2, 3, 4]])
        with pytest.raises(ValueError, match="expected examples, got one string 'book.txt'"):
            call(model, calibration="book.txt")
    with pytest.raises(ValueError, match="more than the model's seq_len=32"):
        model.evaluate([list(range(33))])
    with pytest.raises(ValueError, match="dataset: nothing to predict in it"):
        model.evaluate([[7]])
    args = TrainingArguments("none")
    for changes, message in (
        ({"vocab_size": 300}, "has a vocabulary of 300, the student one of 260"),
        ({"seq_len": 16}, "reads at most 16 tokens, the student 32"),
    ):
        other = GPT4LMHeadModel.from_config(dataclasses.replace(SMALL, **changes))
        with pytest.raises(ValueError, match=message):
            gptjax.knowledge_distillation(other, model, train_dataset=[[1, 2]], args=args)
    with pytest.raises(ValueError, match="student_model: its kernels are in few bits"):
        gptjax.knowledge_distillation(model, stored, train_dataset=[[1, 2]], args=args)
    with pytest.raises(ValueError, match="Trainer: the model's kernels are in few bits, which do not train"):
        Trainer(stored, args, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="tau: unknown; expected of beta, loss"):
        gptjax.knowledge_distillation(model, model, train_dataset=[[1, 2]], args=args, tau=2.0)
