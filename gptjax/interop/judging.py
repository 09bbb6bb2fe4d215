"""How much a conversion has to show, and the verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from gptjax.interop import certificate as certificate_lib
from gptjax.interop.certificate import Certificate, Record
from gptjax.interop.runner import GptjaxRunner, Runner


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is asked of a conversion before it gets its name.

    Attributes:
      proof: `values` only compares what was written, a tensor at a time, where it is written as it is (a checkpoint, or
        `hf`); `run` besides runs both implementations, which needs memory for the model.
      trace: told how the layers' outputs compare, where the peer shows them.
    """

    proof: Literal["run", "values"] = "run"
    trace: Callable[[str], None] | None = None


CHECK = Check()
"""The default."""


@contextmanager
def closing(runner: Runner) -> Iterator[Runner]:
    """Ends the process of a runner that has one."""
    try:
        yield runner
    finally:
        getattr(runner, "close", lambda: None)()


def judge(
    found: Certificate, source: Record, target: Record, *, runners: tuple[Runner, Runner], check: Check
) -> Certificate:
    """The certificate with the figures of both runs, and what is outside of the tolerance."""
    comparisons = certificate_lib.compare(source, target)
    tokenizer = certificate_lib.compare_tokenizers(source, target, reason_of=_reason_of(runners))
    outside = certificate_lib.problems(comparisons, tokenizer, found.tolerance)
    problems = [*found.problems, *outside]
    layers: list[float] | None = None
    if problems or check.trace is not None:
        longest = max(source.prompts, key=lambda name: len(source.prompts[name]))
        tokens = [*source.prompts[longest], *source.greedy[longest]]
        layers = certificate_lib.layer_differences(*runners, tokens)
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
        first_different_layer=certificate_lib.first_difference(layers) if problems else "",
    )


def _reason_of(runners: tuple[Runner, Runner]) -> Callable[[str], str | None]:
    """Asks the peer, if it can tell, where its own tokenizer is known to differ from ours."""
    ours = next((runner.tokenizer for runner in runners if isinstance(runner, GptjaxRunner)), None)
    known = next((found for runner in runners if (found := getattr(runner, "known_difference", None))), None)
    return lambda text: None if known is None or ours is None else known(ours, text)
