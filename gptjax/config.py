"""Checked conversion between ConfigDicts, frozen dataclasses and JSON.

A dataclass is the schema: its annotations are the only place where keys, types and
defaults are written. `from_dict` refuses what the schema does not know and names the
nearest key; `to_dict` is its inverse, so a config stored in a checkpoint reads back equal.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


def from_dict(cls: type[T], values: Any, *, path: str = "config") -> T:
    """Builds the dataclass `cls` from a mapping (a plain dict, a ConfigDict, parsed JSON).

    Unions of dataclasses are told apart by a `kind: Literal[...]` field, or else by whose keys they have.

    Raises:
      ValueError: on an unknown, missing or mistyped key; the message has its dotted path.
    """
    values = _plain(values)
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: expected a mapping of {cls.__name__} keys, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{path}.{key}: unknown key; did you mean `{near}`? Known keys: {', '.join(sorted(fields))}"
            )
    missing = [name for name, field in fields.items() if name not in values and not _has_default(field)]
    if missing:
        raise ValueError(f"{path}: missing keys: {', '.join(missing)} (of {cls.__name__})")
    hints = _hints(cls)  # type: ignore[arg-type]
    kwargs = {key: _convert(hints[key], value, f"{path}.{key}") for key, value in values.items()}
    try:
        return cls(**kwargs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_dict(config: Any) -> Any:
    """The dataclass as nested dicts, lists and scalars that `json` can write."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return config


def check(config: Any) -> None:
    """Checks the types of a dataclass that was made without `from_dict`.

    Raises:
      ValueError: naming the first field that has another type than its annotation, or is not finite.
    """
    cls: type = type(config)
    for field in dataclasses.fields(config):
        _convert(_hints(cls)[field.name], getattr(config, field.name), f"{cls.__name__}.{field.name}")


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `(dotted.key, leaf value)`; empty mappings and lists are leaves."""
    config = _plain(to_dict(config))
    if isinstance(config, Mapping) and config:
        for key, value in config.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, config


def diff(old: Any, new: Any) -> list[str]:
    """One line per leaf that differs: `key: old -> new`."""
    before, after = dict(flatten(old)), dict(flatten(new))
    keys = sorted(before.keys() | after.keys())
    return [
        f"{key}: {before.get(key, '(absent)')!r} -> {after.get(key, '(absent)')!r}"
        for key in keys
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


_ABSENT = object()


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _plain(value: Any) -> Any:
    """A ConfigDict as a plain mapping; anything else unchanged."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def _convert(hint: Any, value: Any, path: str) -> Any:
    value = _plain(value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}: expected one of {', '.join(map(repr, args))}, got {value!r}{hint_text}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path}: expected a list, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        if len(value) != len(args):
            raise ValueError(f"{path}: expected {len(args)} values, got {value!r}")
        return tuple(_convert(a, item, f"{path}[{i}]") for i, (a, item) in enumerate(zip(args, value, strict=True)))
    if origin in (dict, Mapping) or origin is types.MappingProxyType or hint is dict:
        return _convert_mapping(args, value, path)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path=path)  # type: ignore[arg-type, return-value]
    return _convert_scalar(hint, value, path)


def _convert_mapping(args: tuple, value: Any, path: str) -> dict:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: expected a mapping, got {value!r}")
    item = args[1] if args else Any
    return {str(key): _convert(item, inner, f"{path}.{key}") for key, inner in value.items()}


def _convert_union(args: tuple, value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [arg for arg in args if arg is not type(None)]
    if len(options) == 1:
        return _convert(options[0], value, path)
    dataclass_options = [option for option in options if dataclasses.is_dataclass(option)]
    if dataclass_options and isinstance(value, tuple(dataclass_options)):  # type: ignore[arg-type]
        return value
    if dataclass_options and isinstance(value, Mapping):
        return from_dict(_option_of(dataclass_options, value, path), value, path=path)
    errors = []
    for option in options:
        try:
            return _convert(option, value, path)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; or ".join(errors))


def _option_of(options: list[Any], value: Mapping, path: str) -> type:
    """Which of the dataclasses a mapping is of."""
    hints = [_hints(option) for option in options]
    if not all("kind" in own for own in hints):
        return min(options, key=functools.partial(_num_wrong_keys, value))
    kinds = {typing.get_args(own["kind"])[0]: option for own, option in zip(hints, options, strict=True)}
    if value.get("kind") not in kinds:
        raise ValueError(f"{path}.kind: expected one of {', '.join(kinds)}, got {value.get('kind')!r}")
    return kinds[value["kind"]]


def _num_wrong_keys(value: Mapping, cls: Any) -> int:
    """Keys that a dataclass does not know, and that it misses."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    needed = {field.name for field in fields if not _has_default(field)}
    return len(value.keys() - {field.name for field in fields}) + len(needed - value.keys())


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{path}: expected a finite number, got {value}")
        return float(value)
    # bool is an int to isinstance, yet `num_layers=True` is a mistake.
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ValueError(f"{path}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
