"""A checkpoint's lineage in a line: what was done to a model, oldest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]


def said(lineage: Sequence[Entry]) -> str:
    """Stages with what matters of each, such as `pretrain: 1,631 steps → quantize: gptq, int4 in groups of 64`."""
    return " → ".join(map(_stage, lineage))


def _stage(entry: Entry) -> str:
    stage = str(entry.get("stage", "?"))
    facts = [*_FACTS.get(stage, _of_training)(entry)]
    calibration = entry.get("calibration")
    if isinstance(calibration, Mapping):
        facts.append(f"{calibration.get('rows')} rows of {calibration.get('length')} tokens to calibrate")
    return stage + (f": {', '.join(facts)}" if facts else "")


def _of_quantizing(entry: Entry) -> Iterator[str]:
    method = entry.get("method")
    if isinstance(method, Mapping):
        scaling = method.get("scaling", "none")
        yield f"{method.get('rounding')}" + ("" if scaling == "none" else f" after {scaling}")
    rules = [rule for rule in entry.get("rules") or () if isinstance(rule, Mapping)]
    for rule in dict.fromkeys(map(_rule, rules)):
        if rule:
            yield rule
    if isinstance(entry.get("kv_cache"), Mapping):
        yield f"keys and values {_format(entry['kv_cache'])}"


def _rule(rule: Entry) -> str:
    if not isinstance(rule.get("weights"), Mapping):
        return ""
    inputs = rule.get("activations", "none")
    return _format(rule["weights"]) + ("" if inputs == "none" else f", inputs {inputs}")


def _format(format: Entry) -> str:
    size = format.get("group_size")
    return f"{format.get('dtype')}" + (f" in groups of {size}" if size else "")


def _of_pruning(entry: Entry) -> Iterator[str]:
    yield from map(str, entry.get("done") or ())


def _of_sharing(entry: Entry) -> Iterator[str]:
    sharing = entry.get("sharing")
    if isinstance(sharing, Mapping):
        yield f"{sharing.get('pattern')}, {sharing.get('unique')} layers of weights, {entry.get('init')}"
    for name in ("kv_every", "tie"):
        if name in entry:
            yield f"{name}={entry[name]}"
    if "low_rank" in entry:
        yield f"two factors by {entry.get('svd')}"


def _of_training(entry: Entry) -> Iterator[str]:
    if "loss" in entry:
        yield f"{entry['loss']}"
    for name in ("quant", "prune"):
        if entry.get(name):
            yield f"{name} {entry[name]}"
    if isinstance(entry.get("num_steps"), int):
        yield f"{entry['num_steps']:,} steps"


_FACTS: Mapping[str, Callable[[Entry], Iterator[str]]] = {
    "quantize": _of_quantizing, "prune": _of_pruning, "share": _of_sharing,
}  # fmt: skip
