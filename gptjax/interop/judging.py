"""How much a conversion has to show, and the verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from gptjax.interop import certificate as certificate_lib
from gptjax.interop.certificate import Certificate, Comparison, Record
from gptjax.interop.runner import GptjaxRunner, Runner


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is asked of a conversion before it gets its name.

    Attributes:
      proof: `values` only compares what was written, a tensor at a time, where it is written as it is (a checkpoint, or
        `hf`); `run` besides runs both implementations, which needs memory for the model.
      trace: told how the layers' outputs compare, where the peer shows them.
      text: held-out text, as `eval.heldout` reads it, on which the perplexities of an export are compared too.
    """

    proof: Literal["run", "values"] = "run"
    trace: Callable[[str], None] | None = None
    text: str | None = None


CHECK = Check()
"""The default."""


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Ours with the values of an artefact, where that is not to the bit what the checkpoint is.

    Attributes:
      reason: what was done to them.
      max_kl: nats a token that this may do to the model; more is no rounding.
    """

    runner: GptjaxRunner
    reason: str
    max_kl: float


@contextmanager
def closing(runner: Runner) -> Iterator[Runner]:
    """Ends the process of a runner that has one."""
    try:
        yield runner
    finally:
        getattr(runner, "close", lambda: None)()


def judge(
    found: Certificate,
    source: Record,
    target: Record,
    *,
    runners: tuple[Runner, Runner],
    check: Check,
    rounded: Rounded | None = None,
) -> Certificate:
    """The certificate with the figures of both runs, and what is outside of the tolerance.

    What rounding does to a model says nothing of the conversion, nor does a peer whose code runs a somewhat other
    model than the file says (`as_run`). So the peer is held against ours changed in the same way; how far that is
    from ours as it is becomes a note.
    """
    records, sides, notes = [source, target], list(runners), list(found.notes)
    too_much: list[str] = []
    comparisons = certificate_lib.compare(*records)
    at = next(side for side, runner in enumerate(sides) if isinstance(runner, GptjaxRunner))
    plain, reason = _as_run(sides[1 - at], ours=sides[at])
    reasons = [text for text in (rounded.reason if rounded else "", reason) if text]
    if reasons:
        notes.append(f"{'; '.join(reasons)}: beside the model as it is, {_worst(comparisons)}")
        sides[at] = plain if rounded is None else _as_run(sides[1 - at], ours=rounded.runner)[0]
        before = records[at]
        records[at] = _record_again(sides[at], source)
        comparisons = certificate_lib.compare(*records)
        if rounded is not None:
            before = _record_again(plain, source) if reason else before
            too_much = list(_too_much(certificate_lib.compare(before, records[at]), rounded))
    tokenizer = certificate_lib.compare_tokenizers(source, target, reason_of=_reason_of(runners))
    outside = certificate_lib.problems(comparisons, tokenizer, found.tolerance)
    problems = [*found.problems, *outside, *too_much]
    layers: list[float] | None = None
    if problems or check.trace is not None:
        longest = max(source.prompts, key=lambda name: len(source.prompts[name]))
        tokens = [*source.prompts[longest], *source.greedy[longest]]
        layers = certificate_lib.layer_differences(sides[0], sides[1], tokens)
    if check.trace is not None:
        for line in certificate_lib.layer_lines(layers):
            check.trace(line)
    return dataclasses.replace(
        found,
        accepted=not problems,
        referees={"source": source.runner, "target": target.runner},
        comparisons=comparisons,
        tokenizer=tokenizer,
        problems=tuple(problems),
        notes=tuple(notes),
        first_different_layer=certificate_lib.first_difference(layers) if problems else "",
    )


def _as_run(peer: Runner, *, ours: Runner) -> tuple[GptjaxRunner, str]:
    """Ours as the peer is known to run it, and what is then other; empty if nothing."""
    assert isinstance(ours, GptjaxRunner), "one of the two is"
    model, difference = getattr(peer, "as_run", lambda model: (model, ""))(ours.model)
    return (GptjaxRunner(model, ours.params, ours.tokenizer), difference) if difference else (ours, "")


def _record_again(runner: Runner, first: Record) -> Record:
    assert isinstance(runner, GptjaxRunner), "ours"
    return certificate_lib.record(runner, first.prompts, seq_len=runner.model.seq_len)


def _too_much(comparisons: Sequence[Comparison], rounded: Rounded) -> Iterator[str]:
    """A line for each prompt that tells two models apart by more than rounding does."""
    for row in comparisons:
        if row.mean_kl_nats is not None and not row.mean_kl_nats <= rounded.max_kl:
            yield (
                f"{row.prompt}: {rounded.reason}: {row.mean_kl_nats:.3g} nats off the model, expected at most "
                f"{rounded.max_kl:g}"
            )


def _worst(comparisons: Sequence[Comparison]) -> str:
    logits = [row.max_logit_difference for row in comparisons if row.max_logit_difference is not None]
    kl = [row.mean_kl_nats for row in comparisons if row.mean_kl_nats is not None]
    greedy = min(row.greedy_agreement for row in comparisons)
    figures = f"greedy tokens agree for {greedy:.0%} or more before the first that differs"
    if logits:
        figures += f", logits differ by up to {max(logits):.2g}, the mean KL is up to {max(kl):.2g} nats"
    return figures


def _reason_of(runners: tuple[Runner, Runner]) -> Callable[[str], str | None]:
    """Asks the peer, if it can tell, where its own tokenizer is known to differ from ours."""
    ours = next((runner.tokenizer for runner in runners if isinstance(runner, GptjaxRunner)), None)
    known = next((found for runner in runners if (found := getattr(runner, "known_difference", None))), None)
    return lambda text: None if known is None or ours is None else known(ours, text)
