"""`compress.html`: every variant of a model on one self-contained page, by the same evaluator on the same tokens."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath

from gptjax.compress import lineage
from gptjax.compress.measure import Quality, Size, Speed, to_json
from gptjax.eval import charts
from gptjax.eval import report as run_report
from gptjax.eval.tasks import Score
from gptjax.interop import publish
from gptjax.json_files import write_json

_STYLE = (Path(run_report.__file__).parent / "report.css").read_text(encoding="utf-8")
_WIDE = (
    "section { grid-column: 1 / -1; } svg { max-width: 900px; font-size: 11px; } "
    ":is(#quality, #size-and-speed, #multiple-choice) :is(table, th, td) { white-space: nowrap; } "
    ":is(#quality, #size-and-speed, #multiple-choice) :is(td + td, th + th) { text-align: right; } "
    ":is(#quality, #size-and-speed, #multiple-choice) td:first-child { max-width: 320px; overflow: hidden; "
    "text-overflow: ellipsis; }"
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model of the comparison.

    Attributes:
      disk_bytes: of its checkpoint's files.
      tasks: scores in multiple choice, by the task's name.
      lineage: what was done to it, oldest first; see `checkpoint.meta.Meta`.
    """

    name: str
    quality: Quality
    size: Size
    speed: Speed
    disk_bytes: int
    tasks: Mapping[str, Score] = field(default_factory=dict)
    lineage: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The page: the first variant is the original.

    Attributes:
      failures: why there are no figures of a model, by its name.
      facts: what the figures were made of, by name.
    """

    title: str
    variants: Sequence[Variant]
    failures: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def check_free(directory: epath.PathLike) -> None:
    """Raises:
    ValueError: if a report is there already, or nothing can be, before work begins that would be lost.
    """
    if (epath.Path(directory) / "compress.json").exists():
        raise ValueError(f"{directory}: has a report already, which is not overwritten; name another, or remove it")
    if "://" not in str(directory):
        publish.check_place(Path(directory).expanduser().absolute())


def write(comparison: Comparison, directory: epath.PathLike) -> None:
    """Writes `compress.html`, its first picture as `compress.svg`, then `compress.json`; nobody sees half of any."""
    check_free(directory)
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    picture = charts.standalone(_by_size(comparison.variants), style=_STYLE)
    for name, text in (("compress.html", render(comparison)), ("compress.svg", picture)):
        partial = directory / f"{name}.partial"
        partial.write_text(text)
        partial.replace(directory / name)
    write_json(directory / "compress.json", as_json(comparison))


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All figures as plain values."""
    variants = [
        {
            "name": variant.name,
            "disk_bytes": variant.disk_bytes,
            "lineage": [dict(entry) for entry in variant.lineage],
            **{key: to_json(getattr(variant, key)) for key in ("quality", "size", "speed")},
            "tasks": {name: dataclasses.asdict(score) for name, score in variant.tasks.items()},
        }
        for variant in comparison.variants
    ]
    rest = {"facts": dict(comparison.facts), "failures": dict(comparison.failures)}
    return {"title": comparison.title, "variants": variants, **rest}


def render(comparison: Comparison) -> str:
    """The page as a string."""
    variants = comparison.variants
    quality, cost, tasks = tables(variants)
    sections = [
        ("Quality", "errors are standard errors; ratio, KL and same token are to the original", _table(quality)),
        ("Size and speed", "measured here, in turn; a token a pass for one reader", _table(cost)),
        (
            "Quality and size",
            "lower and further left is better, the line is the best of both",
            _by_size(variants),
        ),
        (
            "Quality and speed",
            "lower and further left is better; one reader",
            _scatter(variants, "milliseconds a token", lambda variant: 1e3 / variant.speed.decode),
        ),
        (
            "Multiple choice",
            "questions answered right, and in brackets by how much more of them than by the original",
            _table(tasks),
        ),
        ("What was done", "oldest first; compress.json has all of it", _facts(_done(variants))),
        ("Not measured", "", _facts(comparison.failures)),
        ("Made of", "", _facts(comparison.facts)),
    ]
    body = "".join(run_report.section(title, note, content) for title, note, content in sections if content)
    title = html.escape(comparison.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title} · gptjax</title><style>{_STYLE}{_WIDE}</style></head>\n<body><main>"
        f'<header><p class="kicker">gptjax · compression</p><h1>{title}</h1></header>'
        f'<div class="sections">{body}</div></main></body></html>\n'
    )


_COLUMNS: tuple[tuple[str, Callable[[Variant, Variant], str]], ...] = (
    ("bits per byte", lambda v, first: f"{v.quality.bits_per_byte:.4f}"),
    ("perplexity", lambda v, first: f"{v.quality.perplexity:,.2f}"),
    ("ratio", lambda v, first: f"{v.quality.perplexity_ratio:.3f} ± {v.quality.loss_ratio_error:.3f}"),
    ("KL, nats", lambda v, first: f"{v.quality.kl:.4f}"),
    ("same token", lambda v, first: f"{v.quality.agreement:.1%}"),
    ("accuracy", lambda v, first: f"{v.quality.accuracy:.1%}"),
    ("params, M", lambda v, first: f"{v.size.num_params / 1e6:,.2f}"),
    ("disk, MB", lambda v, first: f"{v.disk_bytes / 1e6:,.2f}"),
    ("of original", lambda v, first: f"{v.disk_bytes / first.disk_bytes:.0%}"),
    ("memory, MB", lambda v, first: f"{v.size.memory_bytes / 1e6:,.2f}"),
    ("cache, B/token", lambda v, first: f"{v.size.cache_bytes_per_token:,}"),
    ("MFLOP/token", lambda v, first: f"{v.size.flops_per_token / 1e6:,.2f}"),
    ("prefill, tok/s", lambda v, first: f"{v.speed.prefill:,.0f}"),
    ("decode, tok/s", lambda v, first: f"{v.speed.decode:,.0f}"),
)
_NUM_QUALITY = 6
"""Of the columns."""


def tables(variants: Sequence[Variant]) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Quality, size and speed, and scores in multiple choice as text, heads first; the last is empty without tasks."""
    head = ["model", *(name for name, _ in _COLUMNS)]
    figures = [head, *([v.name, *(show(v, variants[0]) for _, show in _COLUMNS)] for v in variants)]
    quality = [line[: _NUM_QUALITY + 1] for line in figures]
    return quality, [[line[0], *line[_NUM_QUALITY + 1 :]] for line in figures], _task_rows(variants)


def as_text(variants: Sequence[Variant]) -> str:
    """The tables for a terminal."""
    lines = []
    for table in filter(None, tables(variants)):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for name, *cells in table:
            aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            lines.append("  ".join((f"{name:{widths[0]}}", *aligned)))
        lines.append("")
    return "\n".join(lines)


def _task_rows(variants: Sequence[Variant]) -> list[list[str]]:
    names = list(dict.fromkeys(name for variant in variants for name in variant.tasks))
    if not names:
        return []
    head = ["model", *(f"{name} ({_num_questions(variants, name):,})" for name in names)]
    return [head, *([v.name, *(_scored(v, name, is_first=v is variants[0]) for name in names)] for v in variants)]


def _num_questions(variants: Sequence[Variant], name: str) -> int:
    return next(variant.tasks[name].num_questions for variant in variants if name in variant.tasks)


def _scored(variant: Variant, name: str, *, is_first: bool) -> str:
    found = variant.tasks.get(name)
    if found is None:
        return "–"
    text = f"{100 * found.accuracy:.1f} ± {100 * found.accuracy_error:.1f} %"
    return text if is_first else f"{text} ({100 * found.difference:+.1f} ± {100 * found.difference_error:.1f})"


def _table(lines: Sequence[Sequence[str]]) -> str:
    """Text as HTML, the head first."""
    if not lines:
        return ""
    head, *body = lines
    # A long name is cut, and whole where the pointer rests.
    parts = [
        "".join(f'<td title="{cell}">{cell}</td>' if not i else f"<td>{cell}</td>" for i, cell in enumerate(row))
        for row in (list(map(html.escape, row)) for row in body)
    ]
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    rows = "".join(f"<tr>{part}</tr>" for part in parts)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _by_size(variants: Sequence[Variant]) -> str:
    return _scatter(variants, "megabytes on disk", lambda variant: variant.disk_bytes / 1e6)


def _scatter(variants: Sequence[Variant], name: str, x: Callable[[Variant], float]) -> str:
    dots = [
        charts.Dot(
            name=variant.name, x=x(variant), y=variant.quality.perplexity, style="second" if i == 0 else "accent"
        )
        for i, variant in enumerate(variants)
    ]
    return charts.scatter_chart(
        dots,
        caption=f"perplexity by {name}",
        format_y=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
        log_y=True,
    )


def _done(variants: Sequence[Variant]) -> dict[str, str]:
    return {variant.name: lineage.said(variant.lineage) for variant in variants if variant.lineage}


def _facts(facts: Mapping[str, Any]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>" for name, value in facts.items()
    )
    return f"<table><tbody>{lines}</tbody></table>" if lines else ""
