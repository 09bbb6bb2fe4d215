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


def check() -> Check:
    """How the result is proven."""
    from gptjax.interop.judging import Check

    return Check(proof="values" if _PROOF.value == "values" else "run", trace=_print_trace if _TRACE.value else None)


def run(convert: Callable[[], Certificate], *, path: str) -> int:
    """Carries out a conversion, prints its certificate, and returns the exit status."""
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


def table(certificate: Certificate) -> str:
    """The certificate as people read it."""
    lines = [f"{certificate.kind}: {certificate.num_params:,} parameters, {certificate.dtype}"]
    lines += [f"  {name:<8} {peer}" for name, peer in certificate.referees.items()]
    if certificate.values:
        lines.append(f"  values   {certificate.values}")
    if certificate.comparisons:
        lines.append(f"  {'prompt':<18}{'max |dlogit|':>14}{'mean KL, nats':>15}{'greedy tokens':>15}")
    for row in certificate.comparisons:
        figures = (_figure(row.max_logit_difference), _figure(row.mean_kl_nats), f"{row.greedy_agreement:.0%}")
        lines.append(f"  {row.prompt:<18}{figures[0]:>14}{figures[1]:>15}{figures[2]:>15}")
    if certificate.comparisons:
        bound = certificate.tolerance
        most = (f"<= {bound.max_logit:g}", f"<= {bound.mean_kl:g}", f">= {bound.greedy:.0%}")
        lines.append(f"  {'accepted where':<18}{most[0]:>14}{most[1]:>15}{most[2]:>15}")
    if certificate.comparisons and certificate.tokenizer is None:
        lines.append("  tokenizer: not compared; one of the two has none")
    if certificate.tokenizer is not None:
        total = certificate.tokenizer.num_strings
        known = certificate.tokenizer.known
        equal = total - len(certificate.tokenizer.different) - len(known)
        lines.append(f"  tokenizer: ids of {equal} of {total} strings are equal")
        lines += [f"    {text!r:.40}: {reason}" for text, reason in known.items()]
    lines += [f"  note: {note}" for note in certificate.notes]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "not shown" if value is None else f"{value:.2e}"


def _print_trace(line: str) -> None:
    print(f"  {line}", flush=True)
