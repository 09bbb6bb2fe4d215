"""A JAX program as an ONNX graph, by jax2onnx, in time that grows with the program and not with its square.

jax2onnx takes a jaxpr. Three things are done for it here:

It is given a finished one: while it traces a function itself, it replaces functions of `jax.numpy`.

Calls, and loops of one turn, are replaced by what they do, so that models without experts become graphs without
control flow.

It is given a part at a time. After every operation it searches all that came before (0.17), which for 8 layers
already takes longer than all else; parts are joined by the names of the values that pass between them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

OPSET = 21
# It looks for a class that JAX 0.12 no longer has; no release that does not was there to be tried.
_WITHOUT_JAX_0_12 = ("0.17.0", "0.17.1")

_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2"}
_PART_SIZE = 60  # operations


def convert(
    program: Callable[..., Sequence[Any]], inputs: Mapping[str, jax.ShapeDtypeStruct], *, outputs: Sequence[str]
) -> Any:
    """The `onnx.ModelProto` of `program(*inputs) -> outputs`.

    Args:
      inputs: by name; a symbolic dimension must be one symbol, and a dimension of an input.

    Raises:
      ImportError: without onnx and jax2onnx.
      ValueError: if an operation has no counterpart.
    """
    require_packages()
    import onnx

    specs = list(inputs.values())
    traced = jax.make_jaxpr(program)(*specs)
    flat = jax.make_jaxpr(lambda *args: _unrolled(traced, args))(*specs)
    names = dict(zip(flat.jaxpr.invars, inputs, strict=True))
    nodes, constants, last = [], [], None
    for start in range(0, len(flat.jaxpr.eqns), _PART_SIZE):
        last = _part(flat, start, names)
        prefix = f"part_{start}/"
        _rename(last.graph, prefix, kept=set(names.values()))
        nodes.extend(last.graph.node)
        constants.extend(last.graph.initializer)
    assert last is not None, "a program has operations"
    results = [
        onnx.helper.make_node("Identity", [names[v]], [o]) for v, o in zip(flat.jaxpr.outvars, outputs, strict=True)
    ]
    graph = onnx.helper.make_graph(
        [*nodes, *results],
        "program",
        [_value(onnx, name, spec) for name, spec in inputs.items()],
        [_value(onnx, name, var.aval) for name, var in zip(outputs, flat.jaxpr.outvars, strict=True)],
        initializer=constants,
    )
    return onnx.helper.make_model(graph, opset_imports=last.opset_import, ir_version=last.ir_version)


def require_packages() -> None:
    """Raises:
    ImportError: that says how to install what is missing, or which release is needed.
    """
    try:
        import onnx  # noqa: F401

        with _quiet():
            import jax2onnx  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{error}; ONNX graphs are written by jax2onnx: pip install gptjax[onnx], then pip install --no-deps "
            "jax2onnx (it asks for an orbax-checkpoint older than gptjax's, of which it uses nothing here)"
        ) from error
    release = importlib.metadata.version("jax2onnx")
    if jax.__version_info__ >= (0, 12) and release in _WITHOUT_JAX_0_12:
        raise ImportError(
            f"jax2onnx {release} does not know JAX {jax.__version__}: pip install --no-deps --upgrade jax2onnx, or "
            "export in an environment with 'jax<0.12' (and Python 3.11)"
        )


def _part(flat: Any, start: int, names: dict[Any, str]) -> Any:
    """The model of some operations; names what they compute and others read."""
    import jax2onnx

    eqns = flat.jaxpr.eqns[start : start + _PART_SIZE]
    later = {v for eqn in flat.jaxpr.eqns[start + _PART_SIZE :] for v in eqn.invars if isinstance(v, core.Var)}
    later |= {v for v in flat.jaxpr.outvars if isinstance(v, core.Var)}
    computed = {v: None for eqn in eqns for v in eqn.outvars}
    consts = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
    read: dict[Any, None] = {v: None for eqn in eqns for v in eqn.invars if isinstance(v, core.Var)}
    given = [v for v in read if v not in computed and v not in consts]
    given += [v for v in _with_dimensions(flat.jaxpr.invars) if v not in given]
    wanted = [v for v in computed if v in later]
    names |= {v: f"value_{len(names) + i}" for i, v in enumerate(wanted)}

    def run(*args: Any) -> list[Any]:
        values = consts | dict(zip(given, args, strict=True))
        _evaluate(eqns, values)
        return [values[v] for v in wanted]

    with _quiet():
        try:
            model = jax2onnx.to_onnx(
                run,
                inputs=[jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in given],
                input_names=[names[v] for v in given],
                output_names=[names[v] for v in wanted],
                opset=OPSET,
            )
        except NotImplementedError as error:
            raise ValueError(f"an operation of this model has no counterpart in jax2onnx: {error}") from error
    made = {name for node in model.graph.node for name in node.output} | {x.name for x in model.graph.initializer}
    lost = [str(v.aval) for v in wanted if names[v] not in made]
    if lost:
        raise ValueError(
            f"jax2onnx lost values {', '.join(lost)} while it simplified a graph; try another release of it"
        )
    return model


def _with_dimensions(inputs: Sequence[Any]) -> list[Any]:
    """Inputs that have every symbolic dimension between them: sizes are read from arrays that are there."""
    found: list[Any] = []
    seen: set[str] = set()
    for var in inputs:
        new = {str(dim) for dim in var.aval.shape if not isinstance(dim, int)} - seen
        if new:
            found.append(var)
            seen |= new
    return found


def _unrolled(closed: Any, args: Sequence[Any]) -> list[Any]:
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(closed.jaxpr.invars, args, strict=True))
    _evaluate(closed.jaxpr.eqns, values)
    return [_read(atom, values) for atom in closed.jaxpr.outvars]


def _evaluate(eqns: Sequence[Any], values: dict[Any, Any]) -> None:
    """Adds the results of operations to `values`."""
    for eqn in eqns:
        values |= dict(zip(eqn.outvars, _results(eqn, [_read(atom, values) for atom in eqn.invars]), strict=True))


def _results(eqn: Any, given: Sequence[Any]) -> Sequence[Any]:
    params = eqn.params
    if eqn.primitive.name in _CALLS:
        return _unrolled(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], given)
    if eqn.primitive.name == "scan" and params["length"] == 1:
        num_consts, num_carry = _scan_arity(params, given)
        num_whole = num_consts + num_carry
        turn = [*given[:num_whole], *(jax.lax.squeeze(x, (0,)) for x in given[num_whole:])]
        found = _unrolled(params["jaxpr"], turn)
        return [*found[:num_carry], *(jax.lax.expand_dims(y, (0,)) for y in found[num_carry:])]
    found = eqn.primitive.bind(*given, **params)
    return found if eqn.primitive.multiple_results else [found]


def _scan_arity(params: Mapping[str, Any], given: Sequence[Any]) -> tuple[int, int]:
    """How many of a scan's operands are the same in each turn, and how many are carried."""
    if "num_consts" in params:  # before JAX 0.12
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].update(given).unpack()
    return len(list(consts)), len(list(carry))


def _read(atom: Any, values: Mapping[Any, Any]) -> Any:
    return atom.val if isinstance(atom, core.Literal) else values[atom]


def _rename(graph: Any, prefix: str, *, kept: set[str]) -> None:
    """Puts `prefix` before all names but those kept, in inner graphs too; an empty name is an input left out."""

    def renamed(name: str) -> str:
        return name if not name or name in kept else prefix + name

    for node in graph.node:
        node.name = prefix + node.name
        for names in (node.input, node.output):
            names[:] = [renamed(name) for name in names]
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _rename(inner, prefix, kept=kept)
    for tensor in (*graph.initializer, *graph.input, *graph.output):
        tensor.name = renamed(tensor.name)
    del graph.value_info[:]


def _value(onnx: Any, name: str, spec: Any) -> Any:
    shape = [dim if isinstance(dim, int) else str(dim) for dim in spec.shape]
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(spec.dtype), shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """jax2onnx logs all arguments of each call, and warns of its own examples whose packages are not installed; onnx-ir
    warns of shapes of intermediate values that it leaves out.
    """
    levels = {"": logging.WARNING, "jax2onnx": logging.ERROR, "onnx_ir": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
