"""The process that measures gptjax for `tools/bench.py`.

Usage: bench_gptjax.py <task as JSON>
"""

from __future__ import annotations

import json
import sys
from typing import Any

import bench_worker

from gptjax.kernels import cpu  # noqa: E402

if "new_tokens" not in json.loads(sys.argv[1]):
    cpu.configure_training()
    cpu.keep_freed_memory()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from gptjax.infer.generate import GenerateConfig, generate  # noqa: E402
from gptjax.nn import cost, transformer  # noqa: E402
from gptjax.nn.config import ModelConfig, MoEConfig  # noqa: E402
from gptjax.nn.spec import ModelSpec  # noqa: E402
from gptjax.optim.build import OptimConfig, build  # noqa: E402
from gptjax.parallel import rules  # noqa: E402
from gptjax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from gptjax.train import objective, state, step  # noqa: E402
from gptjax.types import Batch  # noqa: E402


def main() -> None:
    task = json.loads(sys.argv[1])
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, expert=1, context=1, tensor=1))
    with jax.set_mesh(mesh), rules.use("standard"):
        run = _decoding(task) if "new_tokens" in task else _training(task)
        num_params = cost.count(_model(task)).total
        bench_worker.serve(run, num_params=num_params, packages=("jax", "flax", "optax"))


def _model(task: dict[str, Any]) -> ModelConfig:
    gpt2 = task["kind"] == "gpt2"
    moe = None
    if task["kind"] == "mixtral":
        moe = MoEConfig(
            num_experts=task["num_experts"],
            num_experts_per_token=task["num_experts_per_token"],
            d_ff=task["d_ff"],
            activation="swiglu",
        )
    sizes = "vocab_size seq_len d_model num_layers num_heads num_kv_heads d_ff".split()
    return ModelSpec(
        **{name: task[name] for name in sizes},
        head_dim=task["d_model"] // task["num_heads"],
        activation="gelu_tanh" if gpt2 else "swiglu",
        position="learned" if gpt2 else "rope",
        rope_theta=10_000.0,
        tie_embeddings=gpt2,
        norm="layernorm" if gpt2 else "rmsnorm",
        dtype="auto",
        remat="none",
        moe=moe,
    ).build()


def _training(task: dict[str, Any]) -> bench_worker.Run:
    model = _model(task)
    shapes, axes = transformer.abstract_params(model), transformer.param_axes(model)
    optim = OptimConfig(
        name="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=100,
        final_lr_scale=0.1,
        weight_decay=0.1,
        clip_norm=1.0,
        b1=0.9,
        b2=0.99,
    )
    optimizer = build(optim, shapes, axes, num_steps=2000)
    abstract = state.abstract_state(shapes, optimizer.tx)
    shardings = rules.state_shardings(jax.sharding.get_mesh(), abstract, axes, shapes)
    current = state.create(lambda rng: transformer.init(model, rng), optimizer.tx, seed=0, shardings=shardings)
    train_step = step.jit_train_step(objective.next_token(model), optimizer, current)
    batch = _batch(task)

    def run() -> None:
        nonlocal current
        current, metrics = train_step(current, (), batch)
        jax.block_until_ready((current.params, metrics))

    return run


def _batch(task: dict[str, Any]) -> Batch:
    shape = (task["batch_size"], task["seq_len"])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, task["vocab_size"], shape), jnp.int32)
    batch = Batch(
        tokens=tokens,
        targets=jnp.roll(tokens, -1, axis=1),
        loss_mask=jnp.ones(shape, jnp.float32),
        segment_ids=jnp.ones(shape, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
    )
    return jax.device_put(batch, rules.batch_sharding(jax.sharding.get_mesh()))


def _decoding(task: dict[str, Any]) -> bench_worker.Run:
    model = _model(task)
    params = transformer.init(model, jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, task["vocab_size"], (task["batch_size"], task["prompt_tokens"]))
    config = GenerateConfig(max_new_tokens=task["new_tokens"])

    def run() -> None:
        generate(model, params, prompts=prompts.tolist(), config=config)

    return run


if __name__ == "__main__":
    main()
