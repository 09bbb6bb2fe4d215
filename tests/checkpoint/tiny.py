"""A tiny state to save, and what the tests of checkpoints compare."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.checkpoint import meta as meta_lib
from gptjax.nn.config import AttentionConfig, BlockConfig, LayerGroup, MLPConfig, ModelConfig


def model(d_ff: int = 32) -> ModelConfig:
    block = BlockConfig(
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4), mlp=MLPConfig(d_ff=d_ff, activation="gelu")
    )
    return ModelConfig(vocab_size=16, d_model=8, seq_len=16, groups=(LayerGroup(pattern=(block,), repeats=2),))


def meta(**changes):
    return meta_lib.make(model(), run={"seed": 1}, tokenizer="ab12", lineage=[{"stage": "pretrain"}], **changes)


def params(seed: int = 0, d_ff: int = 32) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "embed": {"tokens": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)},
        "group_0": {"block_0": {"mlp": {"up": {"kernel": jnp.asarray(rng.normal(size=(2, 8, d_ff)), jnp.float32)}}}},
    }


def opt_state(of: dict):
    return optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(of)


def save(store, step: int, seed: int | None = None, **more):
    """Saves a whole state at a step; its values follow from the step."""
    values = params(step if seed is None else seed)
    store.save(step, meta=meta(), params=values, opt_state=opt_state(values), **more)


def abstract(tree, dtype=None, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding), tree)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def bytes_under(directory) -> dict[str, bytes]:
    """Every file below a directory, to see that nothing changed."""
    return {str(path): path.read_bytes() for path in sorted(Path(directory).rglob("*")) if path.is_file()}
