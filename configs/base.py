"""The keys of every config, with the values that most runs keep, and the parts that configs are composed of.

A config file is a function `get_config()` that starts from `base.get_config()` and replaces what it
is about. Keys can then be set on the command line, `--config.train.num_steps=10`, and the directory of
the data after a colon: `--config=configs/llama_8b.py:/mnt/data/web`.

The keys are fields of `gptjax.train.setup.RunConfig` and the dataclasses in it, which document them; a key
that they do not have is refused.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict


def get_config(data_dir: str = "data/stdlib") -> ConfigDict:
    """A small Llama-like model on one host; every section complete."""
    config = ConfigDict({"name": "base", "seed": 0})
    config.model = llama(
        vocab_size=4096, seq_len=256, d_model=256, num_layers=4, num_heads=4, num_kv_heads=4, d_ff=768,
        tie_embeddings=True,
    )  # fmt: skip
    config.data = data(data_dir, batch_size=32)
    config.optim = adamw(learning_rate=1e-3, warmup_steps=100)
    config.train = ConfigDict(dict(num_steps=1000, accumulate_steps=1, z_loss=0.0, log_every=10, eval_every=500,
                                   eval_batches=16, checkpoint_every=500, keep_checkpoints=2))  # fmt: skip
    config.mesh = mesh()
    return config.lock()


def llama(
    *,
    vocab_size: int,
    seq_len: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    d_ff: int,
    tie_embeddings: bool = False,
    rope_theta: float = 500_000.0,
    remat: str = "none",
    **rest: Any,
) -> ConfigDict:
    """A `ModelSpec` with Llama's choices: RMSNorm before each part, rotary positions, SwiGLU, no biases."""
    return ConfigDict(
        dict(
            vocab_size=vocab_size, seq_len=seq_len, d_model=d_model, num_layers=num_layers, num_heads=num_heads,
            num_kv_heads=num_kv_heads, head_dim=d_model // num_heads, d_ff=d_ff, activation="swiglu",
            position="rope", rope_theta=rope_theta, tie_embeddings=tie_embeddings, dtype="auto", remat=remat,
            norm_eps=1e-5,
        )
        | rest
    )  # fmt: skip


def gpt2(*, vocab_size: int, seq_len: int, d_model: int, num_layers: int, num_heads: int, **rest: Any) -> ConfigDict:
    """A `ModelSpec` with GPT-2's choices: LayerNorm, learned positions, GELU, biases, one table for both ends."""
    return ConfigDict(
        dict(
            vocab_size=vocab_size, seq_len=seq_len, d_model=d_model, num_layers=num_layers, num_heads=num_heads,
            num_kv_heads=num_heads, head_dim=d_model // num_heads, d_ff=4 * d_model, activation="gelu_tanh",
            position="learned", rope_theta=10_000.0, tie_embeddings=True, dtype="auto", remat="none",
            norm="layernorm", norm_eps=1e-5, bias=True,
        )
        | rest
    )  # fmt: skip


def moe(*, num_experts: int, num_experts_per_token: int, d_ff: int, **rest: Any) -> ConfigDict:
    """The `moe` key of a `ModelSpec`: SwiGLU experts chosen by softmax, none dropped, kept in balance by a loss."""
    return ConfigDict(
        dict(
            num_experts=num_experts, num_experts_per_token=num_experts_per_token, d_ff=d_ff, activation="swiglu",
            z_loss=0.001,
        )
        | rest
    )  # fmt: skip


def data(directory: str, *, batch_size: int) -> ConfigDict:
    """The `data` section over what `experiments.prepare_data --out=directory` wrote."""
    return ConfigDict(
        dict(
            train={f"{directory}/train": 1.0}, eval=f"{directory}/eval", tokenizer=directory, batch_size=batch_size,
            packing="concat",
        ),
        # A path, such as /mnt/v1.5/train, may have dots; a mixture's weights are set in a file, not by flags.
        allow_dotted_keys=True,
    )  # fmt: skip


def adamw(*, learning_rate: float, warmup_steps: int, **rest: Any) -> ConfigDict:
    """The `optim` section as GPT-3 and Llama were trained: AdamW, cosine to a tenth, decay 0.1, clipped at 1."""
    return ConfigDict(
        dict(
            name="adamw", learning_rate=learning_rate, schedule="cosine", warmup_steps=warmup_steps,
            final_lr_scale=0.1, weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.95,
        )
        | rest
    )  # fmt: skip


def muon(*, learning_rate: float, warmup_steps: int, **rest: Any) -> ConfigDict:
    """The `optim` section with Muon on the matrices and Adam on the rest, cooling down over the last part."""
    return ConfigDict(
        dict(
            name="muon", learning_rate=learning_rate, schedule="wsd", warmup_steps=warmup_steps,
            final_lr_scale=0.0, weight_decay=0.1, clip_norm=1.0, b1=0.9, b2=0.95,
        )
        | rest
    )  # fmt: skip


def distill(teacher: str = "", **rest: Any) -> ConfigDict:
    """The `distill` section of a student's config: forward KL to the whole distribution, nine tenths of the loss."""
    return ConfigDict(dict(teacher=teacher, loss="forward_kl", temperature=1.0, weight=0.9) | rest)


def mesh(**sizes: int) -> ConfigDict:
    """The `mesh` section: all devices on `data`, unless the sizes put them elsewhere.

    `mesh(fsdp=-1)` shards the parameters over every device; `mesh(data=2, fsdp=-1, tensor=8)` is
    two replicas of fully sharded groups of 8-way tensor parallelism.
    """
    default = dict(data=1 if sizes else -1, fsdp=1, expert=1, context=1, tensor=1)
    return ConfigDict(default | sizes | {"rules": "standard"})
