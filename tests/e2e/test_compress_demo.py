"""`make compress_demo` in small: after `make demo`, everything that it promises on one page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import demo
from gptjax import config
from gptjax.nn.spec import ModelSpec

MODEL = config.to_dict(config.from_dict(ModelSpec, demo.get_config().model))
REPOSITORY = Path(__file__).parents[2]
MADE = {
    "int8", "int4_rtn", "int4_awq", "int4_gptq", "half_magnitude", "half_wanda", "half_sparsegpt", "2of4_magnitude",
    "2of4_wanda", "2of4_sparsegpt", "cut", "shared", "cut_distilled", "cut_trained", "alone",
    "shared_distilled",
}  # fmt: skip


def run(module: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *arguments, "--config=tests/e2e/tiny.py"],
        cwd=REPOSITORY, env=os.environ | {"XLA_FLAGS": ""}, text=True, capture_output=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_way_is_on_the_page_and_nothing_is_made_twice(tmp_path):
    text = "def f{0}(x):\n\treturn x + {0}\n\n\nclass C{0}:\n    value = {0}\n\n" * 40
    (tmp_path / "source").mkdir()
    for number in range(40):
        (tmp_path / "source" / f"module_{number}.py").write_text(text.format(number))
    run(
        "demo", f"--workdir={tmp_path}/demo", f"--source=dir:{tmp_path}/source/*.py", "--vocab_size=400",
        "--train_minutes=0.001",
    )  # fmt: skip
    flags = [f"--demo={tmp_path}/demo", f"--workdir={tmp_path}/small", "--train_minutes=0.001", "--num_tokens=1024"]
    first = run("compress_demo", *flags)
    found = json.loads((tmp_path / "small" / "report" / "compress.json").read_text())
    by_name = {variant["name"]: variant for variant in found["variants"]}
    assert by_name.keys() == {"demo"} | MADE
    assert by_name["int4_gptq"]["size"]["num_params"] == by_name["demo"]["size"]["num_params"]
    assert by_name["cut_distilled"]["size"]["num_params"] == by_name["alone"]["size"]["num_params"]
    assert by_name["alone"]["size"]["num_params"] < by_name["demo"]["size"]["num_params"]
    assert "experiments.prune" in first

    again = run("compress_demo", *flags)
    assert "experiments.quantize" not in again and "experiments.prune" not in again and "compress.html" in again


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no finished demo there; run `make demo` first, or name another by --demo"),
        (
            {"summary": {}, "plan": {"step_seconds": []}, "config": {"model": MODEL}},
            "no time of a step; the demo was trained with --train_minutes=0",
        ),
        (
            {"summary": {}, "config": {"model": MODEL | {"num_kv_heads": 1}}},
            "its students have half of everything; expected even numbers, got num_kv_heads=1",
        ),
        (
            {"summary": {}, "config": {"model": MODEL | {"activation": "relu2"}}},
            "activation: 'relu2' -> 'swiglu'); name the config that it was trained with by --config",
        ),
    ],
)
def test_a_demo_that_says_too_little_is_told_before_anything_is_made(tmp_path, files, message):
    (tmp_path / "demo").mkdir()
    for name, values in files.items():
        (tmp_path / "demo" / f"{name}.json").write_text(json.dumps(values))
    command = [
        sys.executable,
        "-m",
        "experiments.compress_demo",
        f"--demo={tmp_path}/demo",
        f"--workdir={tmp_path}/small",
    ]
    result = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, check=False)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.glob("small/*_*"))
