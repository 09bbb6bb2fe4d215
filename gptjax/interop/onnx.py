"""ONNX: two graphs over one file of weights, by jax2onnx.

    model.onnx          tokens [B, T] -> logits [B, T, V]
    step.onnx           tokens, positions [B, T], wanted [B, R] and the cache's arrays -> logits [B, R, V] and the cache
    model.safetensors   the weights, to which both refer as external data
    manifest.json       empty caches, special ids
    tokenizer.model

What the arguments of a step mean is said at `portable.Portable.step`; one graph serves for prompts and for single
tokens, whatever B, T, R and the length of the cache. Everything is float32.

Why jax2onnx: tf2onnx reads TensorFlow's operations, of which there are none in what jax2tf writes since it embeds
StableHLO (one `XlaCallModule`). jax2onnx takes a jaxpr; what it cannot take is left out of programs of the form
`plain`: dimensions such as `2 * T`, scatters of several indices, grouped products. Two things are done here: it is
given a finished jaxpr, as it replaces functions of `jax.numpy` while it traces one, and loops of one turn are
unrolled, so that dense models become graphs without control flow. A mixture of experts is a loop over its experts.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export
from jax.extend import core

from gptjax.interop.portable import Portable, describe, plan
from gptjax.interop.safetensors import SafetensorsFolder, Stored
from gptjax.interop.stablehlo import MANIFEST, write_tokenizer, write_weights
from gptjax.json_files import write_json

MODEL_FILE, STEP_FILE = "model.onnx", "step.onnx"
OPSET = 21

_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2"}


def write(checkpoint: epath.PathLike, folder: pathlib.Path, *, num_threads: int | None = None) -> None:
    """Writes the folder of a checkpoint; goes on with the weights that an earlier call left.

    Weights are written one at a time and are never in the graphs.

    Raises:
      ImportError: without onnx and jax2onnx.
      ValueError: if the checkpoint is damaged, or an operation of the model has no counterpart.
    """
    _require_packages()
    portable, meta = plan(checkpoint, form="plain", dtype=np.dtype(np.float32))
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
    write_json(folder / MANIFEST, describe(portable, meta, tokenizer=write_tokenizer(checkpoint, folder)))


def _write_graph(
    path: pathlib.Path,
    program: Any,
    inputs: dict[str, jax.ShapeDtypeStruct],
    outputs: list[str],
    portable: Portable,
    stored: SafetensorsFolder,
) -> None:
    import onnx

    weights = [jax.ShapeDtypeStruct(weight.shape, weight.dtype) for weight in portable.weights.values()]
    specs = [*inputs.values(), *weights]
    flat = jax.make_jaxpr(lambda *args: _unrolled(jax.make_jaxpr(program)(*specs), args))(*specs)
    with _quiet():
        import jax2onnx

        try:
            model = jax2onnx.to_onnx(
                core.jaxpr_as_fun(flat),
                inputs=specs,
                input_names=[*inputs, *portable.weights],
                output_names=outputs,
                model_name=path.stem,
                opset=OPSET,
            )
        except NotImplementedError as error:
            raise ValueError(
                f"{path.name}: an operation of this model has no counterpart in jax2onnx ({error}); export it as "
                "stablehlo or saved_model"
            ) from error
    _refer_to_weights(model.graph, stored)
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path))


def _unrolled(closed: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr with calls, and loops of one turn, replaced by what they do."""
    values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(closed.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in closed.jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        found = _unrolled_equation(eqn, given)
        values |= dict(zip(eqn.outvars, found, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _unrolled_equation(eqn: Any, given: Sequence[Any]) -> Sequence[Any]:
    params = eqn.params
    if eqn.primitive.name in _CALLS:
        inner = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
        return _unrolled(inner, given)
    if eqn.primitive.name == "scan" and params["length"] == 1:
        whole = params["num_consts"] + params["num_carry"]
        turn = [*given[:whole], *(jax.lax.squeeze(x, (0,)) for x in given[whole:])]
        found = _unrolled(params["jaxpr"], turn)
        num_carry = params["num_carry"]
        return [*found[:num_carry], *(jax.lax.expand_dims(y, (0,)) for y in found[num_carry:])]
    found = eqn.primitive.bind(*given, **params)
    return found if eqn.primitive.multiple_results else [found]


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """jax2onnx warns, with a traceback each, of its own examples whose packages are not installed; and onnx-ir of
    shapes of intermediate values that it leaves out.
    """
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401

        with _quiet():
            import jax2onnx  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{error}; ONNX graphs are written by jax2onnx: pip install gptjax[onnx], then pip install --no-deps "
            "jax2onnx (it asks for an orbax-checkpoint older than gptjax's, of which it uses nothing here)"
        ) from error
