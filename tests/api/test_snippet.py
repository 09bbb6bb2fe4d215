"""Code written for transformers runs, only its import line being ours."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import gptjax
from gptjax import (
    DataCollatorForLanguageModeling,
    GPT4LMHeadModel,
    GPT4Tokenizer,
    TextDataset,
    Trainer,
    TrainingArguments,
    lock,
)
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import characters
from gptjax.optim import schedule
from tests.tiny import TINY

SNIPPET = """
from gptjax import GPT4LMHeadModel, GPT4Tokenizer, TextDataset, DataCollatorForLanguageModeling, Trainer
tokenizer = GPT4Tokenizer.from_pretrained("gpt4")
model = GPT4LMHeadModel.from_pretrained("gpt4")
train_dataset = TextDataset(tokenizer=tokenizer, file_path="train.txt", block_size=128)
data_collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=True)
trainer = Trainer(model=model, args=training_args, data_collator=data_collator, train_dataset=train_dataset,
                  eval_dataset=eval_dataset, tokenizer=tokenizer)
trainer.train()
"""
TEXT = "the quick brown fox jumps over the lazy dog.\r\n\tÆther – 漢字 " * 60
SMALL = dataclasses.replace(TINY, vocab_size=260, seq_len=128, d_model=32, num_heads=2, head_dim=16, d_ff=64)


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_bytes(TEXT.encode())


@pytest.fixture
def tokenizer():
    return GPT4Tokenizer.from_pretrained("gpt4")


def arguments(**changes):
    defaults = dict(output_dir="out", per_device_train_batch_size=1, max_steps=3, logging_steps=1)
    return TrainingArguments(**(defaults | changes))


def trainer_of(tokenizer, *, mlm, model=None, block_size=32, **changes):
    data = TextDataset(tokenizer, "train.txt", block_size)
    return Trainer(
        model or GPT4LMHeadModel.from_config(SMALL),
        arguments(**changes),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=mlm),
        train_dataset=data,
        eval_dataset=[data[i] for i in range(3)],
        tokenizer=tokenizer,
    )


def test_the_snippet_runs_on_a_checkpoint(tokenizer):
    model = GPT4LMHeadModel.from_config(SMALL)
    model.tokenizer = tokenizer
    model.save_pretrained("gpt4")
    eval_dataset = TextDataset(tokenizer, "train.txt", 128)
    scope = {"training_args": arguments(), "eval_dataset": eval_dataset}
    exec(SNIPPET, scope)
    figures = scope["trainer"].evaluate()
    assert figures["eval_perplexity"] == pytest.approx(math.exp(figures["eval_loss"]))
    assert not scope["model"].config.causal


def test_a_preset_without_weights_says_so_and_offers_from_config():
    with pytest.raises(ValueError, match=r"without trained weights.*GPT4LMHeadModel\.from_config\('gpt4'\)"):
        exec(SNIPPET, {"training_args": arguments(), "eval_dataset": []})
    assert GPT4LMHeadModel.from_config("gpt4").num_parameters() > 1e6


@pytest.mark.parametrize("mlm", [True, False])
def test_training_lowers_the_loss(tokenizer, mlm, capsys):
    trainer = trainer_of(tokenizer, mlm=mlm, max_steps=30, learning_rate=1e-2, logging_steps=10)
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == before
    output = trainer.train()
    assert output.global_step == 30
    # As in a notebook: standard error is no terminal.
    shown = [line[:10] for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert shown == ["step  1/30", "step 10/30", "step 20/30", "step 30/30"]
    assert trainer.evaluate()["eval_loss"] < before - 0.5


def test_masked_models_see_both_sides_and_causal_ones_do_not(tokenizer):
    ids = np.arange(8)[None] + 60
    changed = ids.copy()
    changed[0, -1] = 99
    for mlm, reaches_back in ((True, True), (False, False)):
        model = trainer_of(tokenizer, mlm=mlm).model
        first = model(ids).logits[0, 0] - model(changed).logits[0, 0]
        assert bool(np.abs(first).max() > 1e-6) == reaches_back


def test_a_masked_model_is_trained_on_as_a_causal_one(tokenizer):
    trainer_of(tokenizer, mlm=True, max_steps=1).train()
    model = GPT4LMHeadModel.from_pretrained("out")
    assert not model.config.causal
    trainer = trainer_of(tokenizer, mlm=False, model=model, output_dir="causal", max_steps=1)
    output = trainer.train()
    assert trainer.model.config.causal and np.isfinite(output.training_loss)
    trainer.save_model()
    again = GPT4LMHeadModel.from_pretrained("causal/model")
    jax.tree.map(np.testing.assert_array_equal, again.params, trainer.model.params)


def test_saved_models_read_back_equal(tokenizer):
    model = GPT4LMHeadModel.from_config(SMALL, seed=3)
    model.tokenizer = tokenizer
    model.save_pretrained("saved")
    again = GPT4LMHeadModel.from_pretrained("saved")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.tokenizer.decode(again.tokenizer.encode(TEXT)) == TEXT
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        model.save_pretrained("saved")
    tokenizer.save_pretrained("saved")
    tokenizer.save_pretrained("saved")
    with pytest.raises(ValueError, match="another tokenizer is already there"):
        GPT4Tokenizer(tokenizer_lib.characters("abc")).save_pretrained("saved")


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tokenizer):
    whole = trainer_of(tokenizer, mlm=True, max_steps=4, learning_rate=1e-2, lr_scheduler_type="constant")
    whole.train()
    changes = dict(learning_rate=1e-2, lr_scheduler_type="constant", output_dir="half")
    data = whole.train_dataset
    model = GPT4LMHeadModel.from_config(SMALL)
    for max_steps in (2, 4):
        args = TrainingArguments(**(changes | dict(per_device_train_batch_size=1, max_steps=max_steps)))
        half = Trainer(model, args, data_collator=whole.data_collator, train_dataset=data)
        half.train(resume_from_checkpoint=True)
        model = GPT4LMHeadModel.from_config(SMALL, seed=9)
    jax.tree.map(np.testing.assert_array_equal, half.model.params, whole.model.params)
    again = Trainer(model, args, data_collator=whole.data_collator, train_dataset=data)
    with pytest.raises(ValueError, match="resume_from_checkpoint=True"):
        again.train()
    with pytest.raises(ValueError, match="resume_from_checkpoint='half/ckpt/2': expected True or False"):
        again.train(resume_from_checkpoint="half/ckpt/2")
    # As many pieces, but others.
    other = GPT4Tokenizer(tokenizer_lib.characters("".join(map(chr, range(260)))))
    again = Trainer(model, args, tokenizer=other, train_dataset=data)
    with pytest.raises(ValueError, match="half/ckpt/4: its tokens are those of tokenizer"):
        again.train(resume_from_checkpoint=True)


def test_an_epoch_has_every_row_once(tokenizer):
    trainer = trainer_of(tokenizer, mlm=False, max_steps=-1, num_train_epochs=1.0, block_size=64)
    seen = []
    trainer.data_collator = Recorder(trainer.data_collator, seen)
    steps = trainer.train().global_step
    rows = [bytes(row.astype(np.uint8)) for row in seen if len(row)]
    assert steps == -(-len(trainer.train_dataset) // jax.device_count())
    assert sorted(rows) == sorted(bytes(row.astype(np.uint8)) for row in trainer.train_dataset)


class Recorder:
    """A collator that notes the rows that it is given."""

    def __init__(self, inner, seen):
        self.inner, self.seen = inner, seen

    def __call__(self, rows, *, length=None):
        self.seen += [np.asarray(row) for row in rows]
        return self.inner(rows, length=length)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_labels_give_the_language_modelling_loss(tokenizer):
    model = GPT4LMHeadModel.from_config(SMALL)
    ids = np.array([tokenizer.encode("hello world")])
    output = model(ids, labels=ids)
    logp = jax.nn.log_softmax(output.logits[0, :-1])
    by_hand = -np.mean([logp[i, t] for i, t in enumerate(ids[0, 1:])])
    assert float(output.loss) == pytest.approx(by_hand, rel=1e-5)
    padded = np.pad(ids, ((0, 0), (0, 3)))
    masked = model(padded, attention_mask=np.pad(np.ones_like(ids), ((0, 0), (0, 3)))).logits[:, : ids.shape[1]]
    np.testing.assert_allclose(masked, output.logits, atol=1e-5)


def test_generates_after_each_prompt(tokenizer):
    model = GPT4LMHeadModel.from_config(SMALL)
    prompts = [tokenizer.encode("a"), tokenizer.encode("hello")]
    together = model.generate(prompts, max_new_tokens=4)
    assert [row[: len(prompt)] for row, prompt in zip(together, prompts, strict=True)] == prompts
    assert model.generate(prompts[1], max_new_tokens=4)[0] == together[1]
    laid_out = model.inner()
    assert model.inner() is laid_out, "parameters are laid out for decoding once, not at every call"
    model.params = jax.tree.map(lambda x: -x, model.params)
    assert model.inner().params is model.params
    with pytest.raises(TypeError, match="top_q"):
        model.generate(prompts, max_new_tokens=4, top_q=0.5)


def test_a_prompt_begins_as_blocks_of_training_and_prompts_elsewhere_do(tokenizer):
    data = TextDataset(tokenizer, "train.txt", 32)
    blocks = [data[index].tolist() for index in range(len(data))]
    assert all(block[0] == tokenizer.bos_token_id and 2 <= len(block) <= 32 for block in blocks)
    assert [token for block in blocks for token in block[1:]] == tokenizer.encode(TEXT, add_special_tokens=False)
    trainer_of(tokenizer, mlm=False, max_steps=2).train()
    model = GPT4LMHeadModel.from_pretrained("out")
    (ids,) = model.generate(tokenizer("hello")["input_ids"], max_new_tokens=8)
    assert tokenizer.decode(ids) == "hello" + gptjax.load("out").generate("hello", max_new_tokens=8)


def test_all_tokens_may_be_hidden(tokenizer):
    model = GPT4LMHeadModel.from_config(SMALL)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=1.0)
    data = TextDataset(tokenizer, "train.txt", 32)
    trainer = Trainer(model, arguments(max_steps=1), data_collator=collator, train_dataset=data, tokenizer=tokenizer)
    assert np.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize(
    "content, message", [(b"", "is empty"), (b"ab\xff", "byte 2 .0xff. is not UTF-8"), (None, "cannot be read")]
)
def test_unusable_text_is_named(tokenizer, tmp_path, content, message):
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.txt.*{message}"):
        TextDataset(tokenizer, tmp_path / "bad.txt", 8)


def test_what_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="seq_len=128"):
        trainer_of(tokenizer, mlm=False, block_size=200).train()
    with pytest.raises(ValueError, match="vocab_size=300"):
        trainer_of(tokenizer, mlm=False, model=GPT4LMHeadModel.from_config(SMALL, vocab_size=300))
    with pytest.raises(ValueError, match="train_dataset"):
        Trainer(GPT4LMHeadModel.from_config(SMALL), arguments(), tokenizer=tokenizer).train()
    with pytest.raises(ValueError, match="eval_dataset, for eval_strategy='epoch': .* got none"):
        Trainer(GPT4LMHeadModel.from_config(SMALL), arguments(eval_strategy="epoch"), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no such preset"):
        GPT4LMHeadModel.from_config("gpt5")
    with pytest.raises(ValueError, match="from_config.d_modell: unknown key; did you mean `d_model`"):
        GPT4LMHeadModel.from_config(TINY, d_modell=32)
    with pytest.raises(ValueError, match="from_config.activation: expected one of .* got 'swish'"):
        GPT4LMHeadModel.from_config(TINY, activation="swish")
    for from_pretrained in (GPT4Tokenizer.from_pretrained, GPT4LMHeadModel.from_pretrained):
        with pytest.raises(ValueError, match="'gpt-4': neither a file or directory nor a preset, .* gpt4"):
            from_pretrained("gpt-4")
    for probability in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"mlm_probability={probability}: expected over 0 and at most 1"):
            DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([[1, 2], [3, 260]], "an example has tokens 3 to 260, expected 0 to 259; is it made with the Trainer's tok"),
        ([[1, -2]], "tokens -2 to 1, expected 0 to 259"),
        (["text"], "example 'text': expected token ids, or a mapping with them as `input_ids`"),
        ([{"ids": [1, 2]}], "example {'ids'.*: expected token ids"),
        ([[1], []], "the longest example has 1 tokens, so there is nothing to predict"),
    ],
)
def test_examples_that_are_no_tokens_are_refused_before_anything_is_written(tokenizer, tmp_path, examples, message):
    trainer = trainer_of(tokenizer, mlm=False)
    trainer.train_dataset = examples
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(input_ids=[[1, 260]]), "input_ids: expected 0 to 259, got 1 to 260"),
        (dict(input_ids=[[0.5, 1.0]]), r"input_ids: expected integers .*, got float32 \[1, 2\]"),
        (dict(input_ids=[]), "input_ids: expected integers"),
        (dict(input_ids=[1, 2], labels=[1]), r"labels: expected the shape of input_ids, \[1, 2\], got \[1, 1\]"),
        (dict(input_ids=[1, 2], labels=[-100, 300]), "labels: expected 0 to 259 or -100, got 0 to 300"),
        (dict(input_ids=[1, 2], labels=[1, -1]), "labels: expected 0 to 259 or -100, got -1 to 1"),
        (dict(input_ids=[1, 2], attention_mask=[1]), "attention_mask: expected the shape of input_ids"),
    ],
)
def test_what_is_no_input_is_refused(call, message):
    """JAX would clip indices and broadcast shapes, and give a wrong number."""
    with pytest.raises(ValueError, match=message):
        GPT4LMHeadModel.from_config(SMALL)(**call)


def test_a_boolean_mask_is_one_of_zeros_and_ones():
    model, ids = GPT4LMHeadModel.from_config(SMALL), np.array([[5, 6, 0]])
    masked = [model(ids, attention_mask=mask).logits for mask in (ids > 0, (ids > 0).astype(int))]
    np.testing.assert_array_equal(*masked)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_more_tokens_than_the_context_are_refused(position):
    model = GPT4LMHeadModel.from_config(SMALL, position=position, seq_len=8)
    with pytest.raises(ValueError, match="9 positions exceed the model's context, seq_len=8"):
        model(np.ones(9, np.int32))


def test_the_model_can_be_compiled():
    model, ids = GPT4LMHeadModel.from_config(SMALL), np.array([[1, 2, 3]])
    compiled = jax.jit(lambda ids: model(ids, labels=ids).loss)(ids)
    assert float(compiled) == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-5)


def test_another_tokenizer_and_a_run_under_way_are_not_written_over(tokenizer):
    tokenizer.save_pretrained("saved")
    tokenizer.save_pretrained("saved")
    with pytest.raises(ValueError, match="another tokenizer is already there"):
        GPT4Tokenizer(characters("ab")).save_pretrained("saved")
    with lock.exclusive("out"), pytest.raises(ValueError, match="out: another process is working there"):
        trainer_of(tokenizer, mlm=False).train()


def test_another_part_of_the_tokens_may_be_hidden(tokenizer):
    hidden = {}
    for probability in (0.15, 0.6):
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=probability)
        model = trainer_of(tokenizer, mlm=True).model
        batch = collator([np.arange(100, dtype=np.int32)] * 8)
        loss = jax.jit(collator.objective(model.config))(model.params, (), batch, jax.random.key(0), 0)
        hidden[probability] = float(loss.weight) / 800
    assert hidden == pytest.approx({0.15: 0.15, 0.6: 0.6}, abs=0.05)


def test_evaluates_and_saves_when_told(tokenizer, tmp_path):
    trainer = trainer_of(
        tokenizer, mlm=False, block_size=64, max_steps=-1, num_train_epochs=2.0, eval_strategy="epoch",
        save_strategy="epoch", warmup_ratio=0.5, bf16=True,
    )  # fmt: skip
    per_epoch = -(-len(trainer.train_dataset) // jax.device_count())
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [per_epoch, 2 * per_epoch]
    assert sorted(int(path.name) for path in (tmp_path / "out" / "ckpt").iterdir()) == [per_epoch, 2 * per_epoch]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert int(np.argmax(rates)) == per_epoch - 1
    assert trainer.model.config.dtype == "bfloat16"
    trainer.args = dataclasses.replace(trainer.args, overwrite_output_dir=True, max_steps=1)
    trainer.train()
    assert [path.name for path in (tmp_path / "out" / "ckpt").iterdir()] == ["1"]


def test_an_inverse_square_root_falls_to_the_end_without_another_decay():
    args = TrainingArguments("out", lr_scheduler_type="inverse_sqrt", warmup_steps=4, learning_rate=1.0)
    cfg = args.optimizer(num_steps=100)
    rate = schedule.make(
        cfg.schedule, cfg.learning_rate, num_steps=100, warmup_steps=cfg.warmup_steps, final_scale=cfg.final_lr_scale,
        decay_fraction=cfg.decay_fraction,
    )  # fmt: skip
    assert float(rate(99)) == pytest.approx((4 / 100) ** 0.5)


def test_unknown_and_mistyped_arguments_are_refused():
    with pytest.raises(TypeError, match="evaluation_stratgy"):
        TrainingArguments("out", evaluation_stratgy="steps")
    with pytest.raises(ValueError, match="means nothing"):
        TrainingArguments("out", eval_steps=3)
    with pytest.raises(ValueError, match="save_strategy"):
        TrainingArguments("out", save_strategy="epochs")
    with pytest.raises(ValueError, match="lr_scheduler_type"):
        TrainingArguments("out", lr_scheduler_type="cosin")
    with pytest.raises(ValueError, match="inverse_sqrt.* needs warmup_steps"):
        TrainingArguments("out", lr_scheduler_type="inverse_sqrt")
    with pytest.raises(ValueError, match="learning_rate"):
        TrainingArguments("out", learning_rate="fast")
    with pytest.raises(ValueError, match="name.*adam"):
        TrainingArguments("out", optim="adam")
    with pytest.raises(ValueError, match="TrainingArguments.per_device_train_batch_size: expected int, got 2.5"):
        TrainingArguments("out", per_device_train_batch_size=2.5)
    with pytest.raises(ValueError, match="TrainingArguments.num_train_epochs: expected float, got '3'"):
        TrainingArguments("out", num_train_epochs="3")
    with pytest.raises(ValueError, match="output_dir is empty"):
        TrainingArguments("")
