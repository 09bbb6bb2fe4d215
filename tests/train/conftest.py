"""A byte-level store and a run small enough to be started many times."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.data import source, tokenizer, writer
from gptjax.train.run import RunConfig
from tests.tiny import TINY

MODEL = dict(vocab_size=260, seq_len=16, num_layers=1, num_heads=2, num_kv_heads=1, rope_theta=1e4)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """`train/`, `eval/` and `tokenizer.model`, as `experiments.prepare_data` leaves them."""
    out = tmp_path_factory.mktemp("data")
    pieces = tokenizer.byte_level()
    (out / tokenizer.FILE_NAME).write_bytes(pieces.to_bytes())
    rng = np.random.default_rng(0)
    words = ["if", "else", "return", "def", "(x)", "=", "\n"]
    texts = [" ".join(rng.choice(words, rng.integers(5, 40))) for _ in range(40)]
    for split, part in (("train", texts[:32]), ("eval", texts[32:])):
        documents = (source.Document(f"{split}{i}", text) for i, text in enumerate(part))
        writer.write_store(out / split, documents, pieces, description=split)
    return out


@pytest.fixture
def run_config(data_dir):
    """Makes a `RunConfig`; `section__key=value` changes a key."""

    def make(**changes) -> RunConfig:
        values = {
            "name": "tiny",
            "seed": 1,
            "model": dataclasses.asdict(TINY) | MODEL,
            "data": dict(
                train={str(data_dir / "train"): 1.0}, eval=None, tokenizer=str(data_dir), batch_size=8, prefetch=2
            ),
            "optim": dict(
                name="adamw", learning_rate=1e-2, schedule="constant", warmup_steps=2, final_lr_scale=0.1,
                weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.95, ema_decay=0.5,
            ),
            "train": dict(
                num_steps=6, accumulate_steps=1, z_loss=1e-4, log_every=1, eval_every=0, eval_batches=2,
                checkpoint_every=3, keep_checkpoints=0,
            ),
            "mesh": dict(data=1, fsdp=1, expert=1, context=1, tensor=1),
        }  # fmt: skip
        for name, value in changes.items():
            section, _, key = name.partition("__")
            if key:
                values[section][key] = value
            else:
                values[section] = value
        return config_lib.from_dict(RunConfig, values)

    return make
