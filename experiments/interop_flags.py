"""Flags and output that importing and exporting share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from gptjax.interop.certificate import Certificate
    from gptjax.interop.judging import Check

REJECTED = 3

_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Cast the values; kept unless told. Not beside --quantization."
)
_PROOF = flags.DEFINE_enum(
    "proof",
    "run",
    ["run", "values"],
    "run: run both models side by side; values: only read back what was written, for models larger than memory.",
)
_TRACE = flags.DEFINE_bool("trace", False, "Compare the output of every layer, where the peer shows them.")
_THREADS = flags.DEFINE_integer("num_threads", None, "Tensors in work at a time; as many as cores.", lower_bound=1)


def values() -> dict[str, Any]:
    """How values are converted."""
    import jax.numpy as jnp

    return {"dtype": None if _DTYPE.value is None else jnp.dtype(_DTYPE.value), "num_threads": _THREADS.value}


def check(*, text: str | None = None) -> Check:
    """How the result is proven.

    Raises:
      ValueError: for a text where nothing is run.
    """
    from gptjax.interop.judging import Check

    if text is not None and _PROOF.value == "values":
        raise ValueError("--text: has no effect with --proof=values, which runs nothing; leave one out")
    trace = _print_trace if _TRACE.value else None
    return Check(proof="values" if _PROOF.value == "values" else "run", trace=trace, text=text)


def run(convert: Callable[[], Certificate], *, path: str) -> int:
    """Carries out a conversion, prints its certificate, and returns the exit status."""
    from gptjax.interop.certificate_text import table
    from gptjax.interop.publish import RejectedError

    try:
        certificate = convert()
    except RejectedError as error:
        print(table(error.certificate))
        print(f"error: {error}", file=sys.stderr)
        return REJECTED
    except KeyboardInterrupt:
        print("what is done is kept: the same command goes on from here", file=sys.stderr)
        raise
    print(table(certificate))
    print(f"{path}: accepted; its certificate.json has the hashes, tolerances and versions")
    return 0


def _print_trace(line: str) -> None:
    print(f"  {line}", flush=True)
