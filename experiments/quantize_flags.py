"""Flags of quantisation: the numbers to store, and the method that finds them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import calibration_flags

if TYPE_CHECKING:
    from gptjax.compress.quantize import Method
    from gptjax.nn.config import ModelConfig
    from gptjax.nn.formats import QuantConfig, WeightFormat

_FORMATS = ["int2", "int3", "int4", "int5", "int6", "int8", "fp8_e4m3"]
_METHODS = ["rtn", "smoothquant", "awq", "gptq"]
_METHOD = flags.DEFINE_enum("method", None, _METHODS, "How codes are found; rtn rounds to nearest.")
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    ["none", *_FORMATS],
    "The numbers of the layers' kernels; none leaves them as they are.",
    required=True,
)
_KV_CACHE = flags.DEFINE_string(
    "kv_cache", None, "none, int8, int4, or as int4:g32:asym: of keys and values; as in the model unless told."
)
_GROUP_SIZE = flags.DEFINE_integer(
    "group_size", None, "Inputs that share a scale, 0: all of a row; 128 unless told, rows for 8 bits.", lower_bound=0
)
_CODES = flags.DEFINE_enum(
    "codes", None, ["symmetric", "asymmetric"], "asymmetric: groups have a zero code; so unless told, but for 8 bits."
)
_ACTIVATIONS = flags.DEFINE_enum("activations", "none", ["none", "int8", "fp8"], "What kernels' inputs are rounded to.")
_EMBEDDINGS = flags.DEFINE_enum("embeddings", "none", ["none", "int8", "fp8_e4m3"], "Of the token table and the head.")
_LEAVE = flags.DEFINE_string("leave", None, "Regular expression of the paths of kernels that stay as they are.")
_SCALING = flags.DEFINE_enum("scaling", None, ["none", "awq", "smoothquant"], "Of inputs; by the method unless told.")
_ORDER = flags.DEFINE_enum("order", None, ["none", "activation", "group"], "GPTQ: inputs in the order of their size.")
_SCALES = flags.DEFINE_enum(
    "scales", None, ["reach", "search"], "GPTQ: that reach the largest value, or are searched for."
)
_DAMPING = flags.DEFINE_float("damping", None, "GPTQ: part of the Hessian's mean diagonal added to it.")
_SEQUENCE = flags.DEFINE_enum(
    "sequence", None, ["stage", "layer", "none"], "Errors made good: of all before, of layers before, nobody's."
)
_PROPAGATE = flags.DEFINE_float(
    "propagate", None, "Part of what a kernel's inputs lost before it that it makes good, 0 to 1."
)


# In absl's words for a flag that is required, so that `experiments.common` names it with the others that are missing.
@flags.validator("method", message="Flag --method must have a value other than None.")
def _is_given(method: str | None) -> bool:
    return method is not None or flags.FLAGS["weights"].value == "none"


def rules(model: ModelConfig) -> QuantConfig:
    """What is stored how.

    Raises:
      ValueError: for a format that there is not, or flags that have no effect.
    """
    from gptjax.nn import quant_spec
    from gptjax.nn.formats import QuantConfig

    kv_cache = model.kv_cache if _KV_CACHE.value is None else quant_spec.cache_format(_KV_CACHE.value)
    if _WEIGHTS.value == "none":
        return QuantConfig(kv_cache=kv_cache)
    dtype: Any = _EMBEDDINGS.value
    embeddings = None if dtype == "none" else quant_spec.weight_format(dtype)
    activations: Any = "fp8_e4m3" if _ACTIVATIONS.value == "fp8" else _ACTIVATIONS.value
    found = quant_spec.rules(_weights(), activations=activations, embeddings=embeddings, leave=_LEAVE.value)
    return dataclasses.replace(found, kv_cache=kv_cache)


def _weights() -> WeightFormat:
    from gptjax.nn import quant_spec

    parts = [_WEIGHTS.value]
    if _GROUP_SIZE.value is not None:
        parts.append(f"g{_GROUP_SIZE.value}" if _GROUP_SIZE.value else "rows")
    if _CODES.value is not None:
        parts.append(_CODES.value.removesuffix("metric"))
    return quant_spec.weight_format(":".join(parts))


def _check_cache_alone() -> None:
    holders = (_METHOD, _GROUP_SIZE, _CODES, _ACTIVATIONS, _EMBEDDINGS, _LEAVE, _SCALING, _ORDER, _SCALES)
    given = [f"--{flag.name}" for flag in (*holders, _DAMPING, _SEQUENCE) if flag.present]
    if given:
        raise ValueError(f"--weights=none leaves kernels as they are; leave out {', '.join(given)}")
    if _KV_CACHE.value is None:
        raise ValueError("nothing to do: --weights=none, and no --kv_cache")
    calibration_flags.check("--weights=none", needed=False)


def method() -> Method:
    """How codes are found.

    Raises:
      ValueError: for a flag that the method does not read.
    """
    from gptjax.compress import quantize

    if _WEIGHTS.value == "none":
        _check_cache_alone()
        return quantize.METHODS["rtn"]
    assert _METHOD.value is not None, "its validator has seen to that"
    base = quantize.METHODS[_METHOD.value]
    scaling: Any = _SCALING.value or base.scaling
    given = {"scaling": scaling, "sequence": _SEQUENCE.value, "propagate": _PROPAGATE.value}
    rounding: dict[str, Any] = {"order": _ORDER.value, "scales": _SCALES.value, "damping": _DAMPING.value}
    rounding = {name: value for name, value in rounding.items() if value is not None}
    found = dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})
    if rounding:
        found = dataclasses.replace(found, gptq=dataclasses.replace(found.gptq, **rounding))
    unread = [] if found.rounding == "gptq" else list(rounding)
    if not found.is_calibrated:
        names = {"sequence": _SEQUENCE.value, "propagate": _PROPAGATE.value}
        unread += [name for name, value in names.items() if value is not None]
    if unread:
        raise ValueError(f"--method={_METHOD.value} does not read {', '.join(f'--{n}' for n in unread)}; leave it out")
    calibration_flags.check(f"--method={_METHOD.value}", needed=found.is_calibrated)
    return found
