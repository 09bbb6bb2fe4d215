import os
import platform
import subprocess
import sys

import jax
import pytest

from gptjax.kernels import cpu

FLAG = "--xla_cpu_experimental_ynn_fusion_type="


@pytest.fixture(autouse=True)
def async_dispatch():
    name = "jax_cpu_enable_async_dispatch"
    before = jax.config.read(name)
    yield
    jax.config.update(name, before)


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


_FAULTS = """
import resource
from gptjax.kernels import cpu
if {tuned}:
    cpu.configure_training()
    cpu.keep_freed_memory()
import jax, jax.numpy as jnp
x = jnp.ones((8, 6_000))
step = jax.jit(lambda x: (x.T @ x) @ x.T)  # the product in between takes 144 MB
counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(8):
    step(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(after - before for before, after in zip(counts[4:], counts[5:])))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of other C libraries is left alone")
def test_the_memory_of_a_step_is_that_of_the_last():
    """Blocks over 64 MiB too, which only the first thread's part of the heap holds."""

    def faults(tuned: bool) -> int:
        unset = ("XLA_FLAGS", "NPROC", "GLIBC_TUNABLES")
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        code = _FAULTS.format(tuned=tuned)
        return int(subprocess.check_output([sys.executable, "-c", code], env=environment, timeout=120))

    if (untuned := faults(tuned=False)) < 10_000:
        pytest.skip(f"{untuned} page faults as it is: this machine gives huge pages unasked")
    assert faults(tuned=True) < 1_000
