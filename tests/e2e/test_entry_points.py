"""What people see of their mistakes at the command line: one line that names the thing, and exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NAMES = (
    "prepare_data",
    "pretrain",
    "evaluate",
    "generate",
    "distill",
    "quantize",
    "prune",
    "compress_report",
    "demo",
)
CONFIG = "--config=configs/demo.py"


def run(name, *flags):
    command = [sys.executable, "-m", f"experiments.{name}", *map(str, flags)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, input="", check=False)


@pytest.mark.parametrize("name", NAMES)
def test_help_is_no_error(name):
    result = run(name, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"python -m experiments.{name}" in result.stdout and "--[no]debug" in result.stdout


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("prepare_data", [], "missing: --out"),
        ("pretrain", [], "missing: --workdir, --config"),
        ("evaluate", [], "missing: --data"),
        ("generate", [], "give one of --ckpt and --workdir"),
        ("pretrain", ["--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean: workdir"),
        ("demo", ["--vocab_size=many"], "flag --vocab_size=many: invalid literal for int"),
        ("demo", ["now"], "unexpected arguments: now; flags begin with --"),
        ("prepare_data", ["--out="], "--out is empty"),
        ("evaluate", ["--ckpt=x", "--data=x", "--batch_size=0"], "flag --batch_size=0: 0 is not a positive integer"),
        ("generate", ["--ckpt=x"], "no prompt: give --prompt or text on standard input"),
        ("distill", ["--workdir=x", CONFIG, "--config.distill.lose=jsd"],
         "config.distill.lose: unknown key; did you mean `loss`?"),
        ("distill", ["--workdir=x", CONFIG, "--config.distill.beta=2.0", "--config.distill.loss=jsd"],
         "config.distill: beta=2.0: expected above 0 and below 1"),
        ("distill", ["--workdir=x", CONFIG, "--on_policy=1.5"], "config.distill: on_policy=1.5: expected 0 to 1"),
        ("pretrain", ["--workdir=x", "--config=none.py"], "No such file or directory: 'none.py'"),
        ("pretrain", ["--workdir=x", CONFIG, "--config.trian.num_steps=3"],
         "unknown key 'trian'; Did you mean \"train\""),
        ("pretrain", ["--workdir=x", CONFIG, "--config.train.num_steps=2.5"],
         "num_steps=2.5: invalid literal for int() with base 10: '2.5'; the config's file has its keys"),
        ("pretrain", ["--workdir=x", CONFIG, "--config.train.num_stepz=3"],
         "config.train.num_stepz: unknown key; did you mean `num_steps`?"),
        # The file leaves it at its default, so only the schema knows its type.
        ("pretrain", ["--workdir=x", CONFIG, "--config.optim.ema_decay=much"],
         "config.optim.ema_decay: expected float, got 'much'"),
        ("pretrain", ["--workdir=x", CONFIG, "--config.optim.learning_rate=nan"],
         "config.optim.learning_rate: expected a finite number, got nan"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_two(name, flags, message):
    result = run(name, *flags)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "SyntaxError: '(' was never closed"),
        ("import nonsense", "ModuleNotFoundError: No module named 'nonsense'"),
        ("x = 1", "has no attribute 'get_config'"),
        ("def get_config(): raise ValueError('boom')", "ValueError: boom"),
    ],
)
def test_a_broken_config_file_is_one_line(tmp_path, text, message):
    (tmp_path / "config.py").write_text(text)
    flags = (f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}")
    result = run("pretrain", *flags)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: ") and "--config" in line and message in line
    assert "Traceback" in run("pretrain", *flags, "--debug").stderr


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        ("KeyboardInterrupt", 130, "stopped by Ctrl-C"),
        ("OSError(28, 'No space left', 'a/b')", 2, "error: a/b: No space left"),
        ("ImportError('install gcsfs')", 2, "error: install gcsfs"),
    ],
)
def test_what_else_may_end_it_is_one_line(error, status, line):
    code = f"from experiments import common\ndef main(): raise {error}\ncommon.start(main)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (status, line + "\n")
