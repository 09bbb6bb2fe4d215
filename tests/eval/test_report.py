"""The run report: complete, self-contained, escaped, and honest about what is missing."""

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from gptjax.eval import charts, report

BITS = {"model": 1.5, "gzip": 1.97, "xz": 1.69}
HOSTILE = "<script>alert('x')</script> & \"日本語\""


@pytest.fixture
def workdir(tmp_path):
    lines = [{"step": s, "loss": 9 / s, "learning_rate": 1e-3, "tokens_per_second": 2000.0 + s} for s in range(1, 40)]
    lines.insert(20, {"step": 20, "eval/loss": 0.5, "eval/seconds": 1.0})
    lines.append({"step": 40, "loss": None})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"bits_per_byte": BITS, "wall_seconds": 90, "peak_memory_bytes": 2**31, "num_params": 5_600_000}
    summary["samples"] = [{"prompt": "def f():", "completion": HOSTILE}]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.json").write_text(json.dumps({"name": HOSTILE, "model": {"d_model": 64, "window": None}}))
    return tmp_path


def page_of(workdir):
    parameters = [("embed/tokens", (128, 64)), ("head/kernel", (128, 64))]
    report.write(report.read(workdir, parameters=parameters), workdir / "report.html")
    return (workdir / "report.html").read_text()


def test_page_shows_the_run_and_needs_no_other_file(workdir):
    page = page_of(workdir)
    for text in ("this model", "1.500", "xz -9e", "5.6 M", "2.00 GiB", "90 s", "embed/tokens", "16,384", "held out"):
        assert text in page, text
    assert not re.search(r"""(src|href)=|url\(|@import|https?:""", page)
    assert not list(workdir.glob("*.partial"))


def test_every_tag_closes_and_every_chart_is_well_formed(workdir):
    page = page_of(workdir)
    open_tags = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in {"meta"}:
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    Checker().feed(page)
    assert not open_tags
    figures = re.findall(r"<svg.*?</svg>", page)
    assert len(figures) == 4
    for figure in figures:
        ET.fromstring(figure)
        assert "nan" not in figure and "inf" not in figure


def test_text_of_the_run_is_escaped(workdir):
    page = page_of(workdir)
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") >= 3


def test_an_unfinished_run_is_reported_with_what_there_is(workdir):
    (workdir / "summary.json").unlink()
    page = report.render(report.read(workdir))
    assert "Loss" in page and "Samples" not in page and "compressed" not in page


def test_a_directory_without_figures_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        report.read(tmp_path)


def test_lines_leave_gaps_at_values_that_are_not_numbers_and_stay_inside_the_chart():
    points = [(1, 8.0), (2, math.nan), (3, 0.0), (4, math.inf), (5, 2.0)]
    figure = charts.line_chart([charts.Series(name="a", points=points, style="accent")], format_y=str, log_y=True)
    (path,) = re.findall(r'class="line accent" d="([^"]*)"', figure)
    coordinates = [tuple(map(float, xy.split(","))) for xy in re.split("[ML]", path)[1:]]
    assert len(coordinates) == 2
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in coordinates)


def test_smoothing_of_a_constant_is_the_constant_and_forgets_by_half():
    assert [y for _, y in charts.smooth([(i, 3.0) for i in range(5)], half_life=2)] == pytest.approx([3.0] * 5)
    (_, last) = charts.smooth([(0, 1.0), (1, 0.0)], half_life=1)[-1]
    assert last == pytest.approx(1 / 3)


def test_downsampling_keeps_ends_and_mean():
    points = [(float(i), float(i % 7)) for i in range(1000)]
    fewer = charts.downsample(points, 100)
    assert len(fewer) == 100 and fewer[0] == points[0] and fewer[-1] == points[-1]
    assert sum(y for _, y in fewer) / 100 == pytest.approx(3.0, abs=0.15)


@pytest.mark.parametrize("low,high", [(0, 1), (0, 7), (3, 1234), (0, 0.0007), (0, 3e12)])
def test_ticks_are_round_inside_and_few(low, high):
    values = charts.ticks(low, high, 5)
    assert 2 <= len(values) <= 11 and all(low <= v <= high * 1.000001 for v in values)
    values = charts.log_ticks(max(low, high / 50), high)
    assert 2 <= len(values) <= 9


def test_a_logarithmic_axis_has_round_values_on_every_scale():
    assert charts.log_ticks(3.4, 8.7) == [4, 5, 6, 7, 8]
    assert charts.log_ticks(2.9, 4.3) == [3, 3.5, 4]
    assert charts.log_ticks(0.5, 60) == [1, 3, 10, 30]
