"""A certificate as people read it."""

from __future__ import annotations

from gptjax.interop.certificate import ANY_LOGIT, Certificate


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
        logit = "" if bound.max_logit >= ANY_LOGIT else f"<= {bound.max_logit:g}"
        most = (logit, f"<= {bound.mean_kl:g}", f">= {bound.greedy:.0%}" if bound.greedy else "")
        lines.append(f"  {'accepted where':<18}{most[0]:>14}{most[1]:>15}{most[2]:>15}".rstrip())
    if certificate.comparisons and certificate.tokenizer is None:
        lines.append("  tokenizer: not compared; one of the two has none")
    if certificate.tokenizer is not None:
        total = certificate.tokenizer.num_strings
        known = certificate.tokenizer.known
        equal = total - len(certificate.tokenizer.different) - len(known)
        lines.append(f"  tokenizer: ids of {equal} of {total} strings are equal")
        lines += [f"    {text!r:.40}: {reason}" for text, reason in known.items()]
    if (found := certificate.perplexities) is not None:
        lines.append(
            f"  perplexity of {found.num_targets:,} tokens of {found.text}: checkpoint {found.checkpoint:.4f}, what "
            f"was written {found.written:.4f}, by the peer {found.peer:.4f} ({found.peer / found.written - 1:+.3%})"
        )
    lines += [f"  note: {note}" for note in certificate.notes]
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "not shown" if value is None else f"{value:.2e}"
