"""ONNX: two graphs over one file of weights, by jax2onnx.

    model.onnx          tokens [B, T] -> logits [B, T, V]
    step.onnx           tokens, positions [B, T], wanted [B, R] and the cache's arrays -> logits [B, R, V] and the cache
    model.safetensors   the weights, to which both refer as external data
    manifest.json       and run.py and the tokenizer; see `portable.write_companions`

What the arguments of a step mean is said at `portable.Portable.step`; one graph serves for prompts and for single
tokens, whatever B, T, R and the length of the cache. Everything is float32.

Why jax2onnx: tf2onnx reads TensorFlow's operations, of which there are none in what jax2tf writes since it embeds
StableHLO (one `XlaCallModule`). jax2onnx takes a jaxpr; what it cannot take is left out of programs of the form
`plain`: dimensions such as `2 * T`, scatters of several indices, grouped products. A mixture of experts becomes a
loop over its experts, and models without are graphs without control flow.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export

from gptjax.interop import onnx_graph
from gptjax.interop.portable import Portable, plan, write_companions
from gptjax.interop.safetensors import SafetensorsFolder, Stored
from gptjax.interop.stablehlo import write_weights

MODEL_FILE, STEP_FILE = "model.onnx", "step.onnx"


def write(checkpoint: epath.PathLike, folder: pathlib.Path, *, num_threads: int | None = None) -> None:
    """Writes the folder of a checkpoint; goes on with the weights that an earlier call left.

    Weights are written one at a time and are never in the graphs.

    Raises:
      ImportError: without onnx and jax2onnx.
      ValueError: if the checkpoint is damaged, or an operation of the model has no counterpart.
    """
    onnx_graph.require_packages()
    portable = plan(checkpoint, form="plain", dtype=np.dtype(np.float32))
    folder.mkdir(parents=True, exist_ok=True)
    # All in one file: an ONNX graph names the file of each tensor, and has no limit of its size.
    write_weights(checkpoint, portable, folder, max_shard_bytes=1 << 62, num_threads=num_threads)
    stored = SafetensorsFolder(folder)
    batch, length, num_wanted, cache_len = export.symbolic_shape("B, T, R, S")
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    wanted = jax.ShapeDtypeStruct((batch, num_wanted), jnp.int32)
    cache = [
        jax.ShapeDtypeStruct(entry.shape(batch=batch, cache_len=cache_len), entry.dtype)
        for entry in portable.cache.values()
    ]
    names = list(portable.cache)

    def logits(tokens: Any, *weights: Any) -> Any:
        return [portable.logits(tokens, weights)]

    def step(tokens: Any, positions: Any, wanted: Any, *rest: Any) -> Any:
        logits, updated = portable.step(tokens, positions, wanted, rest[: len(names)], rest[len(names) :])
        return [logits, *updated]

    graphs = {
        MODEL_FILE: (logits, {"tokens": tokens}, ["logits"]),
        STEP_FILE: (
            step,
            {"tokens": tokens, "positions": tokens, "wanted": wanted, **dict(zip(names, cache, strict=True))},
            ["logits", *(f"updated/{name}" for name in names)],
        ),
    }
    for file, (program, inputs, outputs) in graphs.items():
        _write_graph(folder / file, program, inputs, outputs, portable, stored)
    write_companions(checkpoint, folder, portable, format="onnx")


def _write_graph(
    path: pathlib.Path,
    program: Any,
    inputs: dict[str, jax.ShapeDtypeStruct],
    outputs: list[str],
    portable: Portable,
    stored: SafetensorsFolder,
) -> None:
    import onnx

    weights = {name: jax.ShapeDtypeStruct(weight.shape, weight.dtype) for name, weight in portable.weights.items()}
    model = onnx_graph.convert(program, inputs | weights, outputs=outputs)
    _refer_to_weights(model.graph, stored)
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path))


def _refer_to_weights(graph: Any, stored: SafetensorsFolder) -> None:
    """Turns the inputs that are weights into tensors whose values are in the file of weights."""
    import onnx

    inputs = list(graph.input)
    del graph.input[:]
    graph.input.extend(value for value in inputs if value.name not in stored)
    for value in inputs:
        if value.name in stored:
            graph.initializer.append(_external(onnx, value, stored[value.name]))


def _external(onnx: Any, value: Any, place: Stored) -> Any:
    tensor = onnx.TensorProto(
        name=value.name,
        data_type=value.type.tensor_type.elem_type,
        dims=place.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, entry in (("location", place.file.name), ("offset", place.offset), ("length", place.size)):
        tensor.external_data.add(key=key, value=str(entry))
    return tensor
