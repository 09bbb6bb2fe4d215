"""Flags of quantisation: the numbers to store, and the method that finds them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import calibration_flags

if TYPE_CHECKING:
    from gptjax.compress.quantize import Method
    from gptjax.nn.config import QuantConfig, WeightFormat

_FORMATS = ["int2", "int3", "int4", "int5", "int6", "int8", "fp8_e4m3"]
_METHODS = ["rtn", "smoothquant", "awq", "gptq"]
_METHOD = flags.DEFINE_enum("method", None, _METHODS, "How codes are found; rtn rounds to nearest.", required=True)
_WEIGHTS = flags.DEFINE_enum("weights", None, _FORMATS, "The numbers of the layers' kernels.", required=True)
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
_CLIP_NORMS = flags.DEFINE_float("clip_norms", None, "Calibration tokens count as at most so many median norms.")


def rules() -> QuantConfig:
    """What is stored how.

    Raises:
      ValueError: for a format that there is not.
    """
    from gptjax.compress import quantize
    from gptjax.nn.config import WeightFormat

    dtype: Any = _EMBEDDINGS.value
    embeddings = None if dtype == "none" else WeightFormat(dtype=dtype)
    activations: Any = "fp8_e4m3" if _ACTIVATIONS.value == "fp8" else _ACTIVATIONS.value
    return quantize.rules(_weights(), activations=activations, embeddings=embeddings, leave=_LEAVE.value)


def _weights() -> WeightFormat:
    from gptjax.nn.config import WeightFormat

    dtype: Any = _WEIGHTS.value
    has_8_bits = dtype in ("int8", "fp8_e4m3")
    group_size = (0 if has_8_bits else 128) if _GROUP_SIZE.value is None else _GROUP_SIZE.value
    symmetric = has_8_bits if _CODES.value is None else _CODES.value == "symmetric"
    return WeightFormat(dtype=dtype, group_size=group_size or None, symmetric=symmetric)


def method() -> Method:
    """How codes are found.

    Raises:
      ValueError: for a flag that the method does not read.
    """
    from gptjax.compress import quantize

    base = quantize.METHODS[_METHOD.value]
    scaling: Any = _SCALING.value or base.scaling
    given = {"scaling": scaling, "sequence": _SEQUENCE.value, "clip_norms": _CLIP_NORMS.value}
    given["propagate"] = _PROPAGATE.value
    rounding: dict[str, Any] = {"order": _ORDER.value, "scales": _SCALES.value, "damping": _DAMPING.value}
    rounding = {name: value for name, value in rounding.items() if value is not None}
    found = dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})
    if rounding:
        found = dataclasses.replace(found, gptq=dataclasses.replace(found.gptq, **rounding))
    unread = [] if found.rounding == "gptq" else list(rounding)
    if not found.is_calibrated:
        names = {"sequence": _SEQUENCE.value, "clip_norms": _CLIP_NORMS.value, "propagate": _PROPAGATE.value}
        unread += [name for name, value in names.items() if value is not None]
    if unread:
        raise ValueError(f"--method={_METHOD.value} does not read {', '.join(f'--{n}' for n in unread)}; leave it out")
    calibration_flags.check(f"--method={_METHOD.value}", needed=found.is_calibrated)
    return found
