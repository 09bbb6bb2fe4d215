import io
import logging

import pytest

from gptjax.train import hooks

VALUES = {
    "loss": 3.21456, "grad_norm": 0.8312, "learning_rate": 3e-4, "tokens_per_second": 12345.6, "step_seconds": 2.0,
    "mfu": 0.412, "accuracy": 0.3,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_has_the_figures_and_leaves_out_the_unknown():
    assert hooks.progress_text(120, 2000, VALUES) == (
        "step  120/2000  loss 3.2146  grad 0.831  lr 3.00e-04  12,346 tok/s  MFU 41.2 %  ETA 1:02:40"
    )
    assert hooks.progress_text(1, 20, {"loss": 3.0}) == "step  1/20  loss 3.0000"


def test_on_a_terminal_one_line_is_written_over():
    stream = Terminal()
    line = hooks.ProgressLine(num_steps=20, stream=stream)
    line.on_values(1, VALUES)
    line.on_values(2, VALUES)
    line.on_values(2, {"eval/loss": 3.0})
    line.on_values(3, VALUES)
    line.close()
    line.close()
    shown = [part.rsplit("\x1b[2K", 1)[-1] for part in stream.getvalue().split("\n")]
    assert [part[:13] for part in shown] == ["step 2  eval/", "step  3/20  l", ""]


def test_elsewhere_each_is_a_log_line(caplog):
    stream = io.StringIO()
    line = hooks.ProgressLine(num_steps=20, stream=stream)
    with caplog.at_level(logging.INFO, logger="absl"):
        line.on_values(1, VALUES)
        line.on_values(2, {"eval/loss": 3.0})
    line.close()
    assert stream.getvalue() == ""
    assert [record.getMessage()[:10] for record in caplog.records] == ["step  1/20", "step 2  ev"]


def test_the_profiler_is_stopped_by_a_run_that_ends_within_the_window(tmp_path):
    profiler = hooks.Profiler(str(tmp_path), first=2, last=9)
    profiler.before_step(1)
    assert not profiler.wants_state(9)
    profiler.before_step(2)
    assert profiler.wants_state(9) and not profiler.wants_state(8)
    profiler.close()
    profiler.close()
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_a_profile_window_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"profile_steps=\(3, 2\)"):
        hooks.Profiler("x", first=3, last=2)
