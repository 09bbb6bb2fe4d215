import io
import logging
import os
import pty
import termios

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


def test_a_narrow_line_leaves_out_what_matters_least():
    whole = len(hooks.progress_text(120, 2000, VALUES))
    lines = {width: hooks.progress_text(120, 2000, VALUES, width=width) for width in range(1, whole + 2)}
    assert all(len(line) <= width for width, line in lines.items())
    assert lines[whole] == lines[whole + 1] == hooks.progress_text(120, 2000, VALUES)
    assert lines[79] == "step  120/2000  loss 3.2146  grad 0.831  12,346 tok/s  MFU 41.2 %  ETA 1:02:40"
    assert lines[45] == "step  120/2000  loss 3.2146  ETA 1:02:40"


def test_the_live_line_fits_the_terminal_whose_width_may_change():
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        line = hooks.ProgressLine(num_steps=2000, stream=stream)
        widths = []
        for columns in (200, 60, 30):
            termios.tcsetwinsize(slave, (24, columns))
            line.on_values(120, VALUES)
            widths.append(len(os.read(master, 1000).decode().removeprefix("\r\x1b[2K")))
        assert widths[0] > 80 and 40 < widths[1] < 60 and 20 < widths[2] < 30
    os.close(master)


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
    lines = []
    hooks.ProgressLine(num_steps=20, stream=stream, log_fn=lines.append).on_values(1, VALUES)
    assert [line[:10] for line in lines] == ["step  1/20"]


def test_the_profiler_is_stopped_by_a_run_that_ends_within_the_window(tmp_path):
    profiler = hooks.Profiler(str(tmp_path), first=2, last=9)
    profiler.before_step(1)
    assert profiler.wants_state(1), "what is still running before the window must not be in the trace"
    assert not profiler.wants_state(9)
    profiler.before_step(2)
    assert profiler.wants_state(9) and not profiler.wants_state(8)
    profiler.close()
    profiler.close()
    assert list(tmp_path.rglob("*.xplane.pb"))
