"""The perplexity of an exported model by the peer's implementation, beside that by ours, on the same tokens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np

from gptjax.eval import heldout, perplexity
from gptjax.interop.certificate import Certificate, Perplexities
from gptjax.interop.runner import GptjaxRunner, Runner
from gptjax.progress import Line
from gptjax.types import Batch

MAX_DIFFERENCE = 0.01
_NUM_TOKENS, _SEQ_LEN = 8192, 512


def judge(found: Certificate, text: str, ours: GptjaxRunner, peer: Runner, *, written: GptjaxRunner) -> Certificate:
    """The certificate with the perplexities on a text, rejected where they differ by more than `MAX_DIFFERENCE`.

    Args:
      ours: the checkpoint.
      written: ours with the values that were written.

    Raises:
      ValueError: if the text cannot be read, or the model has no tokenizer to read it with.
    """
    measured = measure(text, ours, peer, written=written)
    difference = measured.peer / measured.written - 1
    if abs(difference) <= MAX_DIFFERENCE:
        return dataclasses.replace(found, perplexities=measured)
    problem = (
        f"{text}: perplexity {measured.peer:.4g} by {peer.name}, {measured.written:.4g} here with the same values, "
        f"expected within {MAX_DIFFERENCE:.0%}"
    )
    return dataclasses.replace(found, perplexities=measured, accepted=False, problems=(*found.problems, problem))


def measure(text: str, ours: GptjaxRunner, peer: Runner, *, written: GptjaxRunner) -> Perplexities:
    """See `judge`."""
    if ours.tokenizer is None:
        raise ValueError(f"{text}: the checkpoint has no tokenizer to read text with")
    rows = heldout.read(text, ours.tokenizer, seq_len=min(ours.model.seq_len, _SEQ_LEN), num_tokens=_NUM_TOKENS)

    def by_peer(tokens: list[int]) -> np.ndarray:
        logits = peer.logits(tokens)
        if logits is None:
            raise ValueError(f"{text}: {peer.name} does not give logits away, so it has no perplexity; leave it off")
        return logits[:, : ours.model.vocab_size]

    with contextlib.closing(Line("perplexity")) as line:

        def batches(name: str) -> Iterator[Batch]:
            for number, batch in enumerate(rows.batches, 1):
                line.show(f"{name}: row {number} of {len(rows.batches)}")
                yield batch

        sums = {
            "checkpoint": perplexity.evaluate(ours.model, ours.params, batches(ours.name)),
            "peer": perplexity.evaluate_logits(by_peer, batches(peer.name)),
        }
        sums["written"] = sums["checkpoint"]
        if written is not ours:
            sums["written"] = perplexity.evaluate(written.model, written.params, batches("what was written"))
    figures = {name: perplexity.perplexity(found.nats, found.tokens) for name, found in sums.items()}
    return Perplexities(text=rows.name, num_targets=rows.num_targets, **figures)
