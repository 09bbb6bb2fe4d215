"""The form in which people write what a model has in few bits; `parse` expands it.

    int4:g64:asym                              kernels of the layers
    int4:g32,embeddings=int8,activations=int8  and of the token table and the head; what kernels are multiplied with
    kv_cache=int8                              keys and values alone
    int3:g32:asym,leave=mlp/down               but for kernels whose path has this in it, a regular expression

A format is a dtype, then `g<size>` (values that share a scale) or `rows` (all of a row, or a head, do), then `sym` or
`asym` (groups have a code for zero); of a cache's also `rotated` or `plain`, which is of its keys.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, NamedTuple, get_args

from gptjax.nn import cache as kv_caches
from gptjax.nn.config import ModelConfig
from gptjax.nn.formats import CacheFormat, KernelRule, QuantConfig, WeightFormat

LAYERS = r"^group_\d+/(?!.*router)"
"""The kernels of all layers but routers, which decide by small differences."""
EMBEDDINGS = r"^(embed/tokens|head/kernel)$"
Activations = Literal["none", "int8", "fp8_e4m3"]
_WEIGHTS = ("int2", "int3", "int4", "int5", "int6", "int8", "fp8_e4m3")
_CACHES = ("int4", "int8")
_DEFAULT_GROUP_SIZE = 128
_OPTIONS = ("activations", "embeddings", "kv_cache", "leave")


def parse(text: str) -> QuantConfig:
    """What training rounds, in the form above.

    Raises:
      ValueError: naming the part that is not understood, and what is.
    """
    weights, options = None, {}
    for part in text.split(","):
        name, has_value, value = part.strip().partition("=")
        if not has_value and weights is None:
            weights = weight_format(name)
        elif name in _OPTIONS and has_value and name not in options:
            options[name] = value
        else:
            raise ValueError(
                f"quant={text!r}: {part!r} is not understood; expected the format of the layers' kernels and at most "
                f"one of each {', '.join(f'{option}=...' for option in _OPTIONS)}, separated by commas"
            )
    idle = sorted(options.keys() & {"activations", "embeddings", "leave"}) if weights is None else []
    if idle:
        raise ValueError(f"quant={text!r}: {idle[0]} has no effect without a format of the layers' kernels")
    activations: Any = options.get("activations", "none")
    if activations not in get_args(Activations):
        raise ValueError(f"activations={activations}: expected one of {', '.join(get_args(Activations))}")
    embeddings = weight_format(options["embeddings"], what="embeddings") if "embeddings" in options else None
    kv_cache = cache_format(options.get("kv_cache", "none"))
    if weights is None:
        return QuantConfig(kv_cache=kv_cache)
    found = rules(weights, activations=activations, embeddings=embeddings, leave=options.get("leave"))
    return dataclasses.replace(found, stage="train", kv_cache=kv_cache)


def rules(
    weights: WeightFormat,
    *,
    activations: Activations = "none",
    embeddings: WeightFormat | None = None,
    leave: str | None = None,
) -> QuantConfig:
    """The rules of a model whose layers' kernels are stored in one format.

    Args:
      embeddings: of the token table and the head.
      leave: regular expression of the paths of kernels that stay as they are.

    Raises:
      ValueError: if `leave` is no regular expression.
    """
    found = []
    if leave is not None:
        try:
            re.compile(leave)
        except re.error as error:
            raise ValueError(f"leave={leave!r}: no regular expression: {error}") from error
        found.append(KernelRule(pattern=leave))
    found.append(KernelRule(pattern=LAYERS, weights=weights, activations=activations))
    if embeddings is not None:
        found.append(KernelRule(pattern=EMBEDDINGS, weights=embeddings))
    return QuantConfig(rules=tuple(found))


def weight_format(text: str, *, what: str = "weights") -> WeightFormat:
    """A kernel's format, such as `int4:g64:asym`.

    Of what is left out, 8 bits have `rows` and `sym`, others `g128` and `asym`.

    Raises:
      ValueError: naming what is wrong in it; `what` says whose format it is.
    """
    parts = _split(text, _WEIGHTS, what)
    has_8_bits = parts.dtype in ("int8", "fp8_e4m3")
    group_size = (0 if has_8_bits else _DEFAULT_GROUP_SIZE) if parts.group_size is None else parts.group_size
    symmetric = has_8_bits if parts.symmetric is None else parts.symmetric
    dtype: Any = parts.dtype
    return WeightFormat(dtype=dtype, group_size=group_size or None, symmetric=symmetric)


def cache_format(text: str) -> CacheFormat | None:
    """The format of keys and values, such as `int8` or `int4:g32:asym`; None for `none`.

    Of what is left out, all of a head shares one scale; 8 bits are `sym` and `plain`, 4 bits `asym` and `rotated`.

    Raises:
      ValueError: naming what is wrong in it.
    """
    if text == "none":
        return None
    own = [part for part in text.split(":") if part in ("plain", "rotated")]
    parts = _split(":".join(part for part in text.split(":") if part not in own), _CACHES, "kv_cache")
    if len(own) > 1:
        raise ValueError(f"kv_cache={text}: expected at most one of plain and rotated")
    has_8_bits = parts.dtype == "int8"
    symmetric = has_8_bits if parts.symmetric is None else parts.symmetric
    dtype: Any = parts.dtype
    keys: Any = own[0] if own else ("plain" if has_8_bits else "rotated")
    return CacheFormat(dtype=dtype, group_size=parts.group_size or None, symmetric=symmetric, keys=keys)


def with_cache(cfg: ModelConfig, format: CacheFormat | None) -> ModelConfig:
    """The model with keys and values in another format; its parameters are the same.

    Raises:
      ValueError: if its heads cannot have that format.
    """
    quant = dataclasses.replace(cfg.quant or QuantConfig(), kv_cache=format)
    found = dataclasses.replace(cfg, quant=None if quant == QuantConfig() else quant)
    kv_caches.check(found)
    return found


def said(format: CacheFormat | None) -> str:
    """A cache's format in the form above; `none` for floats."""
    if format is None:
        return "none"
    size = "rows" if format.group_size is None else f"g{format.group_size}"
    return f"{format.dtype}:{size}:{'sym' if format.symmetric else 'asym'}:{format.keys}"


class _Parts(NamedTuple):
    """Of a format, as it was written; None where it does not say. A group size of 0 is `rows`."""

    dtype: str
    group_size: int | None
    symmetric: bool | None


def _split(text: str, dtypes: tuple[str, ...], what: str) -> _Parts:
    dtype, *rest = text.strip().split(":")
    group_size, symmetric = None, None
    understood = dtype in dtypes
    for part in rest:
        if symmetric is None and part in ("sym", "asym"):
            symmetric = part == "sym"
        elif group_size is None and part == "rows":
            group_size = 0
        elif group_size is None and re.fullmatch(r"g[1-9]\d*", part):
            group_size = int(part[1:])
        else:
            understood = False
    if not understood:
        raise ValueError(
            f"{what}={text}: expected <dtype>[:g<size> or :rows][:sym or :asym], with a dtype of {', '.join(dtypes)}; "
            f"for instance {dtypes[0]}:g64:asym"
        )
    return _Parts(dtype, group_size, symmetric)
