"""StableHLO: two programs, by `jax.export`, and a folder that runs them with JAX and NumPy alone.

    prefill.jax_export      tokens [B, T], positions [B, T], wanted [B, R], cache, weights -> logits [B, R, V], cache
    decode.jax_export       the same for T = 1, where latent attention has a shorter form
    *.stablehlo.mlirbc      the same programs for other readers of StableHLO (portable bytecode)
    model.safetensors       the weights, or several files and their index
    manifest.json, run.py   and the tokenizer; see `portable.write_companions`

Each is one program for CPU, CUDA and TPU, whatever B, T, R and the length of the cache.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export

from gptjax.interop import safetensors, stream
from gptjax.interop.hf import DEFAULT_SHARD_BYTES
from gptjax.interop.portable import Portable, WeightReader, plan, write_companions

PLATFORMS = ("cpu", "cuda", "tpu")


def write(
    checkpoint: epath.PathLike,
    folder: pathlib.Path,
    *,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    num_threads: int | None = None,
) -> None:
    """Writes the folder of a checkpoint; goes on with the weights that an earlier call left.

    Args:
      dtype: of products and caches; see `portable.plan`.

    Raises:
      ImportError: without the package `flatbuffers`.
      ValueError: if the checkpoint is damaged.
    """
    _require_flatbuffers()
    portable = plan(checkpoint, form="any", dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    programs = {}
    for name, length in (("prefill", "T"), ("decode", "1")):
        exported = lower(portable, length=length)
        (folder / f"{name}.jax_export").write_bytes(exported.serialize())
        (folder / f"{name}.stablehlo.mlirbc").write_bytes(exported.mlir_module_serialized)
        programs[name] = _describe_program(exported, length)
    write_weights(checkpoint, portable, folder, max_shard_bytes=max_shard_bytes, num_threads=num_threads)
    write_companions(checkpoint, folder, portable, format="stablehlo", programs=programs)


def lower(portable: Portable, *, length: str) -> export.Exported:
    """`Portable.step` for all platforms.

    Args:
      length: `T` is any number of tokens a row, `1` one.
    """
    batch, num_tokens, num_wanted, cache_len = export.symbolic_shape(f"B, {length}, R, S")

    def tokens(size: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, size), jnp.int32)

    cache = [
        jax.ShapeDtypeStruct(entry.shape(batch=batch, cache_len=cache_len), entry.dtype)
        for entry in portable.cache.values()
    ]
    weights = [jax.ShapeDtypeStruct(weight.shape, weight.dtype) for weight in portable.weights.values()]
    # Unused arguments are kept: a reader of the StableHLO counts them as the manifest does.
    program = export.export(jax.jit(portable.step, keep_unused=True), platforms=PLATFORMS)
    with without_source_paths():
        return program(tokens(num_tokens), tokens(num_tokens), tokens(num_wanted), cache, weights)


def write_weights(
    checkpoint: epath.PathLike,
    portable: Portable,
    folder: pathlib.Path,
    *,
    max_shard_bytes: int,
    num_threads: int | None = None,
) -> None:
    """The weights by name as safetensors, a tensor at a time; goes on with what an earlier call left.

    Raises:
      ValueError: if the checkpoint is damaged.
    """
    reader = WeightReader(checkpoint, portable.weights)
    sizes = {name: (weight.shape, weight.dtype) for name, weight in portable.weights.items()}
    job = {"dtype": portable.model.dtype, "shard": max_shard_bytes, "checkpoint": reader.checksums}
    journal = stream.Journal(folder / stream.JOURNAL_FILE, job=job)
    writer = safetensors.SafetensorsWriter(folder, safetensors.plan_shards(sizes, max_shard_bytes=max_shard_bytes))

    def convert(task: stream.Tensor) -> int:
        value, total = reader.read(task.name)
        writer.write(task.name, value)
        return total

    stream.run(reader.tasks(), convert, journal, label="export", num_threads=num_threads)
    reader.verify(journal.notes)
    journal.remove()


def _describe_program(exported: export.Exported, length: str) -> dict[str, Any]:
    """The order of a program's arguments and results; cache and weights are those of the manifest's lists."""
    return {
        "arguments": [
            {"name": "tokens", "shape": ["batch", "length" if length == "T" else 1], "dtype": "int32"},
            {"name": "positions", "shape": ["batch", "length" if length == "T" else 1], "dtype": "int32"},
            {"name": "wanted", "shape": ["batch", "num_wanted"], "dtype": "int32"},
            "cache",
            "weights",
        ],
        "results": [{"name": "logits", "shape": ["batch", "num_wanted", "vocab_size"], "dtype": "float32"}, "cache"],
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
    }


@contextlib.contextmanager
def without_source_paths() -> Iterator[None]:
    """Programs would else name the files of this machine, and differ from one machine to the next."""
    settings = {
        "jax_include_full_tracebacks_in_locations": False,
        "jax_hlo_source_file_canonicalization_regex": ".*",
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _require_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ImportError("jax.export writes with the package flatbuffers: pip install gptjax[stablehlo]") from error
