from types import SimpleNamespace

import jax
import pytest

from gptjax.train.throughput import Throughput, peak_flops

# `device_kind` as the machines report it.
REPORTED = {
    "TPU v4": 275, "TPU v5 lite": 197, "TPU v5": 459, "TPU v5p": 459, "TPU v6 lite": 918, "TPU7x": 2307 / 2,
    "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835, "NVIDIA H200": 989, "NVIDIA H200 NVL": 835, "NVIDIA B200": 2250, "NVIDIA GB200": 2500,
}  # fmt: skip


@pytest.mark.parametrize("kind", REPORTED)
def test_the_peak_of_a_reported_device_kind(kind):
    assert peak_flops(kind) == pytest.approx(REPORTED[kind] * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "TPU v3", "TPU v5 something", "Tesla T4", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_a_chip_that_is_not_listed_has_no_peak(kind):
    assert peak_flops(kind) is None


def test_mfu_is_the_formula():
    now = [0.0]
    devices = [SimpleNamespace(device_kind="TPU v4")] * 4
    throughput = Throughput(flops_per_token=6e9, devices=devices, clock=lambda: now[0])
    throughput.step_done(1000)
    now[0] = 2.0
    throughput.step_done(100_000)
    rates = throughput.read()
    assert rates["tokens_per_second"] == 50_000
    assert rates["mfu"] == pytest.approx(50_000 * 6e9 / (4 * 275e12))
    now[0] = 3.0
    throughput.step_done(100_000)
    throughput.read()
    assert throughput.overall()["tokens_per_second"] == pytest.approx(200_000 / 3)


def test_a_few_last_steps_are_read_with_those_before():
    now = [0.0]
    throughput = Throughput(devices=jax.devices(), clock=lambda: now[0])
    throughput.step_done(100)
    for at in (1.0, 2.0, 3.0):  # the third step's time was for two
        now[0] = at
        throughput.step_done(100)
    assert throughput.read() == {"step_seconds": 1.0, "tokens_per_second": 100.0}
    throughput.step_done(100)
    now[0] = 3.001
    assert throughput.read() == pytest.approx({"step_seconds": 3.001 / 4, "tokens_per_second": 400 / 3.001})
    assert throughput.overall()["tokens_per_second"] == pytest.approx(400 / 3.001)


def test_a_step_that_seems_to_take_no_time_is_read_with_the_one_before():
    now = [0.0]
    throughput = Throughput(devices=jax.devices(), clock=lambda: now[0])
    throughput.step_done(100)
    found = []
    for at in (1.0, 3.0, 3.001, 4.0, 4.6):  # the second reading had to wait for two steps
        now[0] = at
        throughput.step_done(100)
        found.append(throughput.read()["step_seconds"])
    assert found == pytest.approx([1.0, 2.0, 2.001 / 2, 0.999, 0.6])


def test_without_a_known_peak_there_is_no_mfu_and_it_is_said(caplog):
    now = [0.0]
    with caplog.at_level("INFO", logger="absl"):
        throughput = Throughput(flops_per_token=6e9, devices=jax.devices(), clock=lambda: now[0])
    assert "MFU is left out" in caplog.text
    throughput.step_done(1)
    now[0] = 1.0
    throughput.step_done(1)
    assert set(throughput.read()) == {"tokens_per_second", "step_seconds"}
