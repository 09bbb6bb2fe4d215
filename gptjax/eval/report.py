"""`report.html`: one run on one self-contained page.

Reads what the run left in its directory (`metrics.jsonl`, `config.json`, `summary.json`) and
writes HTML with inline charts and styles; text from the run (samples, names) is always escaped.
"""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath

from gptjax import config as config_lib
from gptjax.eval import charts
from gptjax.json_files import read_json
from gptjax.train.metrics import read_metrics

_STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
_SMOOTHING = 1 / 200  # half-life of the smoothed loss, as a part of the whole run

_BASELINE_NAMES = {
    "model": "this model",
    "gzip": "gzip -9",
    "bz2": "bz2 -9",
    "xz": "xz -9e",
    "xz_given_train": "xz, given train",
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and what the model wrote after it."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the page shows.

    Attributes:
      metrics: one mapping a logged step: `step`, and any of `loss`, `eval/loss`,
        `eval_ema/loss`, `learning_rate`, `tokens_per_second`.
      summary: the run's `summary.json`.
      config: the resolved config as nested plain values.
      parameters: name and shape of every array.
    """

    title: str
    metrics: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    parameters: Sequence[tuple[str, tuple[int, ...]]] = ()


def read(workdir: epath.PathLike, *, parameters: Sequence[tuple[str, tuple[int, ...]]] = ()) -> Report:
    """Collects a run's files; those not written yet leave their part of the page empty.

    Raises:
      ValueError: if the directory has no `metrics.jsonl`.
    """
    workdir = epath.Path(workdir)
    metrics = read_metrics(workdir)
    if not metrics:
        raise ValueError(f"{workdir}/metrics.jsonl: no figures to report; is {workdir} the directory of a run?")
    summary, config = read_json(workdir / "summary.json"), read_json(workdir / "config.json")
    samples = [
        Sample(prompt=str(s.get("prompt", "")), completion=str(s.get("completion", "")))
        for s in summary.get("samples", [])
    ]
    return Report(
        title=str(config.get("name") or workdir.name),
        metrics=_by_step(metrics),
        summary=summary,
        config=config,
        samples=samples,
        parameters=parameters,
    )


def write(report: Report, path: epath.PathLike) -> None:
    """Writes the page; a reader never sees half of it."""
    path = epath.Path(path)
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(render(report))
    partial.replace(path)


def render(report: Report) -> str:
    """The page as a string."""
    sections = [
        ("Held-out text, compressed", "bits per byte; shorter is better", _compression(report.summary)),
        ("Loss", "nats per token, by step; logarithmic axis", _loss(report.metrics)),
        ("Learning rate", "by step", _one_line(report.metrics, "learning_rate", "learning rate", _short)),
        ("Throughput", "tokens a second, by step", _one_line(report.metrics, "tokens_per_second", "tokens/s", _amount)),
        ("Samples", "the prompt is grey", _samples(report.samples)),
        ("Parameters", "", _parameters(report.parameters)),
        ("Configuration", "as resolved", _config(report.config)),
    ]
    body = "".join(section(title, note, content) for title, note, content in sections if content)
    title = html.escape(report.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title} · gptjax</title><style>{_STYLE}</style></head>\n<body><main>"
        f'<header><p class="kicker">gptjax · run report</p><h1>{title}</h1>{_tiles(report)}</header>'
        f'<div class="sections">{body}</div></main></body></html>\n'
    )


def section(title: str, note: str, content: str) -> str:
    """A card of a page."""
    slug = title.lower().split(",")[0].replace(" ", "-")
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f'\n<section id="{slug}"><h2>{html.escape(title)}</h2>{note}{content}</section>'


def _tiles(report: Report) -> str:
    summary = report.summary
    model_bits = (summary.get("bits_per_byte") or {}).get("model")
    loss = _points(report.metrics, "eval/loss") or _points(report.metrics, "loss")
    rates = [y for _, y in _points(report.metrics, "tokens_per_second")]
    candidates: list[tuple[str, float | None, Any]] = [
        ("bits per byte", model_bits, lambda x: f"{x:.3f}"),
        ("loss", loss[-1][1] if loss else None, lambda x: f"{x:.3f}"),
        ("parameters", summary.get("num_params"), _amount),
        ("tokens seen", summary.get("train_tokens"), _amount),
        ("tokens a second", statistics.median(rates) if rates else None, _amount),
        ("wall time", summary.get("wall_seconds"), _duration),
        ("peak memory", summary.get("peak_memory_bytes"), lambda x: f"{x / 2**30:.2f} GiB"),
    ]
    tiles = "".join(
        f"<div><dt>{name}</dt><dd>{show(value)}</dd></div>" for name, value, show in candidates if value is not None
    )
    return f'<dl class="tiles">{tiles}</dl>' if tiles else ""


def _compression(summary: Mapping[str, Any]) -> str:
    figures = summary.get("bits_per_byte") or {}
    bars = [
        charts.Bar(name=_BASELINE_NAMES.get(key, key), value=value, style="accent" if key == "model" else "plain")
        for key, value in sorted(figures.items(), key=lambda item: -item[1])
    ]
    return charts.bar_chart(bars, format_value=lambda x: f"{x:.3f}") if bars else ""


def _loss(metrics: Sequence[Mapping[str, Any]]) -> str:
    train, heldout = _points(metrics, "loss"), _points(metrics, "eval/loss")
    averaged = _points(metrics, "eval_ema/loss")
    if not train and not heldout:
        return ""
    smooth = charts.smooth(train, half_life=max(1.0, len(train) * _SMOOTHING))
    series = [
        charts.Series(name="train", points=train, style="faint"),
        charts.Series(name="smoothed", points=smooth, style="accent"),
        charts.Series(name="held out", points=heldout, style="second", markers=True),
        charts.Series(name="averaged weights", points=averaged, style="third", markers=True),
    ]
    legend = "".join(f'<span class="{s.style}">{s.name}</span>' for s in series if s.points)
    chart = charts.line_chart(series, format_y=_short, log_y=True)
    return f'<p class="legend">{legend}</p>{chart}'


def _one_line(metrics: Sequence[Mapping[str, Any]], key: str, name: str, format_y: Any) -> str:
    points = _points(metrics, key)
    series = [charts.Series(name=name, points=points, style="accent")]
    return charts.line_chart(series, format_y=format_y) if points else ""


def _samples(samples: Sequence[Sample]) -> str:
    return "".join(
        f"<pre><span>{html.escape(sample.prompt)}</span>{html.escape(sample.completion)}</pre>" for sample in samples
    )


def _parameters(parameters: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    if not parameters:
        return ""
    total = sum(math.prod(shape) for _, shape in parameters)
    largest = max(math.prod(shape) for _, shape in parameters)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{' × '.join(map(str, shape))}</td><td>{math.prod(shape):,}</td>"
        f"<td>{100 * math.prod(shape) / total:.1f} %</td>"
        f'<td><i style="width:{100 * math.prod(shape) / largest:.1f}%"></i></td></tr>'
        for name, shape in parameters
    )
    head = "<tr><th>name</th><th>shape</th><th>elements</th><th>share</th><th></th></tr>"
    foot = f"<tr><td>all</td><td></td><td>{total:,}</td><td></td><td></td></tr>"
    table = f"<thead>{head}</thead><tbody>{rows}</tbody><tfoot>{foot}</tfoot>"
    return f'<div class="scroll"><table class="parameters">{table}</table></div>'


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for key, value in config_lib.flatten(config):
        section, _, name = key.rpartition(".")
        groups.setdefault(section, []).append((name, value))
    return '<div class="config">' + "".join(_config_group(*item) for item in groups.items()) + "</div>"


def _config_group(section: str, items: Sequence[tuple[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(json.dumps(value, ensure_ascii=False))}</td></tr>"
        for name, value in items
    )
    return f"<table><caption>{html.escape(section or 'run')}</caption><tbody>{rows}</tbody></table>"


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[key])) for row in metrics if row.get(key) is not None]


def _by_step(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One mapping a step, in order: figures of training and of evaluation are separate lines."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(int(row["step"]), {}).update(row)
    return [merged[step] for step in sorted(merged)]


def _short(value: float) -> str:
    """Three significant digits, without trailing zeros or a long exponent."""
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _amount(value: float) -> str:
    for limit, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= limit:
            scaled = value / {" T": 1e12, " B": 1e9, " M": 1e6, " k": 1e3}[suffix]
            return f"{scaled:.3g}{suffix}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"
