"""The process that measures a JAX library for `tools/bench.py`; needs that library and nothing of gptjax.

Usage: bench_peers_jax.py nanodo|levanter|maxtext <checkout of nanodo or empty> <task as JSON>

Each runs the train step of its own trainer, which is to say its own model, loss, clipping, AdamW and
metrics, in float32, without rematerialisation and without its logging and checkpoints. Where a
library offers several ways, the one that is fastest on a CPU is taken; the choice is explained beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from typing import Any

import bench_worker
import numpy as np

_LEARNING_RATE, _WEIGHT_DECAY, _CLIP_NORM, _B1, _B2 = 1e-3, 0.1, 1.0, 0.9, 0.99
_NUM_STEPS, _WARMUP_STEPS = 2000, 100


def main() -> None:
    peer, checkout, task = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if checkout:
        sys.path.insert(0, checkout)
    {"nanodo": _nanodo, "levanter": _levanter, "maxtext": _maxtext}[peer](task)


def _tokens(task: dict[str, Any]) -> np.ndarray:
    # From 1: nanodo takes 0 for padding.
    shape = (task["batch_size"], task["seq_len"])
    return np.random.default_rng(0).integers(1, task["vocab_size"], shape, np.int32)


def _num_params(tree: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(tree) if hasattr(leaf, "size"))


def _nanodo(task: dict[str, Any]) -> None:
    """The `Trainer` of nanodo, with the per-layer statistics (`log_internal_metrics`) off."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import mesh_utils
    from nanodo import model_factory, train
    from nanodo.configs import default

    config = default.get_config()
    sizes = {"D": "d_model", "H": "num_heads", "L": "seq_len", "N": "num_layers", "F": "d_ff"}
    config.model.update({theirs: task[ours] for theirs, ours in sizes.items()})
    config.batch_size, config.log_internal_metrics = task["batch_size"], False
    with config.model.unlocked(), config.opt.unlocked():
        config.model.dtype = "float32"
        config.opt.update(peak_learning_rate=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, b1=_B1, b2=_B2)
        config.opt.update(num_train_steps=_NUM_STEPS, warmup_steps=_WARMUP_STEPS)
        config.opt.clip_by_global_norm = _CLIP_NORM
    mesh = jax.sharding.Mesh(mesh_utils.create_device_mesh((jax.device_count(),)), ("data",))
    model, get_loss_fn = model_factory.get_model_and_loss(config, task["vocab_size"])
    shardings, state = train._init_train_state(config, model, rng=jax.random.PRNGKey(0), mesh=mesh)
    trainer = train.Trainer(config, state, mesh, shardings, get_loss_fn)
    tokens, step = _tokens(task), 0

    def run() -> None:
        nonlocal step
        # Their step frees the batch that it is given.
        metrics = trainer.do_step(step, jnp.asarray(tokens))
        step += 1
        jax.block_until_ready((trainer.state, metrics))

    bench_worker.serve(run, num_params=_num_params(state.params), packages=("jax", "flax", "optax"))


def _levanter(task: dict[str, Any]) -> None:
    """The `Trainer.train_step` of levanter."""
    import equinox as eqx
    import haliax as hax
    import jax
    from levanter.callbacks.watch import WatchConfig
    from levanter.models.lm_model import LmExample
    from levanter.optim.config import AdamConfig
    from levanter.tracker import defer_tracker_for_jit
    from levanter.tracker.tracker import NoopConfig
    from levanter.trainer import Trainer, TrainerConfig

    config = TrainerConfig(
        id="bench",
        tracker=NoopConfig(),
        train_batch_size=task["batch_size"],
        num_train_steps=_NUM_STEPS,
        load_checkpoint=False,
        watch=WatchConfig(watch_targets=[]),
        log_jaxprs=False,
        log_xla_hlo=False,
        require_accelerator=False,
    )
    adam = AdamConfig(
        learning_rate=_LEARNING_RATE,
        weight_decay=_WEIGHT_DECAY,
        warmup=_WARMUP_STEPS,
        beta1=_B1,
        beta2=_B2,
        max_grad_norm=_CLIP_NORM,
    )
    model = _levanter_model(task)

    def loss_fn(model: Any, example: LmExample, *, key: Any = None) -> Any:
        # Else its router's statistics are logged by a callback, through which nothing can be differentiated.
        with defer_tracker_for_jit():
            return model.compute_next_token_loss(example, key=key)

    with Trainer(config, adam.build(_NUM_STEPS), loss_fn, add_default_hooks=False) as trainer:
        vocabulary, key = hax.Axis("vocab", task["vocab_size"]), jax.random.PRNGKey(0)
        state = trainer.initial_state(key, model_init=lambda: model.build(vocabulary, key=key))
        tokens = hax.named(_tokens(task), (config.TrainBatch, model.max_Pos))
        batch = hax.vmap(LmExample.causal, config.TrainBatch)(tokens)

        def run() -> None:
            nonlocal state
            state = trainer.train_step(state, batch).state
            jax.block_until_ready(eqx.filter(state, eqx.is_array))

        size = _num_params(eqx.filter(state.model, eqx.is_array))
        bench_worker.serve(run, num_params=size, packages=("jax", "marin-levanter", "marin-haliax"))


def _levanter_model(task: dict[str, Any]) -> Any:
    from levanter.layers.attention import AttentionBackend
    from levanter.models.gpt2 import Gpt2Config
    from levanter.models.llama import LlamaConfig
    from levanter.models.mixtral import MixtralConfig

    common = {
        "max_seq_len": task["seq_len"],
        "hidden_dim": task["d_model"],
        "num_layers": task["num_layers"],
        "num_heads": task["num_heads"],
        "gradient_checkpointing": False,
        # On a CPU 0 to 4 % faster than their blockwise attention, which is the default.
        "attn_backend": AttentionBackend.VANILLA,
    }
    if task["kind"] == "gpt2":
        return Gpt2Config(**common, mlp_scale=task["d_ff"] // task["d_model"], use_bias=False)
    # Scanned, which is the default, T3 takes a quarter longer; their GPT-2 is scanned always.
    common |= {"num_kv_heads": task["num_kv_heads"], "intermediate_dim": task["d_ff"], "scan_layers": False}
    if task["kind"] == "llama":
        return LlamaConfig(**common)
    experts = {"n_routed_experts": task["num_experts"], "num_experts_per_tok": task["num_experts_per_token"]}
    return MixtralConfig(**common, **experts)


def _maxtext(task: dict[str, Any]) -> None:
    """MaxText's `train_step`, set up as its `train_loop` does."""
    import jax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        config = pyconfig.initialize(["train.py", _maxtext_base(), *_maxtext_settings(task, folder)])
        (_, _, shardings, _, mesh, _, _, loader, _, _, state) = train_utils.setup_train_loop(config, None)
        graph, state = nnx.split(state)
        params_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
        step, _ = train_utils.jit_train_and_eval_step(
            config, graph, mesh, state, shardings, train.train_step, params_shardings=params_shardings
        )
        batch = loader.load_next_batch()
    num_params = _num_params(nnx.split(state.model, nnx.Param, ...)[1])

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        bench_worker.serve(run, num_params=num_params, packages=("jax", "maxtext", "flax"))


def _maxtext_base() -> str:
    from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

    return os.path.join(MAXTEXT_CONFIGS_DIR, "base.yml")


def _maxtext_settings(task: dict[str, Any], folder: str) -> list[str]:
    gpt2 = task["kind"] == "gpt2"
    settings: dict[str, Any] = {
        "run_name": "bench",
        "base_output_directory": folder,
        "jax_cache_dir": "",
        "enable_checkpointing": False,
        "dataset_type": "synthetic",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "log_config": False,
        "enable_goodput_recording": False,
        "dtype": "float32",
        "weight_dtype": "float32",
        "remat_policy": "none",
        "attention": "dot_product",
        "scan_layers": False,
        # Else the products with a tied embedding are in bfloat16, whatever `dtype` says.
        "logits_dot_in_fp32": True,
        "steps": _NUM_STEPS,
        "learning_rate": _LEARNING_RATE,
        "warmup_steps_fraction": _WARMUP_STEPS / _NUM_STEPS,
        "gradient_clipping_threshold": _CLIP_NORM,
        "opt_type": "adamw",
        "adam_b1": _B1,
        "adam_b2": _B2,
        "adam_weight_decay": _WEIGHT_DECAY,
        "per_device_batch_size": task["batch_size"],
        "max_target_length": task["seq_len"],
        "vocab_size": task["vocab_size"],
        "base_emb_dim": task["d_model"],
        "base_mlp_dim": task["d_ff"],
        "base_num_decoder_layers": task["num_layers"],
        "base_num_query_heads": task["num_heads"],
        "base_num_kv_heads": task["num_kv_heads"],
        "head_dim": task["d_model"] // task["num_heads"],
        "enable_dropout": False,
        "decoder_block": {"gpt2": "gpt3", "llama": "llama2", "mixtral": "mixtral"}[task["kind"]],
        "logits_via_embedding": gpt2,
    }
    if gpt2:
        # As in their configurations of GPT-3.
        settings |= {"mlp_activations": ["gelu"], "trainable_position_size": task["seq_len"], "fused_qkv": True}
        settings |= {"normalize_embedding_logits": False}
    if task["kind"] == "mixtral":
        # Without the kernel for TPUs the grouped products are `ragged_dot`, a little faster than their dense ones.
        settings |= {"base_moe_mlp_dim": task["d_ff"], "megablox": False}
        settings |= {"num_experts": task["num_experts"], "num_experts_per_tok": task["num_experts_per_token"]}
    return [f"{name}={value}" for name, value in settings.items()]


if __name__ == "__main__":
    main()
