import os
import signal
import threading

import numpy as np
import pytest

from gptjax.train import loop
from gptjax.train.health import DivergedError
from gptjax.train.hooks import Checkpoints, Evaluation, Hook
from gptjax.train.throughput import Throughput
from gptjax.types import Mean
from tests.train import toy


class Recorder(Hook):
    def __init__(self):
        self.lines = []
        self.closed = False

    def on_values(self, step, values):
        self.lines.append((step, dict(values)))

    def close(self):
        self.closed = True

    @property
    def losses(self):
        return [(step, values["loss"]) for step, values in self.lines if "loss" in values]


class FakeState:
    """Counts steps; stands for a state on a device."""

    params = {"embed": np.ones(3)}

    def __init__(self, step=0):
        self.step = step


class LateLoss:
    """A loss that notes when the host asks for its value."""

    def __init__(self, step, events):
        self._step, self._events = step, events

    def __float__(self):
        self._events.append(f"read {self._step}")
        return 1.0

    def __truediv__(self, other):
        return self


def fake_step(events, values=None):
    def run(state, frozen, batch):
        step = state.step + 1
        events.append(f"dispatch {step}")
        metrics = {"loss": Mean(LateLoss(step, events), 1.0)}
        for name, value in (values or (lambda step: {}))(step).items():
            metrics[name] = Mean(value, 1.0)
        return FakeState(step), metrics

    return run


def fit(recorder, *, num_steps, state=None, log_every=1, hooks=(), start=0):
    optimizer = toy.optimizer()
    return loop.fit(
        toy.objective,
        optimizer,
        state or toy.new_state(optimizer.tx),
        toy.batches(start),
        num_steps=num_steps,
        log_every=log_every,
        hooks=[*hooks, recorder],
    )


def test_a_step_is_read_only_after_the_next_is_dispatched():
    events = []
    loop.run_steps(fake_step(events), FakeState(), iter(range(100)), num_steps=4)
    assert events == [
        "dispatch 1", "dispatch 2", "read 1", "dispatch 3", "read 2", "dispatch 4", "read 3", "read 4",
    ]  # fmt: skip


def test_a_hook_sees_the_state_after_its_figures_were_read():
    events = []
    saved = Checkpoints(lambda step, state: events.append(f"save {step}"), lambda: None, every=2)
    loop.run_steps(fake_step(events), FakeState(), iter(range(100)), num_steps=3, hooks=[saved])
    assert events == [
        "dispatch 1", "dispatch 2", "read 1", "read 2", "save 2", "dispatch 3", "read 3", "save 3",
    ]  # fmt: skip


def test_training_lowers_the_loss_and_logs_the_first_the_last_and_every_nth():
    recorder = Recorder()
    result = fit(recorder, num_steps=23, log_every=5)
    assert [step for step, _ in recorder.losses] == [1, 5, 10, 15, 20, 23]
    assert recorder.losses[-1][1] < recorder.losses[0][1]
    assert (result.step, result.outcome, recorder.closed) == (23, "finished", True)
    assert int(result.state.step) == 23
    names = {"loss", "grad_norm", "param_norm", "learning_rate", "tokens", "loader_wait_seconds"}
    assert names | {"tokens_per_second", "step_seconds"} <= set(result.values)


def test_figures_at_the_end_are_those_of_the_last_step_whatever_ended_it():
    recorder = Recorder()
    result = loop.run_steps(fake_step([]), FakeState(), iter(range(7)), num_steps=20, log_every=5, hooks=[recorder])
    assert (result.step, result.outcome) == (7, "out_of_data")
    assert [step for step, _ in recorder.losses] == [1, 5, 7]


def test_stopping_and_going_on_is_the_same_as_not_stopping():
    whole, first, second = Recorder(), Recorder(), Recorder()
    fit(whole, num_steps=6)
    half = fit(first, num_steps=3)
    fit(second, num_steps=6, state=half.state, start=3)
    assert first.losses + second.losses == whole.losses


def test_no_batches_left_ends_the_run():
    recorder = Recorder()
    optimizer = toy.optimizer()
    result = loop.fit(
        toy.objective, optimizer, toy.new_state(optimizer.tx), iter([toy.batch()]), num_steps=5, hooks=[recorder]
    )
    assert (result.step, result.outcome) == (1, "out_of_data")


def test_evaluation_and_checkpoints_run_at_their_intervals_and_once_at_the_end():
    recorder, saves = Recorder(), []
    evaluation = Evaluation(lambda state: {"eval/loss": float(state.step)}, every=2)
    checkpoints = Checkpoints(lambda step, state: saves.append((step, int(state.step))), lambda: None, every=3)
    fit(recorder, num_steps=6, hooks=[evaluation, checkpoints])
    evaluated = [(step, v["eval/loss"]) for step, v in recorder.lines if "eval/loss" in v]
    assert evaluated == [(2, 2.0), (4, 4.0), (6, 6.0)]
    assert saves == [(3, 3), (6, 6)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_after_the_step(number):
    recorder, saves, evaluations = Recorder(), [], []
    before = signal.getsignal(number)

    class Interrupt(Hook):
        def before_step(self, step):
            if step == 3:
                os.kill(os.getpid(), number)

    checkpoints = Checkpoints(lambda step, state: saves.append(int(state.step)), lambda: None, every=100)
    evaluation = Evaluation(lambda state: evaluations.append(1) or {}, every=0)
    result = fit(recorder, num_steps=10, hooks=[Interrupt(), checkpoints, evaluation])
    assert (result.step, result.outcome, saves, evaluations) == (3, "stopped", [3], [])
    assert [step for step, _ in recorder.losses] == [1, 2, 3]
    assert signal.getsignal(number) is before


def test_a_second_interrupt_aborts():
    class Interrupt(Hook):
        def before_step(self, step):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    saves = []
    checkpoints = Checkpoints(lambda step, state: saves.append(step), lambda: None, every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(Recorder(), num_steps=10, hooks=[Interrupt(), checkpoints])
    assert saves == []


def test_a_run_in_another_thread_leaves_the_signals_alone():
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(Recorder(), num_steps=2)))
    thread.start()
    thread.join()
    assert results[0].outcome == "finished"


def nan_from(first, *, skipped):
    return lambda step: {
        "grad_norm": float("nan") if step >= first else 1.0,
        "skipped": float(skipped and step >= first),
    }


def test_nan_from_step_one_stops_at_once_even_when_the_guard_skips_it():
    saves = []
    checkpoints = Checkpoints(lambda step, state: saves.append(step), lambda: None, every=1)
    with pytest.raises(DivergedError, match=r"step 1: loss=1, grad_norm=nan, before any update"):
        loop.run_steps(
            fake_step([], nan_from(1, skipped=True)), FakeState(), iter(range(99)), num_steps=50, hooks=[checkpoints]
        )
    assert saves == []


def test_an_applied_nan_stops_the_run_and_is_never_saved():
    saves = []
    checkpoints = Checkpoints(lambda step, state: saves.append(step), lambda: None, every=1)
    with pytest.raises(DivergedError, match="step 4: .* the parameters are lost"):
        loop.run_steps(
            fake_step([], nan_from(4, skipped=False)), FakeState(), iter(range(99)), num_steps=50, hooks=[checkpoints]
        )
    assert saves == [1, 2, 3]


def test_skipped_steps_are_survived_until_there_are_too_many_in_a_row():
    def now_and_then(step):
        return {"grad_norm": 1.0, "skipped": float(step % 3 == 0)}

    result = loop.run_steps(fake_step([], now_and_then), FakeState(), iter(range(99)), num_steps=90)
    assert result.outcome == "finished"
    with pytest.raises(DivergedError, match="step 24: the last 20 steps were all skipped"):
        loop.run_steps(fake_step([], nan_from(5, skipped=True)), FakeState(), iter(range(99)), num_steps=90)


def test_what_a_non_finite_step_leaves_in_doubt_is_saved_after_the_next_finite_one():
    """Parameters can be finite and too large: then the checkpoints from before must stay the newest."""
    saves = []
    checkpoints = Checkpoints(lambda step, state: saves.append(int(state.step)), lambda: None, every=2)

    def now_and_then(step):
        return {"grad_norm": float("nan") if step in (4, 5, 9) else 1.0, "skipped": float(step in (4, 5, 9))}

    loop.run_steps(fake_step([], now_and_then), FakeState(), iter(range(99)), num_steps=9, hooks=[checkpoints])
    assert saves == [2, 6, 8, 9]
    saves.clear()
    with pytest.raises(DivergedError, match="step 12, the last: neither it nor the 8 before were finite"):
        loop.run_steps(
            fake_step([], nan_from(4, skipped=True)), FakeState(), iter(range(99)), num_steps=12, hooks=[checkpoints]
        )
    assert saves == [2]


def test_spikes_do_not_put_off_a_checkpoint():
    saves = []
    checkpoints = Checkpoints(lambda step, state: saves.append(int(state.step)), lambda: None, every=2)
    values = lambda step: {"grad_norm": 9.0, "skipped": float(step == 4)}  # noqa: E731
    loop.run_steps(fake_step([], values), FakeState(), iter(range(99)), num_steps=5, hooks=[checkpoints])
    assert saves == [2, 4, 5]


def test_an_update_that_loses_the_parameters_is_noticed_at_once():
    values = lambda step: {"grad_norm": 1.0, "param_norm": float("inf") if step > 2 else 1.0}  # noqa: E731
    with pytest.raises(DivergedError, match="step 3: loss=1, grad_norm=1, param_norm=inf, so the parameters are lost"):
        loop.run_steps(fake_step([], values), FakeState(), iter(range(99)), num_steps=5)


def test_a_real_nan_batch_stops_the_run():
    def objective(params, frozen, batch, rng, step):
        loss = toy.objective(params, frozen, batch, rng, step)
        return loss._replace(total=loss.total * np.nan)

    optimizer = toy.optimizer()
    with pytest.raises(DivergedError, match="step 1: .* All parameters are finite, so it arises in the forward"):
        loop.fit(objective, optimizer, toy.new_state(optimizer.tx), toy.batches(), num_steps=5)


def test_parameters_that_are_finite_and_too_large_are_named():
    optimizer = toy.optimizer(1e25)
    with pytest.raises(DivergedError, match="step 1: .*param_norm=inf, so the parameters are lost.* is as large as 1e"):
        loop.fit(toy.objective, optimizer, toy.new_state(optimizer.tx), toy.batches(), num_steps=5)


def test_a_divergence_names_the_parameters_that_are_not_finite():
    optimizer = toy.optimizer()
    state = toy.new_state(optimizer.tx)
    state = state.replace(params=state.params | {"embed": state.params["embed"].at[3].set(np.inf)})
    with pytest.raises(DivergedError, match="step 1: .* Not finite are the parameters embed.$"):
        loop.fit(toy.objective, optimizer, state, toy.batches(), num_steps=5)


def test_rates_leave_out_the_first_step_and_time_spent_elsewhere():
    now = [0.0]
    throughput = Throughput(clock=lambda: now[0])
    assert throughput.read() == {}
    now[0] = 30.0  # compilation
    throughput.step_done(100)
    for _ in range(4):
        now[0] += 2.0
        throughput.step_done(100)
    now[0] += 5.0
    throughput.skip(5.0)
    assert throughput.read() == {"tokens_per_second": 50.0, "step_seconds": 2.0}
    assert throughput.read() == {}


def test_the_loader_wait_is_measured():
    import time

    def slow():
        while True:
            time.sleep(0.02)
            yield None

    recorder = Recorder()
    loop.run_steps(fake_step([]), FakeState(), slow(), num_steps=4, log_every=2, hooks=[recorder])
    waits = [values["loader_wait_seconds"] for _, values in recorder.lines]
    # Seconds, not milliseconds; a busy machine sleeps longer than it was asked to.
    assert all(0.015 < wait < 2 for wait in waits)
