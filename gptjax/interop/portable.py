"""A checkpoint as programs that run without gptjax: what they compute, and the weights and caches they take.

Weights are arguments, a flat list in the order of `Portable.weights`, and never constants of a program: a
program then has the size of its operations, and the weights of any model are written one at a time.

Layers lie apart, as for decoding. A program over stacked layers would be shorter (12 layers: 37 KB of text, not
325), but a loop copies each layer's weights out of the stack: on CPU a token of 12 layers of width 512 takes 40 ms,
not 19.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath

from gptjax.checkpoint import arrays, reading
from gptjax.checkpoint import stream as array_stream
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.infer.layout import for_decoding, layers_apart
from gptjax.interop import run_exported, stream, tokenizers
from gptjax.json_files import write_json
from gptjax.nn import transformer
from gptjax.nn.cache import init_cache
from gptjax.nn.config import ModelConfig
from gptjax.parallel import mesh
from gptjax.types import Array

Dim = int | Literal["batch", "cache_len"]

MANIFEST, RUN_FILE = "manifest.json", "run.py"


@dataclass(frozen=True)
class Weight:
    """One argument of a program.

    Attributes:
      path: of the checkpoint's array.
      index: of the layer in a stacked array; `()` is the whole array.
    """

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class CacheEntry:
    """One array of a cache; an empty one is full of `fill`."""

    dims: tuple[Dim, ...]
    dtype: np.dtype
    fill: int

    def shape(self, *, batch: Any, cache_len: Any) -> tuple[Any, ...]:
        """The sizes, which may be symbolic."""
        sizes = {"batch": batch, "cache_len": cache_len}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)


@dataclass(frozen=True)
class Portable:
    """A model's programs; see the module's description.

    Attributes:
      form: what they may be made of; see `parallel.mesh.portable`.
      model: with layers apart and a dtype that does not depend on the platform.
    """

    form: Literal["any", "plain"]
    model: ModelConfig
    weights: Mapping[str, Weight]
    cache: Mapping[str, CacheEntry]

    def logits(self, tokens_BT: Array, weights: Sequence[Array]) -> Array:
        """Float32 logits `[B, T, V]` of every position, from 0 in each row, without a cache."""
        with mesh.portable(self.form):
            params = self._params(weights)
            # Not `arange`: converters know the length of an array that they have, not a size alone.
            positions_BT = jnp.cumsum(jnp.ones_like(tokens_BT), axis=1, dtype=jnp.int32) - 1
            output = transformer.forward(self.model, params, tokens_BT, positions_BT=positions_BT)
            return self._logits(params, output.hidden_BTD, positions_BT, self.model.seq_len)

    def step(
        self, tokens_BT: Array, positions_BT: Array, wanted_BR: Array, cache: Sequence[Array], weights: Sequence[Array]
    ) -> tuple[Array, list[Array]]:
        """Reads tokens behind those in the cache.

        Args:
          tokens_BT: int32.
          positions_BT: int32, absolute; -1 where a row has no token.
          wanted_BR: int32 indices below T: for the logits of the last position alone, or of all.
          cache: in the order of `self.cache`, empty or from a former call.

        Returns:
          `(logits_BRV, cache)`, logits in float32; NaN for a position that the cache has no room for, as for one past
          the context: a program cannot raise, and what it computed without that token would look like any logits.
        """
        with mesh.portable(self.form):
            params, nested = self._params(weights), arrays.nest(dict(zip(self.cache, cache, strict=True)))
            output = transformer.forward(self.model, params, tokens_BT, positions_BT=positions_BT, cache=nested)
            hidden_BRD = jnp.take_along_axis(output.hidden_BTD, wanted_BR[:, :, None], axis=1)
            at_BR = jnp.take_along_axis(positions_BT, wanted_BR, axis=1)
            logits_BRV = self._logits(params, hidden_BRD, at_BR, self._room(cache))
            updated = arrays.flatten(output.cache)
            return logits_BRV, [updated[name] for name in self.cache]

    def _logits(self, params: Any, hidden_BRD: Array, positions_BR: Array, room: Array | int) -> Array:
        return jnp.where((positions_BR < room)[:, :, None], transformer.logits(self.model, params, hidden_BRD), jnp.nan)

    def _room(self, cache: Sequence[Array]) -> Array | int:
        """How many positions a step can know of."""
        for entry, value in zip(self.cache.values(), cache, strict=True):
            if "cache_len" in entry.dims:
                num_slots = value.shape[entry.dims.index("cache_len")]
                return jnp.minimum(jnp.arange(num_slots, dtype=jnp.int32)[-1] + 1, self.model.seq_len)
        return self.model.seq_len

    def _params(self, weights: Sequence[Array]) -> dict[str, Any]:
        return arrays.nest(dict(zip(self.weights, weights, strict=True)))


def plan(checkpoint: epath.PathLike, *, form: Literal["any", "plain"], dtype: np.dtype | None = None) -> Portable:
    """The programs of a checkpoint; reads no weights.

    Args:
      dtype: of products and caches, float32 or bfloat16; None is bfloat16 if the parameters are, else float32.

    Raises:
      ValueError: for another dtype, or a checkpoint that cannot be read.
    """
    model = reading.read_meta(epath.Path(checkpoint)).model
    stored = arrays.stored_shapes(epath.Path(checkpoint) / "params")
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    if dtype is None:
        kernels = {np.dtype(leaf.dtype) for path, leaf in stored.items() if path.endswith("/kernel")}
        dtype = bfloat16 if kernels == {bfloat16} else np.dtype(np.float32)
    if dtype not in (bfloat16, np.float32):
        raise ValueError(f"dtype={dtype}: programs compute in float32 or bfloat16; choose one of them")
    model = dataclasses.replace(model, dtype=dtype.name, remat="none")  # type: ignore[arg-type]
    return Portable(form, layers_apart(model), _weights(model), _cache(model, form, dtype))


def _weights(model: ModelConfig) -> dict[str, Weight]:
    """By the names that they have with layers apart."""
    sources: dict[str, tuple[str, tuple[int, ...]]] = {}
    for i, group in enumerate(model.groups):
        num = len(layers_apart(dataclasses.replace(model, groups=(group,))).groups)
        sources |= {
            f"group_{len(sources) + layer}": (f"group_{i}", (layer,) if num > 1 else ()) for layer in range(num)
        }
    laid_out = jax.eval_shape(lambda params: for_decoding(model, params)[1], transformer.abstract_params(model))
    found = {}
    for name, leaf in arrays.flatten(laid_out).items():
        top, _, rest = name.partition("/")
        source, index = sources.get(top, (top, ()))
        found[name] = Weight(f"{source}/{rest}", index, leaf.shape, np.dtype(leaf.dtype))
    return found


def _cache(model: ModelConfig, form: Literal["any", "plain"], dtype: np.dtype) -> dict[str, CacheEntry]:
    """Which sizes of a cache follow the batch and which the length is seen by making it twice, in shapes alone."""
    windows = [block.attention.window for block in model.blocks if block.attention.window is not None]
    batches, lengths = (1, 2), (max([*windows, 2]) + 1, max([*windows, 2]) + 2)
    names: dict[tuple[int, int], Dim] = {batches: "batch", lengths: "cache_len"}

    def shapes(batch_size: int, max_len: int) -> dict[str, Any]:
        make = functools.partial(init_cache, layers_apart(model), batch_size=batch_size, max_len=max_len, dtype=dtype)
        return arrays.flatten(jax.eval_shape(make))

    with mesh.portable(form):
        one, two = (shapes(*sizes) for sizes in zip(batches, lengths, strict=True))
    return {
        name: CacheEntry(
            tuple(names.get(pair, pair[0]) for pair in zip(leaf.shape, two[name].shape, strict=True)),
            np.dtype(leaf.dtype),
            -1 if name.endswith("/positions") else 0,
        )
        for name, leaf in one.items()
    }


class WeightReader:
    """Reads weights from a checkpoint, one at a time, and compares them with its checksums."""

    def __init__(self, checkpoint: epath.PathLike, weights: Mapping[str, Weight]) -> None:
        self._checkpoint, self._weights = epath.Path(checkpoint), weights
        self._meta = reading.read_meta(self._checkpoint)
        sliced_dims = {weight.path: len(weight.index) for weight in weights.values()}
        self._reader = array_stream.ArraysReader(pathlib.Path(checkpoint) / "params", sliced_dims)

    @property
    def checksums(self) -> Mapping[str, int]:
        """Those of the checkpoint, which tell it from another."""
        return self._meta.checksums

    def tasks(self) -> list[stream.Tensor]:
        """For `stream.run`, with the layers of an array one after the other, as they may share chunks of a file."""
        ordered = sorted(self._weights.items(), key=lambda item: (item[1].path, item[1].index))
        return [stream.Tensor(name, weight.shape, weight.dtype) for name, weight in ordered]

    def read(self, name: str) -> tuple[np.ndarray, int]:
        """The values, and the checksum of those that are stored."""
        weight = self._weights[name]
        value = self._reader.read(weight.path, weight.index)
        converted = value.astype(weight.dtype, copy=False).reshape(weight.shape)
        return np.ascontiguousarray(converted), array_stream.bit_sum(value)

    def verify(self, sums: Mapping[str, int]) -> None:
        """Raises:
        ValueError: naming an array that is not what was saved, by the sums that `read` gave for all weights.
        """
        totals: dict[str, int] = {}
        for name, total in sums.items():
            path = self._weights[name].path
            totals[path] = (totals.get(path, 0) + total) & 0xFFFFFFFF
        for path, total in totals.items():
            if self._meta.checksums.get(f"params/{path}", total) != total:
                raise ValueError(
                    f"{self._checkpoint}: params/{path}: the values are not those that were saved (checksum); "
                    "restore the files from a copy"
                )


def write_companions(
    checkpoint: epath.PathLike, folder: pathlib.Path, portable: Portable, *, format: str, **more: Any
) -> None:
    """What lies beside programs, so that they run where nothing of gptjax is.

    tokenizer.json, ...   what `transformers` and `tokenizers` load; or tokenizer.model, see `tokenizers.write_files`
    manifest.json         sizes, special ids, caches and weights in the order of arguments, and `more`
    run.py                an example of use
    """
    path = epath.Path(checkpoint)
    content = reading.read_assets(path).get(tokenizer_lib.FILE_NAME)
    tokenizer = None if content is None else tokenizer_lib.from_bytes(content)
    special_ids: dict[str, Any] = {}
    if tokenizer is not None:
        tokenizers.write_files(tokenizer, folder)
        special_ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "pad", "unk")}
        special_ids["eos"] = list(tokenizer.eos_ids)
    model, meta = portable.model, reading.read_meta(path)
    manifest = {
        "format": format,
        "vocab_size": model.vocab_size,
        "context": model.seq_len,
        "dtype": model.dtype,
        "special_ids": special_ids,
        "checkpoint": {"step": meta.step, "tokenizer": meta.tokenizer},
        "cache": [
            {"name": name, "shape": list(entry.dims), "dtype": entry.dtype.name, "fill": entry.fill}
            for name, entry in portable.cache.items()
        ],
        "weights": [
            {"name": name, "shape": list(weight.shape), "dtype": weight.dtype.name}
            for name, weight in portable.weights.items()
        ],
    }
    write_json(folder / MANIFEST, manifest | more)
    shutil.copyfile(run_exported.__file__, folder / RUN_FILE)
