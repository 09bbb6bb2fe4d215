import os

import pytest

from gptjax.kernels import cpu

FLAG = "--xla_cpu_experimental_ynn_fusion_type="


@pytest.mark.parametrize(
    ("before", "flags", "threads"),
    [
        ("", FLAG, None),
        (FLAG + "SOME", FLAG + "SOME", None),
        ("--xla_force_host_platform_device_count=12", "--xla_force_host_platform_device_count=12 " + FLAG, "48"),
    ],
)
def test_adds_to_the_environment_what_is_not_there(monkeypatch, before, flags, threads):
    monkeypatch.setattr(cpu.jaxlib, "__version__", "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.delenv("NPROC", raising=False)
    cpu.configure_training()
    assert (os.environ["XLA_FLAGS"], os.environ.get("NPROC")) == (flags, threads)
    monkeypatch.delenv("NPROC", raising=False)


def test_a_flag_that_another_release_may_not_know_is_not_set(monkeypatch):
    monkeypatch.setattr(cpu.jaxlib, "__version__", "0.99.0")
    monkeypatch.setenv("XLA_FLAGS", "")
    cpu.configure_training()
    assert os.environ["XLA_FLAGS"] == ""
