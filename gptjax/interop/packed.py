"""Weights that a folder holds packed, as `quantization_config` in its config says: unpacked when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gptjax.interop import fp8, mxfp4
from gptjax.interop.reader import ConfigReader
from gptjax.interop.source import Readable

KEY = "quantization_config"
_METHODS: Mapping[str, Callable[[Mapping[str, Readable], ConfigReader], Mapping[str, Readable]]] = {
    "fp8": fp8.unpacked,
    "mxfp4": mxfp4.unpacked,
}


def unpacked(tensors: Mapping[str, Readable], section: ConfigReader | None) -> Mapping[str, Readable]:
    """The tensors under the names that they have in a folder where nothing is packed.

    Args:
      section: `quantization_config`, where there is one.

    Raises:
      ValueError: naming the method or the key that is not supported, or the tensor that is not packed as it says.
    """
    if section is None:
        return tensors
    method = section.take("quant_method", str)
    if method not in _METHODS:
        raise ValueError(
            f"{section.path}: got weights packed by {method!r}, expected {' or '.join(map(repr, _METHODS))}; unpack "
            "them with the library that packed them, and import the result"
        )
    found = _METHODS[method](tensors, section)
    section.finish()
    return found
