"""TensorFlow SavedModel, by `jax2tf`: one StableHLO program a signature, with the weights as variables.

    serving_default   tokens [B, T] -> logits [B, T, V]
    prefill, decode   tokens, positions [B, T], wanted [B, R] and the cache's arrays -> logits [B, R, V] and the cache

T is 1 in `decode`. What the arguments mean is said at `portable.Portable.step`; an empty cache is made from
`assets.extra/manifest.json`, beside which `run.py` and the tokenizer lie. TensorFlow alone loads and runs it; programs
are for CPU, CUDA and TPU.

The programs are made of elementary operations (`form="plain"`): TensorFlow 2.21 reads StableHLO 1.13, which lacks the
composites that JAX 0.10 writes for top-k and for grouped products.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from gptjax.interop.portable import Portable, WeightReader, plan, write_companions
from gptjax.interop.stablehlo import PLATFORMS, without_source_paths
from gptjax.progress import BytesLine

EXTRA_FOLDER = "assets.extra"  # TensorFlow's own name for files that come with a model


def write(checkpoint: epath.PathLike, folder: pathlib.Path, *, dtype: np.dtype | None = None) -> None:
    """Writes the SavedModel of a checkpoint.

    TensorFlow holds all variables while it saves: memory is that of the model once, and its largest tensor twice.

    Args:
      dtype: of products and caches; see `portable.plan`.

    Raises:
      ImportError: without TensorFlow.
      ValueError: if the checkpoint is damaged.
    """
    tf = _tensorflow()
    portable = plan(checkpoint, form="plain", dtype=dtype)
    module = tf.Module()
    module.weights = _variables(tf, WeightReader(checkpoint, portable.weights), portable)
    with without_source_paths():
        module.logits = _logits(tf, portable, module.weights)
        signatures = {"serving_default": module.logits}
        for name, length in (("prefill", None), ("decode", 1)):
            step = _step(tf, portable, module.weights, length)
            setattr(module, name, step)
            signatures[name] = step
        tf.saved_model.save(module, str(folder), signatures=signatures)
    extra = folder / EXTRA_FOLDER
    extra.mkdir(exist_ok=True)
    named = {_argument(name): entry for name, entry in portable.cache.items()}
    write_companions(checkpoint, extra, dataclasses.replace(portable, cache=named), format="saved_model")


def _variables(tf: Any, reader: WeightReader, portable: Portable) -> list[Any]:
    """In the order of the programs' arguments, read one at a time."""
    tasks = reader.tasks()
    line = BytesLine("export", sum(task.num_bytes for task in tasks))
    found, sums = {}, {}
    for task in tasks:
        value, sums[task.name] = reader.read(task.name)
        found[task.name] = tf.Variable(value, trainable=False, name=_argument(task.name))
        line.add(task.num_bytes)
    line.close()
    reader.verify(sums)
    return [found[name] for name in portable.weights]


def _logits(tf: Any, portable: Portable, weights: Sequence[Any]) -> Any:
    program = _convert(portable.logits, ["B, T", None])

    def logits(tokens: Any) -> dict[str, Any]:
        return {"logits": program(tokens, weights)}

    signature = [tf.TensorSpec((None, None), tf.int32, name="tokens")]
    return tf.function(logits, input_signature=signature, autograph=False)


def _step(tf: Any, portable: Portable, weights: Sequence[Any], length: int | None) -> Any:
    """`Portable.step` with caches by name."""
    tokens = f"B, {length or 'T'}"
    caches = [_polymorphic(entry.dims) for entry in portable.cache.values()]
    program = _convert(portable.step, [tokens, tokens, "B, R", caches, None])
    names = [_argument(name) for name in portable.cache]

    def step(tokens: Any, positions: Any, wanted: Any, cache: Mapping[str, Any]) -> dict[str, Any]:
        logits, updated = program(tokens, positions, wanted, [cache[name] for name in names], weights)
        return {"logits": logits, **dict(zip(names, updated, strict=True))}

    def spec(name: str, last: int | None) -> Any:
        return tf.TensorSpec((None, last), tf.int32, name=name)

    cache = {
        name: tf.TensorSpec(
            [None if isinstance(dim, str) else dim for dim in entry.dims], tf.as_dtype(entry.dtype), name=name
        )
        for name, entry in zip(names, portable.cache.values(), strict=True)
    }
    signature = [spec("tokens", length), spec("positions", length), spec("wanted", None), cache]
    return tf.function(step, input_signature=signature, autograph=False)


def _convert(program: Callable[..., Any], shapes: list[Any]) -> Callable[..., Any]:
    from jax.experimental import jax2tf

    return jax2tf.convert(
        program, polymorphic_shapes=shapes, native_serialization_platforms=PLATFORMS, with_gradient=False
    )


def _polymorphic(dims: Sequence[int | str]) -> str:
    """A shape in jax2tf's notation."""
    letters = {"batch": "B", "cache_len": "S"}
    return ", ".join(letters[dim] if isinstance(dim, str) else str(dim) for dim in dims)


def _argument(name: str) -> str:
    """A name that TensorFlow allows for arguments."""
    return name.replace("/", "_")


def _tensorflow() -> Any:
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError("a SavedModel is written by TensorFlow: pip install gptjax[saved-model]") from error
    return tf
