"""How fast products with kernels in few bits are on this CPU, beside float32 and beside memory.

    python -m tools.bench_few_bits
    python -m tools.bench_few_bits --ckpt=models/smollm2 --tokens=128

First single products: multiplications with one row of inputs, and with many, by format and shape. With --ckpt then
tokens a second of a whole model: decoding, and prefill of a prompt of 512. All formats take turns within one run, and
the ratio to float32 is the median over rounds of the ratio within a round: the machine may be busy, but is then so for
all. GPTJAX_CPU_KERNELS=0 shows XLA's own products.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import app, flags

from experiments import compilation_cache

compilation_cache.configure()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import gptjax  # noqa: E402
from gptjax.infer.generate import GenerateConfig, generate  # noqa: E402
from gptjax.infer.layout import for_decoding  # noqa: E402
from gptjax.nn import linear, quantized, transformer  # noqa: E402
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat  # noqa: E402
from gptjax.nn.quantized import Layout  # noqa: E402

_CKPT = flags.DEFINE_string("ckpt", None, "Measure this model too.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "To decode.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "In which each format has a turn.")
_ROWS = flags.DEFINE_multi_integer("rows", [1, 16, 512], "Inputs of a product.")
_SHAPES = ((576, 1536), (1536, 576), (576, 49152), (2048, 8192))
_PROMPT_TOKENS = 512


def _rule(
    dtype: str, *, group_size: int | None = None, symmetric: bool = True, activations: Any = "none"
) -> KernelRule:
    format = WeightFormat(dtype=dtype, group_size=group_size, symmetric=symmetric)  # type: ignore[arg-type]
    return KernelRule(pattern="", weights=format, activations=activations)


_RULES: dict[str, KernelRule] = {
    "int8": _rule("int8"),
    "int8, 32 to a scale": _rule("int8", group_size=32),
    "int8 x int8": _rule("int8", activations="int8"),
    "int4, 32 to a scale": _rule("int4", group_size=32),
    "int4, 32 to a scale, x int8": _rule("int4", group_size=32, activations="int8"),
    "int4, 64, zeros": _rule("int4", group_size=64, symmetric=False),
    "int3, 64 to a scale": _rule("int3", group_size=64),
    "int2, 64 to a scale, x int8": _rule("int2", group_size=64, activations="int8"),
}


def main(_: list[str]) -> None:
    print(f"memory: {_memory_speed() / 1e9:.1f} GB/s read by a sum of 1 GB", flush=True)
    for num_inputs, num_outputs in _SHAPES:
        for num_rows in _ROWS.value:
            _products(num_rows, num_inputs, num_outputs)
    if _CKPT.value:
        _model(_CKPT.value)


def _products(num_rows: int, num_inputs: int, num_outputs: int) -> None:
    random = np.random.default_rng(0)
    w_DF = jnp.asarray(random.normal(size=(num_inputs, num_outputs)), jnp.float32)
    x_BD = jnp.asarray(random.normal(size=(num_rows, num_inputs)), jnp.float32)
    product = jax.jit(functools.partial(linear.einsum, "BD,DF->BF"))
    kernels: dict[str, Any] = {"float32": w_DF}
    layout = Layout((num_inputs,), (num_outputs,))
    for name, rule in _RULES.items():
        assert rule.weights is not None, "every rule here stores"
        kernels[name] = quantized.quantize(w_DF, format=rule.weights, layout=layout, activations=rule.activations)
    calls = max(1, int(2e8 / (num_rows * num_inputs * num_outputs)))

    def run(kernel: Any) -> None:
        for _ in range(calls):
            y = product(x_BD, kernel)
        y.block_until_ready()

    seconds = _in_turn({name: functools.partial(run, kernel) for name, kernel in kernels.items()})
    print(f"\n[{num_rows}, {num_inputs}] x [{num_inputs}, {num_outputs}]")
    for name, (fastest, ratio) in seconds.items():
        size = sum(array.nbytes for array in jax.tree.leaves(kernels[name])) * calls
        print(f"{name:30} {fastest / calls * 1e6:9.0f} us {size / fastest / 1e9:7.1f} GB/s  {ratio:5.2f} x", flush=True)


def _model(ckpt: str) -> None:
    model = gptjax.load(ckpt)
    models = {"float32": for_decoding(model.config, model.params)}
    for name, rule in _RULES.items():
        cfg = dataclasses.replace(model.config, quant=QuantConfig(rules=(rule,)))
        models[name] = for_decoding(cfg, transformer.store(cfg, model.params))
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, _PROMPT_TOKENS).tolist()

    def decode(name: str, num_tokens: int, prompt: list[int]) -> None:
        generate(*models[name], prompts=[prompt], config=GenerateConfig(max_new_tokens=num_tokens))

    runs = {name: functools.partial(decode, name, _TOKENS.value, prompt[:8]) for name in models}
    print("\ndecoding")
    for name, (fastest, ratio) in _in_turn(runs).items():
        size = sum(array.nbytes for array in jax.tree.leaves(models[name][1]))
        print(f"{name:30} {_TOKENS.value / fastest:7.1f} tokens/s {size / 1e6:7.0f} MB  {ratio:5.2f} x", flush=True)
    print(f"\nprefill of {_PROMPT_TOKENS}")
    runs = {name: functools.partial(decode, name, 1, prompt) for name in models}
    for name, (fastest, ratio) in _in_turn(runs).items():
        print(f"{name:30} {_PROMPT_TOKENS / fastest:7.0f} tokens/s {ratio:5.2f} x", flush=True)


def _in_turn(runs: Mapping[str, Callable[[], None]]) -> dict[str, tuple[float, float]]:
    """The fewest seconds of each run, and how many times as fast as the first it is."""
    for run in runs.values():
        run()
    seconds = np.zeros((_ROUNDS.value, len(runs)))
    for turn in range(_ROUNDS.value):
        for column, run in enumerate(runs.values()):
            began = time.perf_counter()
            run()
            seconds[turn, column] = time.perf_counter() - began
    ratios = np.median(seconds[:, :1] / seconds, axis=0)
    return {name: (float(seconds[:, i].min()), float(ratios[i])) for i, name in enumerate(runs)}


def _memory_speed() -> float:
    x = jnp.ones((256, 1 << 20), jnp.float32)
    v = jnp.ones(1 << 20, jnp.float32)
    read = jax.jit(lambda x, v: x @ v)
    return x.nbytes / _in_turn({"read": lambda: read(x, v).block_until_ready()})["read"][0]


if __name__ == "__main__":
    app.run(main)
